"""What attention groups that step together know of each other's steps.

All groups meet in every MoE layer, so that a captured step is replayed by all of them or by none, and in one size: the
one that holds the requests of the largest group. The others fill up with padding; one without requests is nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dsengine.engine.batch import ScheduledBatch, ScheduledRequest
from dsengine.specdec.shape import TreeShape

# In place of a kind's number, where ranks tell each other what they have scheduled.
_IDLE = 0
_UNLIKE = -1


class StepKind(NamedTuple):
    """Steps that one captured function computes: every request brings as many new tokens and wants all their logits.

    Attributes:
        tokens_per_request: 1 for decode, more to verify drafts.
        has_branches: these tokens form trees rather than chains.
    """

    tokens_per_request: int
    has_branches: bool

    @classmethod
    def of_trees(cls, shape: TreeShape) -> StepKind:
        """The kind of a step that verifies trees of this shape and nothing else."""
        return cls(shape.num_nodes, shape.topk > 1)


DECODE = StepKind(1, False)


@dataclass(frozen=True)
class LockStep:
    """One step of all attention groups, as every rank knows it.

    Attributes:
        rank_tokens: of each group; any may be 0.
        kind: of the steps of all groups that have requests; None: they differ, or one of them is of no kind.
        most_requests: of any group.
        rank_logits: rows of logits from which each group draws tokens.
        rank_scored: tokens of prompts that each group scores.
        most_trees: that the drafter grows for any group.
        samples: a request that is drafted for samples, in any group.
    """

    rank_tokens: tuple[int, ...]
    kind: StepKind | None
    most_requests: int
    rank_logits: tuple[int, ...]
    rank_scored: tuple[int, ...]
    most_trees: int = 0
    samples: bool = False

    @classmethod
    def of(cls, groups: Sequence[Summary]) -> LockStep:
        """What follows from the summaries of all groups."""
        kinds = {group.kind for group in groups if group.kind != _IDLE}
        code = kinds.pop() if len(kinds) == 1 else _UNLIKE
        return cls(
            rank_tokens=tuple(group.tokens for group in groups),
            kind=None if code == _UNLIKE else StepKind(code // 2, code % 2 == 1),
            most_requests=max(group.requests for group in groups),
            rank_logits=tuple(group.logits for group in groups),
            rank_scored=tuple(group.scored for group in groups),
            most_trees=max(group.trees for group in groups),
            samples=any(group.samples for group in groups),
        )


class Summary(NamedTuple):
    """What the other groups must know of one's step.

    Attributes:
        kind: its number.
        logits: rows of them from which tokens are drawn.
        scored: tokens of prompts.
        trees: that the drafter grows.
        samples: 1 where one of their requests does.
    """

    tokens: int
    requests: int
    kind: int
    logits: int
    scored: int
    trees: int
    samples: int


def summary(batch: ScheduledBatch) -> Summary:
    """What to tell the other groups of a step."""
    kind = _kind_of(batch)
    code = _IDLE if batch.is_empty else _UNLIKE if kind is None else 2 * kind.tokens_per_request + kind.has_branches
    drafted = [] if batch.only_proposals else [s.request for s in batch.requests if s.num_drafts]
    samples = any(request.params.temperature > 0 for request in drafted)
    return Summary(
        tokens=batch.num_tokens,
        requests=len(batch.requests),
        kind=code,
        logits=sum(s.num_logits for s in batch.requests),
        scored=sum(s.num_scored for s in batch.requests),
        trees=len(drafted),
        samples=int(samples),
    )


def _kind_of(batch: ScheduledBatch) -> StepKind | None:
    has_trees = batch.tree is not None and any(s.num_drafts for s in batch.requests)
    kind = StepKind.of_trees(batch.tree) if batch.tree is not None and has_trees else DECODE
    return kind if all(_is_of(kind, s) for s in batch.requests) else None


def _is_of(kind: StepKind, scheduled: ScheduledRequest) -> bool:
    request, per_request = scheduled.request, kind.tokens_per_request
    return (
        scheduled.samples
        and scheduled.num_tokens == per_request
        and scheduled.num_drafts == per_request - 1
        and (request.params.prompt_logprobs is None or scheduled.start >= request.num_prompt_tokens)
    )
