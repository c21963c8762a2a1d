"""Traces as a collector gets them: from a real server process, over a socket, decoded from their protobuf."""

from __future__ import annotations

import builtins
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from server_process import ServerProcess, free_port, wait_until

from dsengine.config import ServerConfig
from dsengine.server.tracing import Tracer

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
SECRET = "347 + 285"


class Collector:
    """Takes what exporters post to /v1/traces."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf":
                    collector.bodies.append(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def spans(self) -> list[Span]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        scopes = [scope for r in requests for resource in r.resource_spans for scope in resource.scope_spans]
        return [span for scope in scopes for span in scope.spans]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    opened = Collector()
    yield opened
    opened.close()


def attributes(span: Span) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(v) for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {item.key: plain(item.value) for item in span.attributes}


def test_requests_become_traces(collector: Collector, tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, "--otlp-traces-endpoint", collector.url, "--log-format", "json", "--log-requests")
    try:
        server.wait_ready()
        ask(server)
        server.process.terminate()
        assert server.process.wait(30) == 0
    finally:
        server.close()
    check_spans(collector)
    # The ready line is standard output; everything else in the file is the log.
    lines = [json.loads(line) for line in server.log_text().splitlines() if not line.startswith("dsengine serves")]
    [chat] = [line for line in lines if line.get("request_id") == "id-chat"]
    assert chat["finish_reasons"] == ["length"] and chat["completion_tokens"] == 5 and chat["level"] == "info"
    assert SECRET not in server.log_text()


def ask(server: ServerProcess) -> None:
    chat = {"model": "dsengine-demo", "messages": [{"role": "user", "content": f"What is {SECRET}?"}], "max_tokens": 5}
    url = server.url + "/v1/chat/completions"
    headers = {"traceparent": PARENT, "tracestate": "vendor=1", "x-request-id": "id-chat"}
    assert (
        httpx.post(url, json=chat | {"temperature": 0, "stream": True}, headers=headers, timeout=60).status_code == 200
    )
    completion = {"model": "dsengine-demo", "prompt": SECRET, "n": 2, "max_tokens": 3}
    assert httpx.post(server.url + "/v1/completions", json=completion, timeout=60).status_code == 200
    headers = {"traceparent": "00-zz-1", "x-request-id": "bad id\x7f"}
    assert httpx.post(url, json=chat | {"model": SECRET}, headers=headers, timeout=60).status_code == 404
    assert httpx.get(server.url + "/metrics", timeout=60).status_code == 200


def check_spans(collector: Collector) -> None:
    spans = collector.spans()
    roots = {span.name: span for span in spans if span.kind == Span.SPAN_KIND_SERVER}
    assert set(roots) == {"chat dsengine-demo", "text_completion dsengine-demo", "chat"}
    chat = roots["chat dsengine-demo"]
    assert chat.trace_id.hex() == TRACE_ID and chat.parent_span_id.hex() == "00f067aa0ba902b7"
    assert chat.trace_state == "vendor=1"
    said = attributes(chat)
    assert said["gen_ai.operation.name"] == "chat" and said["gen_ai.request.max_tokens"] == 5
    assert said["gen_ai.request.temperature"] == 0.0 and said["gen_ai.request.id"] == "id-chat"
    assert said["gen_ai.usage.output_tokens"] == 5 and said["gen_ai.usage.input_tokens"] == 16
    assert said["gen_ai.response.finish_reasons"] == ["length"] and said["http.response.status_code"] == 200
    assert 0 <= said["gen_ai.latency.time_in_queue"] <= said["gen_ai.latency.time_to_first_token"]
    assert said["gen_ai.latency.time_to_first_token"] < said["gen_ai.latency.e2e"]
    check_phases(chat, [span for span in spans if span.parent_span_id == chat.span_id])

    completion = roots["text_completion dsengine-demo"]
    assert completion.trace_id != chat.trace_id and not completion.parent_span_id
    children = [span for span in spans if span.parent_span_id == completion.span_id]
    assert sorted(attributes(span)["dsengine.sequence"] for span in children) == [0, 0, 0, 1, 1, 1]
    said = attributes(completion)
    assert said["gen_ai.usage.output_tokens"] == 6 and said["gen_ai.request.choice.count"] == 2

    refused = roots["chat"]
    assert refused.trace_id.hex() != TRACE_ID and attributes(refused)["http.response.status_code"] == 404
    assert SECRET.encode() not in b"".join(collector.bodies)


def check_phases(parent: Span, phases: list[Span]) -> None:
    """Queue, prefill and decode follow each other within the request."""
    queue, prefill, decode = (next(span for span in phases if span.name == n) for n in ("queue", "prefill", "decode"))
    assert len(phases) == 3
    moments = [parent.start_time_unix_nano, queue.start_time_unix_nano, queue.end_time_unix_nano,
               prefill.end_time_unix_nano, decode.end_time_unix_nano, parent.end_time_unix_nano]  # fmt: skip
    assert moments == sorted(moments)
    assert prefill.start_time_unix_nano == queue.end_time_unix_nano
    assert attributes(prefill)["gen_ai.usage.input_tokens"] == 16
    assert attributes(decode)["gen_ai.response.finish_reasons"] == ["length"]


def test_a_collector_that_is_not_there_costs_nobody_a_request(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, "--otlp-traces-endpoint", f"http://127.0.0.1:{free_port()}")
    try:
        server.wait_ready()
        body = {"model": "dsengine-demo", "prompt": "1, 2,", "max_tokens": 2}
        for _ in range(3):
            assert httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code == 200
        server.process.terminate()
        wait_until(lambda: server.process.poll() is not None, 60, server.log_text)
        assert server.process.returncode == 0
    finally:
        server.close()


def test_without_the_libraries_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def absent(name: str, *args: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"pip install 'dsengine\[otel\]'"):
        Tracer("http://127.0.0.1:4318")


def test_the_endpoint_is_checked() -> None:
    with pytest.raises(ValueError, match=r"otlp_traces_endpoint is 'host:4318'; it must begin with http"):
        ServerConfig(otlp_traces_endpoint="host:4318")
