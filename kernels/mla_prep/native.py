"""MLA's preparation step for a few tokens in one call of C."""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.mla_prep.cpu import mla_prep_cpu
from dsengine.kernels.native_support import Integer, Pointer, Real, c_function

MAX_TOKENS = 256  # with more, torch's threads make up for its calls

_mla_prep = c_function(
    "mla_prep",
    *(Pointer, Integer, Integer, Pointer, Integer, Pointer, Real),
    *[Pointer] * 6,
    *[Integer] * 4,
)


def mla_prep_native(
    q_rope: Tensor,
    kv_a: Tensor,
    kv_norm_weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
) -> tuple[Tensor, Tensor]:
    tokens, heads, rope = q_rope.shape
    is_float32 = q_rope.dtype == kv_cache.dtype == kv_norm_weight.dtype == torch.float32
    if not is_float32 or tokens > MAX_TOKENS or kv_a.stride(1) != 1:
        return mla_prep_cpu(q_rope, kv_a, kv_norm_weight, eps, cos_sin, positions, slot_mapping, kv_cache)
    if q_rope.stride(2) != 1:
        q_rope = q_rope.contiguous()
    positions, slot_mapping = positions.long().contiguous(), slot_mapping.long().contiguous()
    rotated, rows = torch.empty((tokens, heads, rope)), torch.empty(kv_a.shape)
    _mla_prep(
        q_rope.data_ptr(),
        q_rope.stride(0),
        q_rope.stride(1),
        kv_a.data_ptr(),
        kv_a.stride(0),
        kv_norm_weight.data_ptr(),
        eps,
        cos_sin.data_ptr(),
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        kv_cache.data_ptr(),
        rotated.data_ptr(),
        rows.data_ptr(),
        tokens,
        heads,
        kv_norm_weight.shape[0],
        rope,
    )
    return rotated, rows
