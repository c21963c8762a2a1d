"""The wire of the load generator: one streamed request, timed event by event.

It speaks plain OpenAI over httpx, so that it measures any server alike, and does as little as it can between reading a
chunk and noting the time.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True)
class Call:
    """One request to be sent.

    Attributes:
        prompt: text, or token ids (completions only).
        arrival: seconds after the start of the run at which it is due; 0 when only concurrency paces the run.
    """

    prompt: str | list[int]
    arrival: float = 0.0


@dataclass
class Record:
    """What became of a request. Times are seconds since the start of the run.

    Attributes:
        start: when the request was due; waiting for a free slot in front of an open-loop run counts as latency.
        chunk_times: arrival of each chunk that carried text.
        output_tokens: as the server counts them, or the number of chunks where it does not say.
    """

    start: float
    end: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return (self.chunk_times[0] if self.chunk_times else self.end) - self.start

    @property
    def latency(self) -> float:
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """Mean seconds per output token after the first; None with fewer than two tokens."""
        if self.output_tokens < 2 or not self.chunk_times:
            return None
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between successive chunks."""
        return [later - sooner for sooner, later in zip(self.chunk_times, self.chunk_times[1:], strict=False)]


@dataclass(frozen=True)
class Target:
    """Where requests go and what they ask for.

    Attributes:
        endpoint: "completions" or "chat".
        options: further fields of every request, as in `{"temperature": 0}`.
    """

    base_url: str
    model: str
    endpoint: str
    output_len: int
    ignore_eos: bool
    options: dict[str, Any]
    api_key: str | None = None

    def http(self) -> httpx.AsyncClient:
        """A client that never queues a request behind another."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(30.0, read=None, pool=None)
        return httpx.AsyncClient(base_url=self.base_url + "/v1/", headers=headers, limits=limits, timeout=timeout)

    def path(self) -> str:
        return "completions" if self.endpoint == "completions" else "chat/completions"

    def body(self, prompt: str | list[int], output_len: int | None = None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_len or self.output_len,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.options,
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.endpoint == "completions":
            body["prompt"] = prompt
        else:
            body["messages"] = [{"role": "user", "content": prompt}]
        return body


async def send(http: httpx.AsyncClient, target: Target, call: Call, epoch: float) -> Record:
    """Send one request, read its stream to the end, and note the times. Errors are recorded, never raised.

    Args:
        epoch: `time.perf_counter()` at the start of the run.
    """
    record = Record(start=call.arrival or time.perf_counter() - epoch)
    try:
        async with http.stream("POST", target.path(), json=target.body(call.prompt)) as response:
            if response.status_code != 200:
                await response.aread()
                record.error = f"HTTP {response.status_code}: {response.text[:200]}"
            else:
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        _read_event(line[5:].strip(), time.perf_counter() - epoch, record)
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}"
    record.end = time.perf_counter() - epoch
    if record.error is None and record.finish_reason is None:
        record.error = "the stream ended without a finish_reason"
    record.output_tokens = record.output_tokens or len(record.chunk_times)
    return record


def _read_event(data: str, now: float, record: Record) -> None:
    if data == "[DONE]":
        return
    event = json.loads(data)
    if "error" in event:
        record.error = str(event["error"])[:200]
        return
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
            record.chunk_times.append(now)
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
    usage = event.get("usage")
    if usage:
        record.prompt_tokens = usage.get("prompt_tokens", 0)
        record.output_tokens = usage.get("completion_tokens", 0)
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
