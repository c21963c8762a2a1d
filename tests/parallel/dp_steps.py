"""Steps of several attention groups, each with requests of its own, and what a group's model answers to its part."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from tiny_checkpoints import CPU, Session
from torch import Tensor

from dsengine.model.attention_plan import runs_absorbed
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.forward_batch import ForwardBatch

REQUESTS = 2
MAX_TOKENS = 96

Schedule = list[list[list[int]]]
"""[step][group][request]: how many new tokens; 0 leaves the request out, a group may have none at all."""


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    """How a case's model is loaded, as `load_tiny` takes it."""
    options: dict[str, Any] = dict(case["options"])
    return options | ({"dtype": getattr(torch, options["dtype"])} if "dtype" in options else {})


@dataclass
class GroupRun:
    """The requests of one group on one model.

    Args:
        dp_size: groups of the layout that the model is spread in; 1: the model is whole, and this is the expectation.
    """

    model: DeepseekModel
    group: int
    dp_size: int

    def __post_init__(self) -> None:
        self._session = Session(self.model, max_tokens=MAX_TOKENS, num_requests=REQUESTS)

    def answers(self, schedule: Schedule) -> dict[str, Tensor]:
        """Logits of all tokens of every step, of the main model and of the NextN layer."""
        found = {}
        for number, step in enumerate(schedule):
            logits, drafted = self.step(step)
            found[f"step{number}"] = logits
            if drafted is not None:
                found[f"step{number}/nextn"] = drafted
        return found

    def step(self, step: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        session, model = self._session, self.model
        chunks = [(request, self._tokens(request, count)) for request, count in enumerate(step[self.group]) if count]
        chunks.sort(key=lambda chunk: not runs_absorbed(len(chunk[1]), session.lengths[chunk[0]]))
        batch = session.batch(chunks) if chunks else empty_batch()
        if self.dp_size > 1:
            batch = replace(batch, rank_tokens=tuple(sum(counts) for counts in step[: self.dp_size]))
        with torch.inference_mode():
            hidden = model.forward(batch, session.kv_caches)
            logits = model.compute_logits(hidden, batch.rank_tokens)
            drafted = None
            if model.nextn is not None:
                following = batch.input_ids.roll(-1)
                drafted = model.nextn.forward(hidden, following, batch, session.kv_caches[-1])
                drafted = model.compute_logits(drafted, batch.rank_tokens)
        for request, tokens in chunks:
            session.lengths[request] += len(tokens)
        return logits, drafted

    def _tokens(self, request: int, count: int) -> list[int]:
        start = self._session.lengths[request]
        return [
            (self.group * 97 + request * 31 + 7 * place + place * place) % 320 for place in range(start, start + count)
        ]


def empty_batch() -> ForwardBatch:
    nothing = torch.empty(0, dtype=torch.int64, device=CPU)
    return ForwardBatch(
        input_ids=nothing,
        positions=nothing,
        slot_mapping=nothing,
        block_table=torch.empty((0, 0), dtype=torch.int32),
        cache_seqlens=nothing.int(),
        cu_seqlens_q=torch.zeros(1, dtype=torch.int32),
        num_decodes=0,
        num_decode_tokens=0,
        query_lens=(),
        context_lens=(),
        logits_indices=nothing,
    )
