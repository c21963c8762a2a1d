"""Streams read off a bare socket, so that a client can leave at any byte and in any manner."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from dataclasses import dataclass
from typing import Any


def request_bytes(path: str, body: dict[str, Any] | None = None) -> bytes:
    """An HTTP/1.1 request that asks for the connection to be closed after the answer; without a body, a GET."""
    if body is None:
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


class Connection:
    """One TCP connection, on the event loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self.received = bytearray()

    @classmethod
    async def open(cls, port: int) -> Connection:
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(sock)

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, data)

    async def read_to(self, size: int | None) -> bool:
        """Reads until `size` bytes are there, or to the end (None); False if the end came first."""
        while size is None or len(self.received) < size:
            data = await self._loop.sock_recv(self._sock, 4096 if size is None else min(4096, size))
            if not data:
                return False
            self.received += data
        return True

    def half_close(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def close(self, *, reset: bool = False) -> None:
        if reset:  # without lingering, what is closed is reset
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()


@dataclass(frozen=True)
class Answer:
    """What a finished stream said: its status, the text of all chunks, and how it ended."""

    status: int
    text: str
    finish_reason: str | None
    is_whole: bool


def read_answer(raw: bytes) -> Answer:
    """Takes a whole HTTP response apart: a stream of events, or one JSON document."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if b"chunked" in head.lower():
        body = _unchunked(body)
    if b"text/event-stream" not in head.lower():
        return Answer(status, body.decode("utf-8", "replace"), None, True)
    text, finish = "", None
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
    for event in events:
        if event == b"[DONE]":
            break
        choices = json.loads(event).get("choices") or [{}]
        delta = choices[0].get("delta", {})
        text += choices[0].get("text") or delta.get("reasoning_content") or delta.get("content") or ""
        finish = choices[0].get("finish_reason") or finish
    return Answer(status, text, finish, bool(events) and events[-1] == b"[DONE]")


def _unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        parts.append(body[:length])
        body = body[length + 2 :]
    return b"".join(parts)
