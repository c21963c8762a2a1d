"""What every request passes before it reaches a route: key, limits, draining, log and counts.

Plain ASGI, deciding on `scope["path"]` only: frameworks rebuild URLs from the Host header, which a client writes, and
keys have been bypassed that way.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Collection, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsengine.server.errors import ApiError, internal_error, invalid, shutting_down
from dsengine.server.lifecycle import Lifecycle
from dsengine.server.metrics import ADMIN_ROUTES, CLIENT_CLOSED_REQUEST, Metrics
from dsengine.server.request_log import FIELDS
from dsengine.server.request_watch import RequestWatch

access_log = logging.getLogger("dsengine.access")
logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
ADMIN_PATHS = frozenset(ADMIN_ROUTES)
_WHILE_DRAINING = frozenset({"/health", "/metrics"})
# Asked every second or so by probes, Prometheus and the web page: their successes are no news.
_POLLED = frozenset({"/health", "/metrics"})
KEY_DIGEST = "dsengine.key_digest"
MAX_HEADERS = 100
MAX_HEADER_BYTES = 64 * 1024
BODY_SECONDS = 30.0
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class FrontDoor:
    """Outermost application.

    Args:
        api_keys: every path but /health and `open_paths` needs one of them, unless there is none. The digest of the key
            that a request came with is left in its scope, under `KEY_DIGEST`.
        admin_api_key: the admin routes need this one instead; None: there are none.
        max_body_bytes: larger bodies are refused while they stream in.
        open_paths: paths that need no key, whatever is asked of them.
        watch: of requests on generating routes, for the log and for traces.
    """

    def __init__(
        self,
        app: ASGIApp,
        lifecycle: Lifecycle,
        metrics: Metrics,
        *,
        api_keys: Sequence[str],
        admin_api_key: str | None,
        max_body_bytes: int,
        open_paths: Collection[str],
        watch: RequestWatch,
    ) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._key_digests = [_digest(key.encode()) for key in api_keys]
        self._admin_digests = [] if admin_api_key is None else [_digest(admin_api_key.encode())]
        self._max_body_bytes = max_body_bytes
        self._open_paths = OPEN_PATHS | frozenset(open_paths)
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        with self._lifecycle.request():
            exchange = _Exchange(scope, send)
            record = self._watch.begin(scope, exchange.request_id)
            try:
                await self._handle(scope, receive, exchange)
            finally:
                self._metrics.response(scope["path"], exchange.status)
                details = {} if record is None else self._watch.end(record, exchange.final_status)
                exchange.log(details)

    async def _handle(self, scope: Scope, receive: Receive, exchange: _Exchange) -> None:
        try:
            self._admit(scope)
            limited = _LimitedBody(receive, self._max_body_bytes)
            await self._app(scope, limited.receive, exchange.send)
        except ApiError as error:
            await exchange.fail(error, scope, receive)
        except Exception:
            logger.exception("an error that no handler expected")
            await exchange.fail(internal_error(), scope, receive)

    def _admit(self, scope: Scope) -> None:
        path, headers = scope["path"], scope["headers"]
        _check_header_size(headers)
        if path not in self._open_paths:
            is_admin = path in ADMIN_PATHS and self._admin_digests
            scope[KEY_DIGEST] = _authenticate(headers, self._admin_digests if is_admin else self._key_digests)
        if self._lifecycle.draining and path not in _WHILE_DRAINING:
            raise shutting_down()
        _check_content(headers, self._max_body_bytes)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _authenticate(headers: list[tuple[bytes, bytes]], wanted: Sequence[bytes]) -> bytes:
    """The digest of the key given; empty where none is wanted."""
    if not wanted:
        return b""
    given = _digest(_given_key(headers))
    matches = [hmac.compare_digest(given, digest) for digest in wanted]  # all of them, in the same time
    if not any(matches):
        message = "A valid API key is required: send it as 'Authorization: Bearer KEY'."
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    return given


def _given_key(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The bearer token or, as Anthropic's clients send it, the x-api-key; nothing if there is not exactly one."""
    given = [(name, value) for name, value in headers if name in (b"authorization", b"x-api-key")]
    if len(given) != 1:
        return b""
    [(name, value)] = given
    if name == b"x-api-key":
        return value.strip()
    scheme, _, key = value.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _check_header_size(headers: list[tuple[bytes, bytes]]) -> None:
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        message = f"The request has more than {MAX_HEADERS} header fields or {MAX_HEADER_BYTES} bytes of them."
        raise ApiError(431, message, code="headers_too_large")


def _check_content(headers: list[tuple[bytes, bytes]], max_body_bytes: int) -> None:
    fields = dict(headers)
    if b"content-length" in fields and b"transfer-encoding" in fields:
        # Whoever stands before us may have believed the other one, and taken the rest for a request of its own.
        message = "The request has both a Content-Length and a Transfer-Encoding."
        raise ApiError(400, message, code="bad_request", headers={"Connection": "close"})
    length = fields.get(b"content-length", b"0")
    if not length.isdigit():
        raise invalid("The Content-Length header is not a number.", code="bad_request")
    if len(length) > 18 or int(length) > max_body_bytes:
        raise _body_too_large(max_body_bytes)
    if fields.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ApiError(415, "Compressed bodies are not accepted.", code="unsupported_content_encoding")
    if int(length) > 0 or b"transfer-encoding" in fields:
        _check_content_type(fields.get(b"content-type", b""))


def _check_content_type(value: bytes) -> None:
    kind, *parameters = (part.strip().lower() for part in value.split(b";"))
    charset = dict(p.partition(b"=")[::2] for p in parameters).get(b"charset", b"utf-8").strip(b'"')
    if kind != b"application/json" or charset not in (b"utf-8", b"utf8"):
        raise ApiError(415, "The body must be sent as application/json in UTF-8.", code="unsupported_media_type")


def _body_too_large(limit: int) -> ApiError:
    message = f"The body is larger than {limit} bytes, which is this server's limit."
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


class _LimitedBody:
    """Counts the bytes of a body as they arrive, and how long that takes."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._deadline = time.monotonic() + BODY_SECONDS
        self._size = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(max(self._deadline - time.monotonic(), 0.0)):
                message = await self._receive()
        except TimeoutError as error:
            message_text = f"The body did not arrive within {BODY_SECONDS:.0f} seconds."
            raise ApiError(408, message_text, code="body_timeout", headers={"Connection": "close"}) from error
        self._size += len(message.get("body", b""))
        if self._size > self._max_bytes:
            raise _body_too_large(self._max_bytes)
        self._complete = not message.get("more_body", False)
        return message


class _Exchange:
    """One request and what was answered to it."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.status: int | None = None
        self._scope = scope
        self._send = send
        self._started = time.monotonic()
        self.request_id = _request_id(scope)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    async def fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Answer with an error, unless an answer has begun: then the connection is closed by the server under us."""
        if self.status is None:
            await error.response(scope["path"])(scope, receive, self.send)

    @property
    def final_status(self) -> int:
        return CLIENT_CLOSED_REQUEST if self.status is None else self.status

    def log(self, details: dict[str, Any]) -> None:
        # JSON escapes what a client may have put into the path to forge lines of the log.
        client = self._scope.get("client")
        entry = {
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self.final_status,
            "ms": round((time.monotonic() - self._started) * 1000, 1),
            "request_id": self.request_id,
            "client": client[0] if client else None,
            **details,
        }
        level = logging.DEBUG if self.status == 200 and self._scope["path"] in _POLLED else logging.INFO
        access_log.log(level, json.dumps(entry), extra={FIELDS: entry})


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return uuid.uuid4().hex
