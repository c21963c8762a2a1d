"""The token counts of a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsengine.server.generation import Delta
from dsengine.server.protocol import UsageIn


class Usage:
    """Counts for prompts with `n` continuations each; a prompt counts once, whatever its `n`."""

    def __init__(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        self.reasoning_tokens = 0
        self._n = n
        self._prompt_tokens = sum(len(prompt) for prompt in prompts)
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}
        self._drafted = 0
        self._accepted = 0

    def add(self, delta: Delta) -> None:
        self._completion_tokens += len(delta.token_ids)
        self._drafted += delta.num_drafts
        self._accepted += delta.num_accepted
        # A prompt's further continuations find the first one's blocks, which says nothing about the client's caching.
        if delta.index % self._n == 0:
            self._cached[delta.index] = max(self._cached.get(delta.index, 0), delta.cached_tokens)

    def of_chunk(self, usage_in: UsageIn) -> dict[str, Any]:
        """What a chunk with text says of usage, as OpenAI has it: null where only the last chunk will tell."""
        if usage_in == "none":
            return {}
        return {"usage": self.body() if usage_in == "every" else None}

    def body(self) -> dict[str, Any]:
        details = {
            "reasoning_tokens": self.reasoning_tokens,
            "accepted_prediction_tokens": self._accepted,
            "rejected_prediction_tokens": self._drafted - self._accepted,
        }
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            "completion_tokens_details": details,
        }
