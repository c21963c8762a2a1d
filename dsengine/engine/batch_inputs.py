"""The numbers of one forward pass while they are on the host: what a scheduled batch means in tokens and slots.

The scheduler speaks of requests and blocks, the model of flat tokens and slots; the translation is here and nowhere
else. A token that the step before draws is not known yet: its place stays open until the device fills it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dsengine.engine.batch import ScheduledRequest
from dsengine.engine.request import Request
from dsengine.model.attention_plan import runs_absorbed
from dsengine.model.forward_batch import ForwardBatch
from dsengine.model.transfer import upload

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class BatchInputs:
    """The fields of a `ForwardBatch` as arrays, and where its open tokens come from.

    Attributes:
        open_tokens: int64 [P], the entries of `input_ids` (0 here) that the previous step draws.
        open_sources: int64 [P], their places among the tokens drawn by the previous step.
    """

    input_ids: Int64Array
    positions: Int64Array
    slot_mapping: Int64Array
    block_table: Int32Array
    cache_seqlens: Int32Array
    cu_seqlens_q: Int32Array
    num_decodes: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    logits_indices: Int64Array
    open_tokens: Int64Array
    open_sources: Int64Array
    rank_tokens: tuple[int, ...] | None = None
    rank_logits: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_requests(self) -> int:
        return len(self.query_lens)

    def to_device(self, device: torch.device, drawn: Tensor | None) -> ForwardBatch:
        """The tensors of the pass; queued, not waited for.

        Args:
            drawn: int64 [N], the tokens that the previous step drew; needed if there are open ones.
        """
        input_ids = upload(self.input_ids, device)
        self.fill_open_tokens(input_ids, drawn)
        return ForwardBatch(
            input_ids=input_ids,
            positions=upload(self.positions, device),
            slot_mapping=upload(self.slot_mapping, device),
            block_table=upload(self.block_table, device),
            cache_seqlens=upload(self.cache_seqlens, device),
            cu_seqlens_q=upload(self.cu_seqlens_q, device),
            num_decodes=self.num_decodes,
            num_decode_tokens=sum(self.query_lens[: self.num_decodes]),
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            logits_indices=upload(self.logits_indices, device),
            rank_tokens=self.rank_tokens,
            rank_logits=self.rank_logits,
        )

    def fill_open_tokens(self, input_ids: Tensor, drawn: Tensor | None) -> None:
        """Writes the previous step's tokens into their places in `input_ids`, on the device."""
        if len(self.open_tokens) == 0:
            return
        assert drawn is not None, "a token is awaited from a step that does not exist"
        sources = upload(self.open_sources, input_ids.device)
        # A request without a next token (-1) ends as soon as the host learns of it; until then any token will do.
        input_ids.index_copy_(0, upload(self.open_tokens, input_ids.device), drawn[sources].clamp(min=0))


def build_inputs(
    ordered: Sequence[ScheduledRequest],
    logits_indices: Sequence[int],
    block_size: int,
    drawn_rows: Mapping[Request, int],
) -> BatchInputs:
    """Flatten scheduled requests, absorbed ones first. The places of drafts stay 0 until a tree fills them.

    Args:
        logits_indices: tokens whose logits are wanted.
        drawn_rows: row of each request among the tokens that the previous step draws.
    """
    token_ids: list[int] = []
    open_tokens: list[int] = []
    open_sources: list[int] = []
    for s in ordered:
        token_ids.extend(s.request.token_ids(s.start, s.start + s.num_tokens - s.num_drafts))
        if s.awaits_token:
            open_tokens.append(len(token_ids))
            open_sources.append(drawn_rows[s.request])
            token_ids.append(0)
        token_ids.extend([0] * s.num_drafts)
    inputs = lay_out(ordered, [s.num_tokens for s in ordered], block_size)
    assert len(token_ids) == len(inputs.positions), "a token is neither known nor awaited"
    return replace(
        inputs,
        input_ids=np.array(token_ids, dtype=np.int64),
        logits_indices=np.array(logits_indices, dtype=np.int64),
        open_tokens=np.array(open_tokens, dtype=np.int64),
        open_sources=np.array(open_sources, dtype=np.int64),
    )


def lay_out(ordered: Sequence[ScheduledRequest], num_tokens: Sequence[int], block_size: int) -> BatchInputs:
    """Positions and slots of so many tokens of each request, from its `start` on; the tokens themselves are all 0.

    Args:
        ordered: absorbed requests first; those with drafts are absorbed.
    """
    query_lens = np.array(num_tokens, dtype=np.int64)
    context_lens = np.array([s.start for s in ordered], dtype=np.int64)
    seqlens = context_lens + query_lens
    cu_seqlens = np.zeros(len(ordered) + 1, dtype=np.int64)
    np.cumsum(query_lens, out=cu_seqlens[1:])
    block_table = table_of([s.request for s in ordered], -(-seqlens // block_size))
    row_of_token = np.repeat(np.arange(len(ordered)), query_lens)
    positions = np.arange(int(cu_seqlens[-1])) - cu_seqlens[row_of_token] + context_lens[row_of_token]
    blocks = block_table[row_of_token, positions // block_size].astype(np.int64)
    absorbed = [s.num_drafts > 0 or runs_absorbed(s.num_tokens, s.start) for s in ordered]
    num_decodes = sum(absorbed)
    assert all(absorbed[:num_decodes]), "absorbed requests must come first"
    nothing = np.empty(0, dtype=np.int64)
    return BatchInputs(
        input_ids=np.zeros(len(positions), dtype=np.int64),
        positions=positions,
        slot_mapping=blocks * block_size + positions % block_size,
        block_table=block_table,
        cache_seqlens=seqlens.astype(np.int32),
        cu_seqlens_q=cu_seqlens.astype(np.int32),
        num_decodes=num_decodes,
        query_lens=tuple(query_lens.tolist()),
        context_lens=tuple(context_lens.tolist()),
        logits_indices=nothing,
        open_tokens=nothing,
        open_sources=nothing,
    )


def table_of(requests: Sequence[Request], num_blocks: Int64Array) -> Int32Array:
    """The first so many cache blocks of each request, padded with 0."""
    table = np.zeros((len(requests), int(num_blocks.max(initial=0))), dtype=np.int32)
    for row, (request, count) in enumerate(zip(requests, num_blocks.tolist(), strict=True)):
        table[row, :count] = request.block_table[:count]
    return table
