"""Absorbed MLA attention over the paged latent cache: decode, verification of drafts, and short chunks of prompts."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsengine.kernels.backend import Backend, Operation
from dsengine.kernels.capability import needs_hopper
from dsengine.kernels.checks import FLOATS, check_device, check_dtype, check_shape
from dsengine.kernels.fp8_kv import fp8_kv_bytes, is_fp8_kv
from dsengine.kernels.mla_decode.ref import mla_decode_ref
from dsengine.kernels.native_support import needs_compiler


class MlaDecode(Protocol):
    def __call__(
        self,
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
    ) -> tuple[Tensor, Tensor]: ...


def mla_decode(
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
    backend: MlaDecode = mla_decode_ref,
) -> tuple[Tensor, Tensor]:
    """Multi-query attention of H heads over one latent of width R + dr, whose first R values are also V.

    Request b has n = cu_seqlens_q[b + 1] - cu_seqlens_q[b] new tokens, all of them already in the cache as its last
    entries, and L = cache_seqlens[b] entries in all. Its query j stands at cache position L - n + j and sees positions
    0 … L - n + j; with `ancestor_mask` it sees the L - n earlier entries and the masked ones among the n new.
    Source: DeepSeek-V2, section 2.1 (W_UK absorbed into the query, W_UV into the output).

    Args:
        q_latent: float [T, H, R], queries times W_UK.
        q_rope: [T, H, dr] of the same dtype, rotated.
        kv_cache: [blocks, block_size, R + dr] of the same dtype, or uint8 [blocks, block_size, fp8_kv_bytes(R, dr)] in
            the format of `kernels/fp8_kv.py`.
        block_table: int32 [B, max_blocks]; entries past a request's last block are never read.
        cache_seqlens: int32 [B], the new tokens included.
        cu_seqlens_q: int32 [B + 1], from 0 to T.
        softmax_scale: multiplies the scores before the softmax (YaRN's m² included).
        max_seqlen_q: largest n (or an upper bound), if the host knows it; spares a GPU backend a wait for the device.
        max_seqlen_k: largest L, likewise.
        ancestor_mask: bool [T, at least the largest n]; [t, i]: query t sees the i-th new token of its own request.

    Returns:
        (out [T, H, R] of q's dtype, lse float32 [T, H]: natural logarithm of the sum of exponentiated scaled scores).
        A query that sees nothing has out 0 and lse -inf.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check_shape("q_latent", q_latent, None, None, None)
    check_dtype("q_latent", q_latent, *FLOATS)
    tokens, heads, rank = q_latent.shape
    check_shape("q_rope", q_rope, tokens, heads, None)
    check_dtype("q_rope", q_rope, q_latent.dtype)
    rope_dim = q_rope.shape[2]
    is_fp8 = is_fp8_kv(kv_cache)
    check_dtype("kv_cache", kv_cache, q_latent.dtype, torch.uint8)
    check_shape("kv_cache", kv_cache, None, None, fp8_kv_bytes(rank, rope_dim) if is_fp8 else rank + rope_dim)
    check_shape("cache_seqlens", cache_seqlens, None)
    requests = cache_seqlens.shape[0]
    check_shape("block_table", block_table, requests, None)
    check_shape("cu_seqlens_q", cu_seqlens_q, requests + 1)
    for name, index in (("block_table", block_table), ("cache_seqlens", cache_seqlens), ("cu_seqlens_q", cu_seqlens_q)):
        check_dtype(name, index, torch.int32)
    check_device(
        q_latent.device,
        q_rope=q_rope,
        kv_cache=kv_cache,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        ancestor_mask=ancestor_mask,
    )
    if ancestor_mask is not None:
        check_shape("ancestor_mask", ancestor_mask, tokens, None)
        check_dtype("ancestor_mask", ancestor_mask, torch.bool)
    if tokens == 0:
        return torch.empty_like(q_latent), q_latent.new_empty((tokens, heads), dtype=torch.float32)
    return backend(
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


MLA_DECODE = Operation(
    "mla_decode",
    mla_decode,
    (
        Backend("triton", "dsengine.kernels.mla_decode.triton:mla_decode_triton", ("cuda",), ("triton",)),
        Backend("gluon", "dsengine.kernels.mla_decode.gluon:mla_decode_gluon", ("cuda",), ("triton",), needs_hopper),
        Backend(
            "flashinfer",
            "dsengine.kernels.mla_decode.vendor:mla_decode_flashinfer",
            ("cuda",),
            ("flashinfer", "triton"),
        ),
        Backend(
            "flashmla",
            "dsengine.kernels.mla_decode.vendor:mla_decode_flashmla",
            ("cuda",),
            ("flash_mla", "triton"),
            needs_hopper,
        ),
        Backend("native", "dsengine.kernels.mla_decode.native:mla_decode_native", ("cpu",), probe=needs_compiler),
        Backend("cpu", "dsengine.kernels.mla_decode.cpu:mla_decode_cpu", ("cpu",)),
        Backend("ref", "dsengine.kernels.mla_decode.ref:mla_decode_ref"),
    ),
)
