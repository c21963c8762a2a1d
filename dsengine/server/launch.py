"""Starts the server process, and ends it in good order.

SIGTERM or Ctrl-C: new requests get 503, running ones finish, exit 0. A second signal, or the end of `drain_timeout`,
ends the running ones with an error event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsengine.async_engine import AsyncEngine, EngineDeadError
from dsengine.config import EngineConfig, ServerConfig
from dsengine.server import errors
from dsengine.server.app import App, create_app
from dsengine.server.front_door import MAX_HEADER_BYTES
from dsengine.server.node import run_node
from dsengine.server.request_log import configure_logging
from dsengine.server.tracing import Tracer

logger = logging.getLogger("dsengine.server")

EXIT_OK = 0
EXIT_ENGINE_FAILED = 1
EXIT_USER_ERROR = 2

_HEADER_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 5
# What connections get to take their last event, once nothing is generated any more.
_CLOSING_SECONDS = 3


def serve(
    engine_config: EngineConfig, server_config: ServerConfig, *, engine_module: str = "dsengine.engine.process"
) -> int:
    """Serve until told to stop; returns the exit status: 0, 1 when the engine failed, 2 for a user's mistake.

    Args:
        engine_module: what runs as the engine's process.
    """
    configure_logging(server_config.log_level, server_config.log_format)
    if engine_config.node_rank > 0:
        return run_node(engine_config, server_config.on_engine_failure)
    try:
        listener = listen(server_config.host, server_config.port)
    except OSError as error:
        print(f"dsengine: error: {_explain_listen_error(server_config, error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    with contextlib.closing(listener):
        return asyncio.run(_Launcher(engine_config, server_config, engine_module, listener).run())


class _Launcher:
    """One life of the server."""

    def __init__(
        self, engine_config: EngineConfig, server_config: ServerConfig, engine_module: str, listener: socket.socket
    ) -> None:
        self._engine_config = engine_config
        self._config = server_config
        self._engine_module = engine_module
        self._listener = listener
        self._tracer: Tracer | None = None
        self._signals = 0
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            if self._config.otlp_traces_endpoint is not None:
                self._tracer = Tracer(self._config.otlp_traces_endpoint)
            progress = sys.stderr.isatty()
            engine = AsyncEngine(
                self._engine_config,
                on_failure=self._config.on_engine_failure,
                show_progress=progress,
                module=self._engine_module,
            )
        except (ValueError, OSError) as error:
            return _refuse(error, EXIT_USER_ERROR)
        try:
            return await self._run_engine(engine)
        finally:
            await engine.shutdown()
            if self._tracer is not None:
                await self._tracer.close()

    async def _run_engine(self, engine: AsyncEngine) -> int:
        start, stop = asyncio.create_task(engine.start()), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((start, stop), return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                return EXIT_OK
            start.result()
        except ValueError as error:
            return _refuse(error, EXIT_USER_ERROR)
        except EngineDeadError as error:
            return _refuse(error, EXIT_ENGINE_FAILED)
        finally:
            await _cancel(start, stop)
        if engine.info.memory is not None:
            for line in engine.info.memory.lines():
                logger.info(line)
        return await self._run_server(engine, create_app(engine, self._config, self._tracer))

    async def _run_server(self, engine: AsyncEngine, app: App) -> int:
        server = _Server(_uvicorn_config(app))
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        stop, failed = asyncio.create_task(self._stop.wait()), asyncio.create_task(engine.failed.wait())
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            if server.started:
                print(self._ready_line(app.service.model), flush=True)
            await asyncio.wait((serving, stop, failed), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            if not failed.done():
                await self._drain(app)
            return EXIT_ENGINE_FAILED if engine.failed.is_set() else EXIT_OK
        except OSError as error:  # another process has begun to listen on our port since we bound it
            return _refuse(ValueError(_explain_listen_error(self._config, error)), EXIT_USER_ERROR)
        finally:
            app.service.lifecycle.draining = True
            app.service.lifecycle.abort_all(errors.shutting_down())
            server.should_exit = True
            await asyncio.wait((serving,))
            await _cancel(stop, failed)
            await app.service.close()

    async def _drain(self, app: App) -> None:
        """Refuse new requests and let the running ones finish, for as long as they may."""
        lifecycle = app.service.lifecycle
        lifecycle.draining = True
        logger.info("draining: new requests are refused, running ones have %.0f s", self._config.drain_timeout)
        idle, hurry = asyncio.create_task(lifecycle.wait_idle()), asyncio.create_task(self._hurry.wait())
        await asyncio.wait((idle, hurry), timeout=self._config.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(idle, hurry)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _ready_line(self, model: str) -> str:
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        return f"dsengine serves {model} at http://{shown}:{port}/v1"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours know what is running."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """uvicorn's protocol, closing connections that begin a request but do not send all of its headers in time."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers(True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_headers(self.conn.their_state is h11.IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_headers(False)
        super().connection_lost(exc)

    def _expect_headers(self, expected: bool) -> None:
        if not expected and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        elif expected and self._header_timer is None:
            self._header_timer = self.loop.call_later(_HEADER_SECONDS, self.transport.close)


def _uvicorn_config(app: App) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        interface="asgi3",
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. It is bound before the model is loaded: a port in use must be known at once."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    # asyncio switches Nagle's algorithm off (40 ms on every second write) only where the protocol is named.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _explain_listen_error(config: ServerConfig, error: OSError) -> str:
    where = f"port {config.port} of {config.host}"
    return f"cannot listen on {where}: {error.strerror or error}; choose another with --port or --host"


def _refuse(error: Exception, status: int) -> int:
    logger.debug("refused to serve", exc_info=error)
    print(f"dsengine: error: {error}", file=sys.stderr)
    return status


async def _cancel(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
