"""What is known of one request when it has ended: the matter of its log line and of its trace.

A record is kept only where somebody will read it; texts are kept only where they are asked for by name.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from dsengine.engine.sampling_params import SamplingParams
from dsengine.server.metrics import SequenceTimer

RECORD = "dsengine.record"


@dataclass
class SequenceTexts:
    prompt_token_ids: list[int]
    output: str


@dataclass
class RequestRecord:
    """One HTTP request on a generating route.

    Attributes:
        headers: as they came, names in lower case.
        started: of the monotonic clock, and `started_ns` the same moment in Unix time.
        response_id: what the client knows the answer by; None if it came to none.
        sequences: one per prompt and continuation that was given to the engine.
        texts: of those that ended, where `keeps_texts`.
    """

    request_id: str
    path: str
    headers: list[tuple[bytes, bytes]]
    keeps_texts: bool = False
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)
    ended: float = 0.0
    status: int = 0
    model: str | None = None
    response_id: str | None = None
    stream: bool = False
    params: SamplingParams | None = None
    sequences: list[SequenceTimer] = field(default_factory=list)
    texts: list[SequenceTexts] = field(default_factory=list)

    def begin(self, response_id: str, model: str, params: SamplingParams, *, stream: bool) -> None:
        """The request was found good and is given to the engine."""
        self.response_id, self.model, self.params, self.stream = response_id, model, params, stream

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once whatever its continuations."""
        n = self.params.n if self.params is not None else 1
        return sum(sequence.num_prompt_tokens for sequence in self.sequences[::n])

    @property
    def completion_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)

    @property
    def cached_tokens(self) -> int:
        n = self.params.n if self.params is not None else 1
        return sum(sequence.cached_tokens for sequence in self.sequences[::n])

    @property
    def finish_reasons(self) -> list[str]:
        return [sequence.finish_reason for sequence in self.sequences if sequence.finish_reason is not None]

    @property
    def first_token(self) -> float | None:
        """When the first of all tokens came, on the monotonic clock."""
        return min((s.first_token for s in self.sequences if s.first_token is not None), default=None)

    def header(self, name: bytes) -> str | None:
        """The value of a header that came exactly once."""
        values = [value for key, value in self.headers if key == name]
        return values[0].decode("latin-1") if len(values) == 1 else None
