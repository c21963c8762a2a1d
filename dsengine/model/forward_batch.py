"""What one forward pass is told about its tokens.

The batch is an argument all the way down: no layer reads a global. It lives beside the model, below the engine that
builds it, because every layer of the model reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """Tokens of all requests, flat and grouped by request; requests with few new tokens ("decode") stand first.

    T tokens, B requests. All tensors lie on the model's device.

    Attributes:
        input_ids: int64 [T].
        positions: int64 [T], position of each token in its request.
        slot_mapping: int64 [T], flat cache slot `block * block_size + offset` that each token's latent is written to.
        block_table: int32 [B, max_blocks], cache blocks of each request in order; padding is 0 and never read.
        cache_seqlens: int32 [B], tokens of each request in the cache once this pass has written its own.
        cu_seqlens_q: int32 [B + 1], exclusive prefix sum of new tokens per request.
        num_decodes: the first `num_decodes` requests run the absorbed form, the rest the expanded form.
        num_decode_tokens: new tokens of those first requests together.
        query_lens: new tokens per request, on the host.
        context_lens: cached tokens per request before this pass, on the host.
        logits_indices: int64 [N], rows of the hidden states whose logits are wanted.
        tree_mask: bool [num_decode_tokens, at least the largest of the first `num_decodes` query lengths], where new
            tokens form trees: [t, i] whether token t sees the i-th new token of its own request. The slots of a
            request's new tokens follow its context in the order of `i`, whatever their positions. None: causal.
        rank_tokens: tokens of every attention-DP group in this pass, T at this one's place; any may be 0. None where
            there is one group only.
        rank_logits: likewise the rows of `logits_indices` of every group.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor
    num_decodes: int
    num_decode_tokens: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    logits_indices: Tensor
    tree_mask: Tensor | None = None
    rank_tokens: tuple[int, ...] | None = None
    rank_logits: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_requests(self) -> int:
        return len(self.query_lens)

    @property
    def device(self) -> torch.device:
        return self.input_ids.device
