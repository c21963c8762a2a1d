"""The routed experts on a CPU: tokens sorted by expert, one pair of products per expert that has any."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsengine.kernels.gemm_fp8_block.cpu import dequantize_panel


def moe_experts_cpu(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    w_gate_up_scale: Tensor | None = None,
    w_down_scale: Tensor | None = None,
) -> Tensor:
    tokens, top_k = topk_ids.shape
    experts = w_down.shape[0]
    quantized = w_gate_up_scale is not None and w_down_scale is not None
    value = x.float() if quantized else x
    flat_ids = topk_ids.reshape(-1)
    order = flat_ids.argsort(stable=True)
    counts = torch.bincount(flat_ids.clamp(min=-1) + 1, minlength=experts + 1).tolist()
    gathered = value[order // top_k]
    results = torch.zeros_like(gathered)
    start = counts[0]  # pairs of experts that live elsewhere sort first
    for expert, count in enumerate(counts[1:]):
        if count == 0:
            continue
        rows = slice(start, start + count)
        start += count
        if w_gate_up_scale is None or w_down_scale is None:
            gate_up, down = w_gate_up[expert], w_down[expert]
        else:
            halves = zip(w_gate_up[expert].chunk(2), w_gate_up_scale[expert], strict=True)
            gate_up = torch.cat([dequantize_panel(half, scale) for half, scale in halves])
            down = dequantize_panel(w_down[expert], w_down_scale[expert])
        gate, up = F.linear(gathered[rows], gate_up).chunk(2, dim=-1)
        results[rows] = F.linear(F.silu(gate).mul_(up), down)
    parts = torch.empty_like(results)
    parts[order] = results
    weighted = parts.view(tokens, top_k, -1).float() * topk_weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(x.dtype)
