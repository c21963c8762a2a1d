"""Executable specification of the routed experts: a loop over experts in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsengine.kernels.gemm_fp8_block.ref import dequantize_blocks, dequantize_groups
from dsengine.kernels.quant_fp8_group.api import ScaleFormat
from dsengine.kernels.quant_fp8_group.ref import AMAX_FLOOR, quant_fp8_group_ref


def moe_experts_ref(
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
    value = x.float() if x_scale is None else dequantize_groups(x, x_scale)
    out = torch.zeros_like(value)
    for expert in range(w_down.shape[0]):
        token, k = (topk_ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        gate_up, down = w_gate_up[expert], w_down[expert]
        if w_gate_up_scale is None or w_down_scale is None:
            gate_up, down = gate_up.float(), down.float()
        else:
            gate_scale, up_scale = w_gate_up_scale[expert]
            gate, up = gate_up.chunk(2)
            gate_up = torch.cat((dequantize_blocks(gate, gate_scale), dequantize_blocks(up, up_scale)))
            down = dequantize_blocks(down, w_down_scale[expert])
        gate, up = (value[token] @ gate_up.T).chunk(2, dim=-1)
        inter = F.silu(gate) * up
        if x_scale is not None:
            inter = requantized(inter.to(out_dtype), scale_fmt)
        product = inter @ down.T
        out.index_add_(0, token, product if topk_weights is None else product * topk_weights[token, k, None])
    return out.to(out_dtype)


def requantized(inter: Tensor, scale_fmt: ScaleFormat | None) -> Tensor:
    """float32 values that `inter` [n, I] has after quantisation to FP8 in groups of 128."""
    return dequantize_groups(*quant_fp8_group_ref(inter, scale_fmt=scale_fmt, floor=AMAX_FLOOR))
