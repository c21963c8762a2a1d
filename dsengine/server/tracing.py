"""Traces of requests for OpenTelemetry's collectors, over OTLP and HTTP.

Spans are made when a request has ended, from its record: nothing is added to the way of a token, and without
`--otlp-traces-endpoint` no SDK is imported. Attributes are named by OpenTelemetry's conventions
for generative AI, and vLLM's where there is no convention. No span holds a word of a prompt or of an answer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dsengine import __version__
from dsengine.server.metrics import SequenceTimer
from dsengine.server.request_record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.context import Context

_EXPORT_SECONDS = 5.0
_MAX_TRACESTATE_CHARS = 512
_OPERATIONS = {"/v1/completions": "text_completion"}
_PARAMS = {
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "max_tokens": "gen_ai.request.max_tokens",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
}


class Tracer:
    """Sends one trace per generating request.

    Args:
        endpoint: of an OTLP collector; an address without a path gets the standard one, /v1/traces.

    Raises:
        ValueError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ValueError(
                f"otlp_traces_endpoint needs OpenTelemetry ({error}): pip install 'dsengine[otel]'"
            ) from error
        url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
        resource = Resource.create({"service.name": "dsengine", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._exporter = OTLPSpanExporter(endpoint=url, timeout=_EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("dsengine", __version__)
        self._propagator = TraceContextTextMapPropagator()

    async def close(self) -> None:
        """Send what has not been sent yet, as far as the collector takes it in a few seconds."""
        closing = asyncio.create_task(asyncio.to_thread(self._provider.shutdown))
        await asyncio.wait((closing,), timeout=_EXPORT_SECONDS)
        if not closing.done():
            self._exporter.shutdown()
        await closing

    def trace(self, record: RequestRecord) -> None:
        """Make the spans of a request that has ended."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        operation = _OPERATIONS.get(record.path, "chat")
        span = self._tracer.start_span(
            f"{operation} {record.model}" if record.model else operation,
            context=self._parent(record),
            kind=SpanKind.SERVER,
            attributes={"gen_ai.operation.name": operation, **_request_attributes(record)},
            start_time=_unix_ns(record, record.started),
        )
        inside = set_span_in_context(span)
        for index, sequence in enumerate(record.sequences):
            self._trace_sequence(record, index, sequence, inside)
        if record.status >= 500 or "error" in record.finish_reasons:
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("error.type", str(record.status) if record.status >= 500 else "engine")
        span.end(_unix_ns(record, record.ended))

    def _parent(self, record: RequestRecord) -> Context:
        """The span of the client's that this request belongs to, if it says so in one well-formed header."""
        carrier = {}
        if (parent := record.header(b"traceparent")) is not None:
            carrier["traceparent"] = parent
        state = record.header(b"tracestate")
        if state is not None and len(state) <= _MAX_TRACESTATE_CHARS:
            carrier["tracestate"] = state
        return self._propagator.extract(carrier)

    def _trace_sequence(self, record: RequestRecord, index: int, sequence: SequenceTimer, inside: Context) -> None:
        """Waiting, reading the prompt and writing, one after the other."""
        end = sequence.ended if sequence.ended is not None else record.ended
        first = sequence.first_token
        if first is None:
            self._child("queue", index, (sequence.started, end), record, inside, {})
            return
        run = min(sequence.started + sequence.queue_seconds, first)
        self._child("queue", index, (sequence.started, run), record, inside, {})
        prompt = {
            "gen_ai.usage.input_tokens": sequence.num_prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": sequence.cached_tokens,
        }
        self._child("prefill", index, (run, first), record, inside, prompt)
        output: dict[str, Any] = {"gen_ai.usage.output_tokens": sequence.num_tokens}
        if sequence.finish_reason is not None:
            output["gen_ai.response.finish_reasons"] = (sequence.finish_reason,)
        self._child("decode", index, (first, end), record, inside, output)

    def _child(
        self,
        name: str,
        index: int,
        times: tuple[float, float],
        record: RequestRecord,
        inside: Context,
        attributes: dict[str, Any],
    ) -> None:
        start, end = (_unix_ns(record, moment) for moment in times)
        attributes = {"dsengine.sequence": index, **attributes}
        self._tracer.start_span(name, context=inside, start_time=start, attributes=attributes).end(end)


def _request_attributes(record: RequestRecord) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.provider.name": "dsengine",
        "gen_ai.request.id": record.request_id,
        "http.request.method": "POST",
        "url.path": record.path,
        "http.response.status_code": record.status,
        "gen_ai.latency.e2e": record.ended - record.started,
    }
    if record.params is None or record.model is None or record.response_id is None:
        return attributes
    for name, attribute in _PARAMS.items():
        if (value := getattr(record.params, name)) is not None:
            attributes[attribute] = value
    attributes |= {
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.response.id": record.response_id,
        "gen_ai.response.finish_reasons": tuple(record.finish_reasons),
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.latency.time_in_queue": max((s.queue_seconds for s in record.sequences), default=0.0),
    }
    if (first := record.first_token) is not None:
        attributes["gen_ai.latency.time_to_first_token"] = first - record.started
    return attributes


def _unix_ns(record: RequestRecord, moment: float) -> int:
    return record.started_ns + int((moment - record.started) * 1e9)
