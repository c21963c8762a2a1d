"""What the log says of requests: everything that helps, nothing that a client wrote, one line each."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import pytest
from server_helpers import MODEL, ScriptedEngine, make_app
from test_front_door import app_of, http_scope, send, tokenizer

from dsengine.config import ServerConfig
from dsengine.server.app import App
from dsengine.server.request_log import FIELDS, _JsonFormatter, _TextFormatter

SECRET = "zebra"
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": SECRET}],
    "temperature": 0.5,
    "seed": 7,
    "stop": [SECRET + "!"],
    "max_tokens": 20,
    "user": SECRET,
}


def fields_of(app: App, caplog: pytest.LogCaptureFixture, path: str, body: Any, **headers: str) -> dict[str, Any]:
    """The fields of the access line of one request, which as a text say the same."""
    caplog.set_level(logging.INFO, "dsengine.access")
    caplog.clear()
    send(app, "POST", path, json=body, headers=headers)
    [record] = [r for r in caplog.records if r.name == "dsengine.access"]
    fields: dict[str, Any] = getattr(record, FIELDS)
    assert json.loads(record.getMessage()) == fields
    return fields


def test_parameters_lengths_and_times_but_no_contents(caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(log_requests=True)
    fields = fields_of(app, caplog, "/v1/chat/completions", CHAT | {"stream": True}, **{"x-request-id": "mine-1"})
    assert fields["request_id"] == "mine-1" and fields["response_id"].startswith("chatcmpl-")
    assert fields["path"] == "/v1/chat/completions" and fields["status"] == 200 and fields["stream"] is True
    assert fields["params"] == {"temperature": 0.5, "seed": 7, "max_tokens": 20, "stop": 1}
    assert fields["finish_reasons"] == ["stop"] and fields["sequences"] == 1 and fields["cached_tokens"] == 3
    assert fields["prompt_tokens"] > 1 and fields["completion_tokens"] > 1
    assert 0 <= fields["queue_ms"] <= fields["first_token_ms"] <= fields["ms"] + 1
    assert SECRET not in json.dumps(fields) and "Hello" not in json.dumps(fields)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [SECRET, SECRET + " two"], "n": 2}),
        ("/v1/responses", {"input": SECRET}),
        ("/v1/messages", {"messages": CHAT["messages"], "max_tokens": 9}),
    ],
)
def test_every_generating_route_is_described(caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any]) -> None:
    fields = fields_of(app_of(log_requests=True), caplog, path, {"model": MODEL} | body)
    assert fields["status"] == 200 and SECRET not in json.dumps(fields)
    assert len(fields["finish_reasons"]) == fields["sequences"] == (4 if "n" in body else 1)
    lengths = [len(tokenizer().encode(text)) for text in body.get("prompt", [])]
    assert not lengths or fields["prompt_tokens"] in (sum(lengths), sum(lengths) + len(lengths))


def test_contents_only_when_asked_for_by_name(caplog: pytest.LogCaptureFixture) -> None:
    fields = fields_of(app_of(log_requests=True, log_requests_contents=True), caplog, "/v1/chat/completions", CHAT)
    [texts] = fields["contents"]
    assert SECRET in texts["prompt"] and texts["output"] == "Hello there."
    with pytest.raises(ValueError, match="log_requests is missing"):
        ServerConfig(log_requests_contents=True)


def test_off_means_the_access_line_alone(caplog: pytest.LogCaptureFixture) -> None:
    fields = fields_of(app_of(), caplog, "/v1/chat/completions", CHAT)
    assert set(fields) == {"method", "path", "status", "ms", "request_id", "client"}


def test_refused_and_failed_requests(caplog: pytest.LogCaptureFixture) -> None:
    fields = fields_of(app_of(log_requests=True), caplog, "/v1/chat/completions", CHAT | {"n": -1})
    assert fields["status"] == 400 and "params" not in fields
    engine = ScriptedEngine(tokenizer())
    engine.die_at = 0
    fields = fields_of(make_app(engine, log_requests=True), caplog, "/v1/chat/completions", CHAT)
    assert fields["status"] == 503 and fields["finish_reasons"] == ["error"] and fields["first_token_ms"] is None


def test_a_client_that_leaves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsengine.access")
    engine = ScriptedEngine(tokenizer())
    engine.hold_at = 2
    app = make_app(engine, log_requests=True)
    body = json.dumps(CHAT | {"stream": True}).encode()

    async def scenario() -> None:
        unsent = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if unsent:
                return unsent.pop()
            while not engine.num_held:
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def drop(message: Any) -> None:
            pass

        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await app(http_scope("/v1/chat/completions", headers=headers), receive, drop)

    asyncio.run(scenario())
    [record] = [r for r in caplog.records if r.name == "dsengine.access"]
    fields = getattr(record, FIELDS)
    assert fields["finish_reasons"] == ["abort"] and fields["completion_tokens"] == 2 and not engine.running


def log_record(message: str, *args: object, **extra: Any) -> logging.LogRecord:
    try:
        raise ValueError("bad\r\n\x1b[31mthing")
    except ValueError:
        record = logging.LogRecord("dsengine.x", logging.WARNING, __file__, 1, message, args, sys.exc_info())
    record.__dict__.update(extra)
    return record


def test_text_lines_cannot_be_forged() -> None:
    text = _TextFormatter().format(log_record("%s said", "a\r\n2026 INFO forged\x1b[2J\x9b\u2028b"))
    first, *traceback = text.split("\n")
    assert first.endswith("WARNING dsengine.x: a\\x0d\\x0a2026 INFO forged\\x1b[2J\\x9b\\u2028b said")
    assert traceback[0].startswith("Traceback") and not any(line.startswith("2026") for line in traceback)
    assert not {"\r", "\x1b", "\x9b", "\u2028"} & set(text)


def test_json_lines_are_one_object_each() -> None:
    line = _JsonFormatter().format(log_record("a\n%s", "\x1b\u2028é"))
    assert line.isascii() and "\n" not in line
    entry = json.loads(line)
    assert entry["message"] == "a\n\x1b\u2028é" and entry["level"] == "warning" and "ValueError" in entry["exception"]
    assert entry["time"].endswith("Z") and entry["logger"] == "dsengine.x"
    entry = json.loads(_JsonFormatter().format(log_record("x", **{FIELDS: {"status": 200}})))
    assert entry["status"] == 200 and "message" not in entry
