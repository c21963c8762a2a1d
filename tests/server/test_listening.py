"""The server's socket, as asyncio makes connections of it."""

from __future__ import annotations

import asyncio
import socket
import sys
import types

import pytest
from server_helpers import ScriptedEngine, make_app
from test_answers import tokenizer
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsengine.server.launch import _uvicorn_config, listen


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_are_not_held_back(host: str) -> None:
    """With Nagle's algorithm every second write on a connection would wait for an acknowledgement, 40 ms."""

    async def accepted() -> int:
        connections: asyncio.Queue[asyncio.BaseTransport] = asyncio.Queue()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                connections.put_nowait(transport)

        listener = listen(host, 0)
        server = await asyncio.get_running_loop().create_server(Protocol, sock=listener)
        async with server:
            _, writer = await asyncio.open_connection(host, listener.getsockname()[1])
            transport = await connections.get()
            nodelay: int = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
            transport.close()
        return nodelay

    try:
        assert asyncio.run(accepted()) == 1
    except OSError:
        if host != "::1":
            raise
        pytest.skip("there is no IPv6 here")


def test_an_installed_parser_does_not_change_the_one_that_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn takes httptools where it finds it, unless told otherwise; the limits of headers are in our protocol."""
    monkeypatch.setitem(sys.modules, "httptools", types.ModuleType("httptools"))
    config = _uvicorn_config(make_app(ScriptedEngine(tokenizer())))
    config.load()
    assert issubclass(config.http_protocol_class, H11Protocol) and config.ws_protocol_class is None
