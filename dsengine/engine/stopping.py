"""When a request is done: decided from token ids alone, once per new token.

Stop strings need text and are the front end's affair; it aborts the request when one appears.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsengine.engine.messages import FinishReason
from dsengine.engine.request import Request


@dataclass(frozen=True, slots=True)
class StopRule:
    """What ends one request.

    Attributes:
        stop_ids: EOS and stop ids together.
        reported_ids: those the caller named; only they become a `stop_reason`.
        min_tokens: no stop id counts before this many output tokens.
        max_total_tokens: prompt + output end here, by `max_tokens` or by the context.
    """

    stop_ids: frozenset[int]
    reported_ids: frozenset[int]
    min_tokens: int
    max_total_tokens: int

    @classmethod
    def of(cls, request: Request, context_length: int) -> StopRule:
        """The rule of `request` in a context of `context_length` tokens."""
        params = request.params
        named = frozenset(params.stop_token_ids)
        stop_ids = named if params.ignore_eos else named | request.eos_token_ids
        limit = context_length
        if params.max_tokens is not None:
            limit = min(limit, request.num_prompt_tokens + params.max_tokens)
        return cls(stop_ids, named, params.min_tokens, limit)

    def check(self, token_id: int, num_output_tokens: int, num_tokens: int) -> tuple[FinishReason, int | None] | None:
        """Why the request ends with its newest token `token_id`, and the stop id if it was one; None: it goes on.

        Args:
            num_output_tokens: output tokens, the newest included.
            num_tokens: prompt and output tokens, the newest included.
        """
        if token_id in self.stop_ids and num_output_tokens >= self.min_tokens:
            return "stop", token_id if token_id in self.reported_ids else None
        if num_tokens >= self.max_total_tokens:
            return "length", None
        return None
