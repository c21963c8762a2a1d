"""Every error a client can get, in OpenAI's shape and of bounded size.

Texts are ours: what a library or the engine says goes to the log, not to a client, because such texts carry paths,
addresses and other people's data. The exceptions are messages of our own `ValueError`s, which name the offending value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from dsengine.server.encoding import encode_json

ANTHROPIC_PATH = "/v1/messages"

_MAX_REPORTED_ERRORS = 10
_MAX_ERROR_CHARS = 200
_MAX_MESSAGE_CHARS = 2400
_MAX_MESSAGE_BYTES = 3000  # in JSON, where a character may take six of them
_MAX_PARAM_BYTES = 600

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(HTTPException):
    """An error answer.

    Args:
        status: HTTP status code.
        message: for the client's eyes.
        param: the request field at fault.
        code: a short name that programs can compare.
        retry_after: seconds, for the header of that name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        all_headers = dict(headers or {})
        if retry_after is not None:
            all_headers["Retry-After"] = str(retry_after)
        super().__init__(status, detail=message, headers=all_headers or None)
        self.message = _of_size(shorten(message, _MAX_MESSAGE_CHARS), _MAX_MESSAGE_BYTES)
        self.param = None if param is None else _of_size(shorten(param, _MAX_ERROR_CHARS), _MAX_PARAM_BYTES)
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """The same in the shape of Anthropic's API."""
        kinds = {"service_unavailable_error": "overloaded_error", "server_error": "api_error"}
        kind = self.body()["error"]["type"]
        return {"type": "error", "error": {"type": kinds.get(kind, kind), "message": self.message}}

    def response(self, path: str) -> Response:
        """The answer to a request for this path."""
        body = self.anthropic_body() if path.startswith(ANTHROPIC_PATH) else self.body()
        return Response(encode_json(body), self.status_code, self.headers, "application/json")


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def model_not_found(model: str) -> ApiError:
    message = f"The model {shorten(model, 100)!r} does not exist or is not served here; GET /v1/models lists what is."
    return ApiError(404, message, param="model", code="model_not_found")


def context_length_exceeded(limit: int, asked: str, param: str) -> ApiError:
    message = f"This model's context is {limit} tokens, prompt and output together, but {asked}. Shorten the prompt."
    return ApiError(400, message, param=param, code="context_length_exceeded")


def engine_unavailable() -> ApiError:
    return ApiError(503, "The engine is not available; please try again.", code="engine_unavailable", retry_after=5)


def shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="server_shutting_down", retry_after=10)


def queue_full() -> ApiError:
    message = "The server has as many waiting requests as it accepts; please try again later."
    return ApiError(429, message, code="rate_limit_exceeded", retry_after=1)


def request_failed() -> ApiError:
    return ApiError(500, "The engine could not complete this request.", code="request_failed")


def grammar_too_slow() -> ApiError:
    message = "The output cannot be constrained as asked: the grammar is too ambiguous to be followed in time."
    return ApiError(400, message, code="grammar_too_complex")


def request_aborted() -> ApiError:
    return ApiError(503, "The request was ended by an administrator of the server.", code="request_aborted")


def under_maintenance() -> ApiError:
    message = "The server is being maintained; please try again later."
    return ApiError(503, message, code="under_maintenance", retry_after=5)


def asleep() -> ApiError:
    return ApiError(503, "The model is asleep; an administrator can wake it.", code="model_asleep", retry_after=30)


def internal_error() -> ApiError:
    return ApiError(500, "The server met an internal error.", code="internal_error")


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters of a text that can be encoded."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _of_size(text: str, limit: int) -> str:
    """At most `limit` bytes of JSON, of a text that can be encoded."""
    while len(encode_json(text)) > limit:
        text = text[: len(text) * 3 // 4] + "…"
    return text


def validation_failed(errors: Sequence[Any]) -> ApiError:
    """The 400 of a body whose fields are not as the protocol has them: at most ten errors are reported."""
    errors = _of_best_members(errors)
    lines = list(dict.fromkeys(_describe(error) for error in errors[:_MAX_REPORTED_ERRORS]))
    if len(errors) > _MAX_REPORTED_ERRORS:
        lines.append(f"and {len(errors) - _MAX_REPORTED_ERRORS} more")
    first = errors[0]
    unknown = first["type"] == "extra_forbidden"
    return invalid("; ".join(lines), _location(first) or None, "unknown_field" if unknown else "invalid_value")


def _of_best_members(errors: Sequence[Any]) -> list[Any]:
    """Of a field that may be of several kinds, what is wrong with those that fit best: that got furthest into it."""
    by_field: dict[Any, list[Any]] = {}
    for error in errors:
        path = [part for part in error["loc"] if part != "body"]
        by_field.setdefault(path[0] if path else "", []).append(error)
    kept = []
    for found in by_field.values():
        depth = max(len(error["loc"]) for error in found)
        has_kinds = any(_is_union_member(part) for error in found for part in error["loc"])
        kept += [error for error in found if len(error["loc"]) == depth] if has_kinds else found
    return kept


def _describe(error: Any) -> str:
    where = _location(error)
    if error["type"] == "extra_forbidden":
        return shorten(f"unrecognized field: {where}", _MAX_ERROR_CHARS)
    message = str(error["msg"])
    named = not where or message.startswith(where)
    return shorten(message if named else f"{where}: {message}", _MAX_ERROR_CHARS)


def _location(error: Any) -> str:
    """The field at fault, as in `messages.0.content`."""
    *path, last = error["loc"] or ("",)
    # FastAPI puts "body" first; the names of union members ("list[str]") are no part of a client's request. What a
    # client called an unknown field comes last and stays.
    parts = [part for part in path if part != "body" and not _is_union_member(part)]
    if error["type"] == "extra_forbidden" or not _is_union_member(last):
        parts.append(last)
    parts += [name for name in [error.get("ctx", {}).get("param")] if name is not None]
    return ".".join(shorten(str(part), 64) for part in parts[:8] if part not in ("", "body"))


def _is_union_member(part: object) -> bool:
    # Fields are in lower case, so that what begins with a capital is the name of one of our models.
    prefixes = ("list[", "dict[", "literal[", "constrained-", "function-")
    return isinstance(part, str) and (part == "str" or part.startswith(prefixes) or part[:1].isupper())


async def handle_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        texts = {404: "There is no such route.", 405: "This route does not answer that method."}
        text = texts.get(error.status_code, "The request cannot be handled.")
        code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        error = ApiError(error.status_code, text, code=code, headers=dict(error.headers or {}))
    return error.response(request.scope["path"])


async def handle_unexpected(request: Request, error: Exception) -> Response:
    """The answer to a bug; what it was goes to the log only."""
    return internal_error().response(request.scope["path"])


async def handle_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_failed(error.errors()).response(request.scope["path"])
