"""Sending answers: as one JSON document, or as server-sent events, to a client that may leave at any time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from dsengine.server.encoding import encode_json
from dsengine.server.errors import ApiError
from dsengine.server.metrics import CLIENT_CLOSED_REQUEST

T = TypeVar("T")

# A client that reads nothing for this long, or up to twice as long, is given up, so that its text need not be kept.
STALL_SECONDS = 60.0

Events = AsyncGenerator[dict[str, Any], None]


def json_response(body: Any, status: int = 200) -> Response:
    return Response(encode_json(body), status, media_type="application/json")


class ClientDisconnected(Exception):
    """The client left before its answer was complete."""


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Result of `work`, which is cancelled as soon as the client leaves.

    Raises:
        ClientDisconnected: it has left.
    """
    task = asyncio.create_task(_completed(work))
    watch = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        await _cancel(task, watch)


async def client_left(_: Request, error: Exception) -> Response:
    """Nobody reads this; it tells the log and the counters."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _completed(work: Awaitable[T]) -> T:
    return await work


class EventStream(Response):
    """Server-sent events, as OpenAI sends them: one JSON document per event, `[DONE]` after the last.

    An `ApiError` in the middle becomes an event with an `error` object, after which the stream ends without `[DONE]`.
    When the client leaves, or reads nothing for a minute, the events are closed.

    Args:
        named: each event is called by its `type`, and there is no `[DONE]`.
        describe_error: the last event's body, when an error ended the stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: dict[str, Any],
        rest: Events,
        *,
        named: bool = False,
        describe_error: Callable[[ApiError], dict[str, Any]] = ApiError.body,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Its length is not known: an empty body's Content-Length would be wrong.
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._named = named
        self._describe_error = describe_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watched = _WatchedSend(send)
        sender = asyncio.create_task(self._send_all(watched))
        watch = asyncio.create_task(_disconnected(receive))
        stall = asyncio.create_task(watched.stalled())
        try:
            await asyncio.wait((sender, watch, stall), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(sender, watch, stall)
            await self._rest.aclose()
        if not sender.cancelled() and (error := sender.exception()) is not None:
            raise error

    async def _send_all(self, send: Send) -> None:
        start: Message = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        await send(_body(self._event(self._first)))
        try:
            async for event in self._rest:
                await send(_body(self._event(event)))
        except ApiError as error:
            await send(_body(self._event(self._describe_error(error)), last=True))
        else:
            await send(_body(b"" if self._named else b"data: [DONE]\n\n", last=True))

    def _event(self, body: dict[str, Any]) -> bytes:
        name = b"event: " + body["type"].encode() + b"\n" if self._named else b""
        return name + b"data: " + encode_json(body) + b"\n\n"


class _WatchedSend:
    """Sends messages, and knows since when one of them has been waiting for its reader.

    A timer for every message would cost more than sending it: most are gone at once.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None

    async def __call__(self, message: Message) -> None:
        self._since = self._loop.time()
        await self._send(message)
        self._since = None

    async def stalled(self) -> None:
        """Returns when a message has waited for too long."""
        while self._since is None or (left := self._since + STALL_SECONDS - self._loop.time()) > 0:
            await asyncio.sleep(STALL_SECONDS if self._since is None else left)


def _body(data: bytes, *, last: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": not last}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
