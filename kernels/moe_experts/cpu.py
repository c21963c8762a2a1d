"""The routed experts on a CPU: tokens sorted by expert, one pair of products per expert that has any.

Few tokens go through torch's grouped product, which saves the interpreter's time between small products. Many tokens
are gathered, computed and added expert by expert, so that the temporaries stay small enough for the allocator to reuse
them: one buffer for all pairs of a long prompt costs more in fresh pages than the sort saves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsengine.kernels.gemm_fp8_block.cpu import dequantize_panel
from dsengine.kernels.gemm_fp8_block.ref import dequantize_groups
from dsengine.kernels.moe_experts.ref import requantized
from dsengine.kernels.quant_fp8_group.api import ScaleFormat

GROUPED_PAIRS = 256  # (token, expert) pairs up to which the grouped product is the faster one


def moe_experts_cpu(
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
    out_dtype = out_dtype or x.dtype
    top_k = topk_ids.shape[1]
    if topk_weights is None:
        topk_weights = torch.ones(topk_ids.shape)
    experts, hidden, inter = w_down.shape
    sorted_ids, order = topk_ids.reshape(-1).sort(stable=True)
    # Pairs of experts that live elsewhere have negative ids and sort first.
    bounds = torch.searchsorted(sorted_ids, torch.arange(experts + 1, dtype=sorted_ids.dtype)).tolist()
    order = order[bounds[0] :]
    token = order // top_k
    weight = topk_weights.reshape(-1)[order].unsqueeze(1)
    ends = [end - bounds[0] for end in bounds[1:]]
    out = torch.zeros(x.shape, dtype=torch.float32)
    aligned = hidden * x.element_size() % 16 == 0 and inter * x.element_size() % 16 == 0
    if w_gate_up_scale is None and order.numel() <= GROUPED_PAIRS and aligned:
        offsets = torch.tensor(ends, dtype=torch.int32)
        gate_up = F.grouped_mm(x[token], w_gate_up.transpose(1, 2), offs=offsets)
        result = F.grouped_mm(_swiglu(gate_up), w_down.transpose(1, 2), offs=offsets)
        return out.index_add_(0, token, result * weight).to(out_dtype)
    rounding = None
    if x_scale is not None:
        x = dequantize_groups(x, x_scale)
        rounding = Rounding(out_dtype, scale_fmt)
    start = 0
    for expert, end in enumerate(ends):
        if start == end:
            continue
        rows = token[start:end]
        up_scale, down_scale = (None if s is None else s[expert] for s in (w_gate_up_scale, w_down_scale))
        result = _expert(x[rows], w_gate_up[expert], w_down[expert], up_scale, down_scale, rounding)
        out.index_add_(0, rows, result * weight[start:end])
        start = end
    return out.to(out_dtype)


@dataclass(frozen=True)
class Rounding:
    """What silu(gate) · up loses before the second product where activations are FP8."""

    dtype: torch.dtype
    scale_fmt: ScaleFormat | None


def _expert(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    rounding: Rounding | None,
) -> Tensor:
    """[n, h] of one expert; in float32 if its weights are FP8, otherwise in their own dtype."""
    if gate_up_scale is None or down_scale is None:
        return F.linear(_swiglu(F.linear(x, w_gate_up)), w_down)
    gate, up = w_gate_up.chunk(2)
    panels = dequantize_panel(gate, gate_up_scale[0]), dequantize_panel(up, gate_up_scale[1])
    gate, up = (F.linear(x.float(), panel) for panel in panels)
    inter = F.silu(gate).mul_(up)
    if rounding is not None:
        inter = requantized(inter.to(rounding.dtype), rounding.scale_fmt)
    return F.linear(inter, dequantize_panel(w_down, down_scale))


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
