"""What the published OpenAPI document says beyond the requests: how errors look, and which answers are streams."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

Responses = dict[int | str, dict[str, Any]]

_MAX_INT64 = 2**63 - 1
_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _errors(schema: dict[str, Any]) -> Responses:
    content = {"application/json": {"schema": schema}}
    return {
        "4XX": {"description": "The request is refused; the message names the value at fault.", "content": content},
        "5XX": {"description": "The server or its engine failed, or is being shut down.", "content": content},
    }


# For all routes but Anthropic's.
ERRORS = _errors(_object(error=_object(message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL)))
ANTHROPIC_ERRORS = _errors(_object(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT)))
STREAM: Responses = {
    200: {
        "description": "The answer, as one document or, with stream: true, as server-sent events.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": _TEXT}},
    }
}
METRICS: Responses = {200: {"description": "Metrics for Prometheus.", "content": {"text/plain": {"schema": _TEXT}}}}


class DocumentedApp(FastAPI):
    """Publishes the bounds of integers as they are: FastAPI keeps them as floats, so that 2^63 - 1 became 2^63."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = _with_exact_bounds(super().openapi())
        return self.openapi_schema


def _with_exact_bounds(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_exact_bounds(item) for item in value]
    if not isinstance(value, dict):
        return value
    exact = {name: _with_exact_bounds(item) for name, item in value.items()}
    if value.get("type") == "integer":
        for name in {"minimum", "maximum"} & set(value):
            exact[name] = min(int(value[name]), _MAX_INT64)
    if "patternProperties" in value:  # keys of another form are refused, which pydantic does not publish
        exact.setdefault("additionalProperties", False)
    return exact
