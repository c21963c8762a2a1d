"""Executable specification of the routed experts: a loop over experts in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsengine.kernels.gemm_fp8_block.ref import dequantize_blocks


def moe_experts_ref(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    w_gate_up_scale: Tensor | None = None,
    w_down_scale: Tensor | None = None,
) -> Tensor:
    value = x.float()
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
        out.index_add_(0, token, (F.silu(gate) * up) @ down.T * topk_weights[token, k, None])
    return out.to(x.dtype)
