"""What lies between MLA's projections and its attention: rope, the latent's norm, and the write to the cache."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsengine.kernels.backend import Backend, Operation
from dsengine.kernels.checks import FLOATS, INTS, check_device, check_dtype, check_shape
from dsengine.kernels.fp8_kv import fp8_kv_bytes, is_fp8_kv
from dsengine.kernels.mla_prep.ref import mla_prep_ref
from dsengine.kernels.native_support import needs_compiler


class MlaPrep(Protocol):
    def __call__(
        self,
        q_rope: Tensor,
        kv_a: Tensor,
        kv_norm_weight: Tensor,
        eps: float,
        cos_sin: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        kv_cache: Tensor,
    ) -> tuple[Tensor, Tensor]: ...


def mla_prep(
    q_rope: Tensor,
    kv_a: Tensor,
    kv_norm_weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    *,
    backend: MlaPrep = mla_prep_ref,
) -> tuple[Tensor, Tensor]:
    """Rotates q_rope and k_rope, normalises the latent and stores [latent | k_rope] in the cache, in place.

    T tokens, H heads, R = kv_lora_rank, dr = qk_rope_head_dim.

    Args:
        q_rope: float [T, H, dr], the queries' rope part, not yet rotated; may be strided.
        kv_a: [T, R + dr] of q_rope's dtype, output of kv_a_proj_with_mqa: latent, then k_rope; rows may be strided.
        kv_norm_weight: float [R], kv_a_layernorm.
        eps: its epsilon.
        cos_sin: float32 [max_positions, dr], as for `rope`.
        positions: int [T].
        slot_mapping: int [T], flat slot `block * block_size + offset` of each token; -1: do not store. Slots other
            than -1 are distinct.
        kv_cache: [blocks, block_size, R + dr] of q_rope's dtype, or the FP8 format of `kernels/fp8_kv.py`, uint8
            [blocks, block_size, fp8_kv_bytes(R, dr)]; contiguous. Written at the slots, nowhere else.

    Returns:
        (q_rope rotated [T, H, dr], latent rows [T, R + dr] exactly as stored); both of q_rope's dtype. "As stored" is,
        for an FP8 cache, what `dequantize_latents` reads back: codes · scale, and k_rope rounded to bfloat16.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check_shape("q_rope", q_rope, None, None, None)
    check_dtype("q_rope", q_rope, *FLOATS)
    tokens, _, rope_dim = q_rope.shape
    check_shape("kv_norm_weight", kv_norm_weight, None)
    rank = kv_norm_weight.shape[0]
    width = rank + rope_dim
    check_shape("kv_a", kv_a, tokens, width)
    check_dtype("kv_a", kv_a, q_rope.dtype)
    check_shape("cos_sin", cos_sin, None, rope_dim)
    check_dtype("cos_sin", cos_sin, torch.float32)
    for name, index in (("positions", positions), ("slot_mapping", slot_mapping)):
        check_shape(name, index, tokens)
        check_dtype(name, index, *INTS)
    check_dtype("kv_cache", kv_cache, q_rope.dtype, torch.uint8)
    check_shape("kv_cache", kv_cache, None, None, fp8_kv_bytes(rank, rope_dim) if is_fp8_kv(kv_cache) else width)
    if not kv_cache.is_contiguous():
        raise ValueError(f"kv_cache has strides {kv_cache.stride()}; it must be contiguous to be addressed by slots")
    check_device(
        q_rope.device,
        kv_a=kv_a,
        kv_norm_weight=kv_norm_weight,
        cos_sin=cos_sin,
        positions=positions,
        slot_mapping=slot_mapping,
        kv_cache=kv_cache,
    )
    if tokens == 0:
        return torch.empty_like(q_rope), torch.empty_like(kv_a)
    return backend(q_rope, kv_a, kv_norm_weight, eps, cos_sin, positions, slot_mapping, kv_cache)


MLA_PREP = Operation(
    "mla_prep",
    mla_prep,
    (
        Backend("triton", "dsengine.kernels.mla_prep.triton:mla_prep_triton", ("cuda",), ("triton",)),
        Backend("native", "dsengine.kernels.mla_prep.native:mla_prep_native", ("cpu",), probe=needs_compiler),
        Backend("cpu", "dsengine.kernels.mla_prep.cpu:mla_prep_cpu", ("cpu",)),
        Backend("ref", "dsengine.kernels.mla_prep.ref:mla_prep_ref"),
    ),
)
