"""Runs one scheduled batch through the model: tensors in, logits out.

The scheduler speaks of requests and blocks, the model of flat tokens and slots; the translation is here and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsengine.engine.batch import ScheduledBatch, ScheduledRequest
from dsengine.memory.kv_cache import KVCachePool
from dsengine.model.attention_plan import runs_absorbed
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.forward_batch import ForwardBatch


@dataclass(frozen=True)
class LogitsRows:
    """Which rows of a step's logits belong to which request.

    Attributes:
        scheduled: the requests in the order of the rows.
        prompt_rows: rows `[start, stop)` that score prompt tokens (empty unless prompt log-probabilities are wanted);
            row `start + i` scores the prompt token at position `scheduled.start + i + 1`.
        sample_row: the row a new token is drawn from, or None.
    """

    scheduled: ScheduledRequest
    prompt_rows: tuple[int, int]
    sample_row: int | None


class ModelRunner:
    """Owns the model and its KV cache; turns a `ScheduledBatch` into logits."""

    def __init__(self, model: DeepseekModel, pool: KVCachePool) -> None:
        self.model = model
        self.pool = pool
        self.device = pool.layers[0].device

    def run(self, batch: ScheduledBatch) -> tuple[Tensor, list[LogitsRows]]:
        """Run one step.

        Returns:
            logits: float32 [N, vocab_size], and what each of the N rows is for, one entry per scheduled request in
            the order the model ran them.
        """
        ordered = sorted(batch.requests, key=lambda s: not runs_absorbed(s.num_tokens, s.start))
        rows, logits_indices = _plan_logits(ordered)
        forward_batch = build_forward_batch(ordered, logits_indices, self.pool.block_size, self.device)
        hidden = self.model.forward(forward_batch, self.pool.layers)
        return self.model.compute_logits(hidden[forward_batch.logits_indices]), rows


def _plan_logits(ordered: Sequence[ScheduledRequest]) -> tuple[list[LogitsRows], list[int]]:
    rows: list[LogitsRows] = []
    indices: list[int] = []
    first_token = 0
    for scheduled in ordered:
        last_token = first_token + scheduled.num_tokens - 1
        prompt_start = len(indices)
        if scheduled.request.params.prompt_logprobs is not None:
            # The row of prompt position p scores position p + 1, so the prompt's last position scores no prompt token.
            num_scored = min(scheduled.num_tokens, scheduled.request.num_prompt_tokens - 1 - scheduled.start)
            indices.extend(range(first_token, first_token + max(num_scored, 0)))
        prompt_stop = len(indices)
        sample_row = None
        if scheduled.samples:
            sample_row = len(indices)
            indices.append(last_token)
        rows.append(LogitsRows(scheduled, (prompt_start, prompt_stop), sample_row))
        first_token = last_token + 1
    return rows, indices


def build_forward_batch(
    ordered: Sequence[ScheduledRequest], logits_indices: Sequence[int], block_size: int, device: torch.device
) -> ForwardBatch:
    """Flatten scheduled requests, absorbed ones first, into the tensors of one forward pass."""
    query_lens = np.array([s.num_tokens for s in ordered], dtype=np.int64)
    context_lens = np.array([s.start for s in ordered], dtype=np.int64)
    seqlens = context_lens + query_lens
    cu_seqlens = np.zeros(len(ordered) + 1, dtype=np.int64)
    np.cumsum(query_lens, out=cu_seqlens[1:])

    token_ids: list[int] = []
    num_blocks = -(-seqlens // block_size)
    block_table = np.zeros((len(ordered), int(num_blocks.max())), dtype=np.int64)
    for row, (s, count) in enumerate(zip(ordered, num_blocks.tolist(), strict=True)):
        token_ids.extend(s.request.token_ids(s.start, s.start + s.num_tokens))
        block_table[row, :count] = s.request.block_table[:count]

    row_of_token = np.repeat(np.arange(len(ordered)), query_lens)
    positions = np.arange(int(cu_seqlens[-1])) - cu_seqlens[row_of_token] + context_lens[row_of_token]
    slots = block_table[row_of_token, positions // block_size] * block_size + positions % block_size
    absorbed = [runs_absorbed(s.num_tokens, s.start) for s in ordered]
    num_decodes = sum(absorbed)
    assert all(absorbed[:num_decodes]), "absorbed requests must come first"

    def tensor(values: object, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype).to(device, non_blocking=True)

    return ForwardBatch(
        input_ids=tensor(token_ids, torch.int64),
        positions=tensor(positions, torch.int64),
        slot_mapping=tensor(slots, torch.int64),
        block_table=tensor(block_table, torch.int32),
        cache_seqlens=tensor(seqlens, torch.int32),
        cu_seqlens_q=tensor(cu_seqlens, torch.int32),
        num_decodes=num_decodes,
        num_decode_tokens=int(cu_seqlens[num_decodes]),
        query_lens=tuple(query_lens.tolist()),
        context_lens=tuple(context_lens.tolist()),
        logits_indices=tensor(np.asarray(logits_indices, dtype=np.int64), torch.int64),
    )
