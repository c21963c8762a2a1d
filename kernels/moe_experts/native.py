"""The experts of a few tokens in one call of C: at this size the work between the products costs more than they do."""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.moe_experts.cpu import moe_experts_cpu
from dsengine.kernels.native_support import Integer, Pointer, c_function
from dsengine.kernels.quant_fp8_group.api import ScaleFormat

CHUNK_ROWS = 64  # as in native.c
MAX_ROWS = 64  # (token, expert) pairs for each expert, on average: with more, libraries may have the faster products

_moe_experts = c_function("moe_experts", *[Pointer] * 8, *[Integer] * 5)


def moe_experts_native(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor | None,
    topk_ids: Tensor,
    *,
    w_gate_up_scale: Tensor | None = None,
    w_down_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    scale_fmt: ScaleFormat | None = None,
) -> Tensor:
    (tokens, hidden), (experts, _, inter), top_k = x.shape, w_down.shape, topk_ids.shape[1]
    pairs = tokens * top_k
    is_float32 = x.dtype == w_down.dtype == torch.float32
    if not is_float32 or pairs > MAX_ROWS * experts or not (w_gate_up.is_contiguous() and w_down.is_contiguous()):
        return moe_experts_cpu(
            x,
            w_gate_up,
            w_down,
            topk_weights,
            topk_ids,
            w_gate_up_scale=w_gate_up_scale,
            w_down_scale=w_down_scale,
            x_scale=x_scale,
            out_dtype=out_dtype,
            scale_fmt=scale_fmt,
        )
    if topk_weights is None:
        topk_weights = torch.ones(topk_ids.shape)
    x, topk_weights, topk_ids = x.contiguous(), topk_weights.contiguous(), topk_ids.long().contiguous()
    out = torch.empty((tokens, hidden))
    scratch = torch.empty(CHUNK_ROWS * (2 * hidden + 3 * inter))
    places = torch.empty(experts + pairs, dtype=torch.int64)
    tensors = (x, w_gate_up, w_down, topk_weights, topk_ids, out, scratch, places)
    _moe_experts(*[tensor.data_ptr() for tensor in tensors], tokens, top_k, experts, hidden, inter)
    return out if out_dtype is None else out.to(out_dtype)
