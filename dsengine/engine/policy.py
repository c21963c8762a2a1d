"""The scheduler's choices as pure functions and plain numbers, apart from its bookkeeping."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits and weights of the scheduler.

    Attributes:
        block_size: tokens per cache block.
        max_running_requests: requests computed at the same time.
        token_budget: tokens computed in one step. It also bounds the running requests, so that each can get a token.
        context_length: longest prompt + output in tokens.
        waiting_window: so many waiting requests are looked at in one step.
        cache_hit_credit: seconds of waiting that a wholly cached prompt is worth when requests of one priority are
            ordered; a partly cached one gets its share.
        max_overtakes: after so many younger requests of its priority were admitted first, a request's turn has come.
        decode_reserve_tokens: a new request is admitted only if each running one could still grow by this many tokens.
        lookahead: tokens after a block that what is cached of it depends on: 1 where the NextN layer drafts.

    Raises:
        ValueError: a value is out of range.
    """

    block_size: int
    max_running_requests: int
    token_budget: int
    context_length: int
    waiting_window: int = 64
    cache_hit_credit: float = 1.0
    max_overtakes: int = 256
    decode_reserve_tokens: int = 64
    lookahead: int = 0

    def __post_init__(self) -> None:
        for name in ("block_size", "max_running_requests", "token_budget", "waiting_window"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.context_length < 2:
            raise ValueError(f"context_length is {self.context_length}; a prompt and an output token need at least 2")
        for name in ("cache_hit_credit", "max_overtakes", "decode_reserve_tokens"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be a finite number and not negative")

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)


def check_prompt_length(length: int, config: SchedulerConfig, num_blocks: int) -> None:
    """Prove that a prompt of so many tokens can run in a cache of so many blocks.

    Raises:
        ValueError: it is empty or can never fit.
    """
    held = num_blocks * config.block_size
    if length < 1:
        raise ValueError("the prompt is empty; it needs at least one token")
    if length > config.context_length - 1:
        raise ValueError(
            f"the prompt has {length} tokens; the context holds {config.context_length}, "
            "of which one is needed for the output"
        )
    if length > held - 1:
        raise ValueError(
            f"the prompt has {length} tokens; the cache holds {held} ({num_blocks} blocks of {config.block_size}), "
            "of which one is needed for the output"
        )


def admission_score(waited: float, cached_fraction: float, credit: float, *, must_go: bool) -> float:
    """Rank of a waiting request among those of its priority: the largest goes first, ties by arrival.

    A cached prefix saves prefill work and may be evicted while its request waits, so it counts like `credit` seconds
    of waiting, in proportion to the cached part. Whoever arrives more than `credit` seconds later can therefore never
    overtake; and as clocks may stand still, being overtaken too often (`must_go`) ends it as well.

    Args:
        waited: seconds since arrival.
        cached_fraction: cached part of the tokens to compute, in [0, 1].
        credit: seconds that a fully cached prompt is worth.
        must_go: the request resumes after a preemption, or was overtaken often enough.
    """
    return math.inf if must_go else waited + credit * cached_fraction
