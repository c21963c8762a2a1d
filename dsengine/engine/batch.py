"""From the scheduler's decision to the tensors of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsengine.engine.request import Request


@dataclass(frozen=True)
class ScheduledRequest:
    """`num_tokens` new tokens of one request, starting at its token `start`.

    Attributes:
        samples: the chunk reaches the request's last known token, so that a new token is drawn from its logits.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True)
class ScheduledBatch:
    """What one step computes. `preempted` requests lost their blocks and wait again."""

    requests: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(r.num_tokens for r in self.requests)

    @property
    def is_empty(self) -> bool:
        return not self.requests
