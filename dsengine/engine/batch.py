"""From the scheduler's decision to the tensors of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from dsengine.engine.request import Request
from dsengine.specdec.shape import TreeShape


class ScheduledRequest(msgspec.Struct, frozen=True):
    """`num_tokens` new tokens of one request, starting at its token `start`.

    Attributes:
        samples: the chunk reaches the request's last token, so that a new token is drawn from its logits.
        awaits_token: the chunk's last token was drawn by the step before this one and has not reached the host yet.
        num_drafts: so many of the tokens, the last ones, are drafts: nodes of a tree whose root is the one before them.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    awaits_token: bool = False
    num_drafts: int = 0

    @property
    def num_output_tokens(self) -> int:
        """Output tokens, the one on its way included, before the token that this chunk samples."""
        return self.start + self.num_tokens - self.num_drafts - self.request.num_prompt_tokens

    @property
    def num_logits(self) -> int:
        """Rows of logits from which tokens are drawn: those of the newest token and of the drafts after it."""
        return 1 + self.num_drafts if self.samples else 0

    @property
    def is_scored(self) -> bool:
        """Tokens of the prompt are scored by what this chunk computes, if any are left after it."""
        return self.request.params.prompt_logprobs is not None and self.start < self.request.num_prompt_tokens

    @property
    def num_scored(self) -> int:
        """Tokens of the chunk that score the next token of the prompt, which the prompt's last one does not."""
        return min(self.num_tokens, self.request.num_prompt_tokens - 1 - self.start) if self.is_scored else 0


@dataclass(frozen=True)
class ScheduledBatch:
    """What one step computes.

    Attributes:
        preempted: requests that lost their blocks and wait again.
        tree: shape of the trees of those requests that have drafts.
        only_proposals: those are chains that grammars propose; there is nothing for a drafter to do.
    """

    requests: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    tree: TreeShape | None = None
    only_proposals: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(r.num_tokens for r in self.requests)

    @property
    def is_empty(self) -> bool:
        return not self.requests
