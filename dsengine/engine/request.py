"""A request while the engine works on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from dsengine.engine.messages import FinishReason, TokenLogprob
from dsengine.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from dsengine.engine.grammar import GrammarState


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence: a prompt, what has been generated, and where its latents lie in the cache.

    Attributes:
        priority: larger runs first and is preempted last.
        arrival_time: seconds on the caller's clock; the engine never reads a clock of its own.
        cache_salt: requests share cached prefixes only with requests of the same salt.
        eos_token_ids: the model's EOS ids (empty under `ignore_eos`).
        seed: with the position in the output, decides every draw.
        grammar: what the output must follow, and how far it has come.
        proposal: tokens that the grammar leaves little choice about, to be verified in the next step.
        num_computed_tokens: leading tokens of prompt + output whose latents are in the cache.
        block_table: cache blocks that hold those latents, in order; owned by the scheduler.
        num_cached_tokens: prompt tokens found in the prefix cache at first admission.
        queue_seconds: from arrival to first admission; None before.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    arrival_time: float = 0.0
    cache_salt: str = ""
    eos_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    grammar: GrammarState | None = None
    proposal: tuple[int, ...] = ()

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    queue_seconds: float | None = None
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def note_admission(self, now: float) -> None:
        """The request is computed from `now` on; what it waits for after a preemption does not count."""
        if self.queue_seconds is None:
            self.queue_seconds = now - self.arrival_time

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt + output, without copying the rest."""
        split = len(self.prompt_token_ids)
        if stop <= split:
            return self.prompt_token_ids[start:stop]
        if start >= split:
            return self.output_token_ids[start - split : stop - split]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - split]

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED
