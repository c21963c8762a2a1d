"""Absorbed attention of few queries in one call of C, straight from the paged cache.

Scores, weights and values of a tile of rows stay in the processor's caches; nothing is gathered or padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.mla_decode.cpu import mla_decode_cpu
from dsengine.kernels.native_support import Integer, Pointer, Real, c_function

TILE_ROWS, SPAN_KEYS = 16, 128  # as in native.c
MAX_ROWS = 512  # (query, head) rows of a request; measured: 1.3 to 6 times the speed of batched products up to there

_mla_decode = c_function("mla_decode", *[Pointer] * 10, *[Integer] * 8, Real)


def mla_decode_native(
    q_latent: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    softmax_scale: float,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    ancestor_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tokens, heads, rank = q_latent.shape
    requests, rope = cache_seqlens.shape[0], q_rope.shape[2]
    most = int(cu_seqlens_q.diff().max()) if max_seqlen_q is None else max_seqlen_q
    is_float32 = q_latent.dtype == kv_cache.dtype == torch.float32
    if not is_float32 or most * heads > MAX_ROWS or not kv_cache.is_contiguous():
        return mla_decode_cpu(
            q_latent,
            q_rope,
            kv_cache,
            block_table,
            cache_seqlens,
            cu_seqlens_q,
            softmax_scale,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            ancestor_mask=ancestor_mask,
        )
    q_latent, q_rope, block_table = q_latent.contiguous(), q_rope.contiguous(), block_table.contiguous()
    cache_seqlens, cu_seqlens_q = cache_seqlens.contiguous(), cu_seqlens_q.contiguous()
    mask = None if ancestor_mask is None else ancestor_mask.contiguous()
    out, lse = torch.empty((tokens, heads, rank)), torch.empty((tokens, heads))
    scratch = torch.empty(torch.get_num_threads() * TILE_ROWS * (rank + rope + SPAN_KEYS))
    inputs = (q_latent, q_rope, kv_cache, block_table, cache_seqlens, cu_seqlens_q)
    _mla_decode(
        *[tensor.data_ptr() for tensor in inputs],
        None if mask is None else mask.data_ptr(),
        *(out.data_ptr(), lse.data_ptr(), scratch.data_ptr()),
        *(requests, heads, rank, rope, kv_cache.shape[1], block_table.shape[1], 0 if mask is None else mask.shape[1]),
        -(-most * heads // TILE_ROWS),
        softmax_scale,
    )
    return out, lse
