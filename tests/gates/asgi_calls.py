"""Calls of the application without a socket or a client library, and what must hold for every answer."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from dataclasses import dataclass, field
from typing import Any

from server_helpers import CHECKPOINT_DIR
from starlette.types import ASGIApp, Message

from dsengine.tokenizer.tokenizer import Tokenizer

MAX_ERROR_BYTES = 4096
# What an error must never show: addresses, paths, names of Python things.
LEAKS = re.compile(r"0x[0-9a-f]{6,}|/(root|home|opt|usr|work|tmp|var|etc)/|\.py\b|Traceback|object at|pydantic|File \"")
_OPENAI_ERROR: dict[str, Any] = {"message": str, "type": str, "param": (str, type(None)), "code": (str, type(None))}
_ANTHROPIC_ERROR: dict[str, Any] = {"message": str, "type": str}


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(CHECKPOINT_DIR)


@dataclass
class Answer:
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        return json.loads(self.body)


async def call(
    app: ASGIApp, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> Answer:
    """One request; the client stays until the answer is complete."""
    fields = {"host": "test", "content-type": "application/json", "content-length": str(len(body))} | (headers or {})
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in fields.items()],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
    answer = Answer()
    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not incoming:
            await asyncio.Event().wait()
        return incoming.pop()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.lower(): value for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    await app(scope, receive, send)
    return answer


def complaint(path: str, answer: Answer, allowed: tuple[int, ...] = (200, 400, 404)) -> str | None:
    """What is wrong with an answer to any input whatever; None if nothing is."""
    if answer.status not in allowed:
        return f"status {answer.status}: {answer.text[:300]}"
    if answer.status < 400:
        failed = re.search(r'"(server_error|api_error)"', answer.text)
        return f"an error inside of the answer: {answer.text[-300:]}" if failed else None
    if len(answer.body) > MAX_ERROR_BYTES:
        return f"an error of {len(answer.body)} bytes"
    if leak := LEAKS.search(answer.text):
        return f"the error shows {leak[0]!r}: {answer.text[:300]}"
    return error_shape(path, answer)


def error_shape(path: str, answer: Answer) -> str | None:
    """What is wrong with the form of an error; None if nothing is."""
    if answer.headers.get(b"content-type") != b"application/json":
        return f"an error of type {answer.headers.get(b'content-type')!r}"
    body, wanted = answer.json(), _OPENAI_ERROR
    if path.startswith("/v1/messages"):
        wanted = _ANTHROPIC_ERROR
        if set(body) != {"type", "error"} or body["type"] != "error":
            return f"no error of Anthropic's shape: {answer.text[:300]}"
    elif set(body) != {"error"}:
        return f"no error of OpenAI's shape: {answer.text[:300]}"
    error = body["error"]
    well_formed = set(error) == set(wanted) and all(isinstance(error[name], kind) for name, kind in wanted.items())
    return None if well_formed and error["message"] else f"fields of the error are not as documented: {error}"
