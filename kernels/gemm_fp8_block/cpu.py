"""The block-FP8 product on a CPU, a panel of rows at a time, so that no second copy of the weight stands in memory.

CPUs have no FP8 arithmetic; a panel is dequantised and multiplied in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.gemm_fp8_block.ref import BLOCK, dequantize_groups

PANEL_ELEMENTS = 1 << 20  # 4 MiB of float32


def gemm_fp8_block_cpu(
    x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor | None = None, *, out_dtype: torch.dtype
) -> Tensor:
    value = x.float() if x_scale is None else dequantize_groups(x, x_scale)
    rows, columns = weight.shape
    panel_rows = max(1, PANEL_ELEMENTS // (BLOCK * columns)) * BLOCK
    out = torch.empty((x.shape[0], rows), dtype=out_dtype)
    for start in range(0, rows, panel_rows):
        end = min(start + panel_rows, rows)
        scale = weight_scale[start // BLOCK : -(-end // BLOCK)]
        out[:, start:end] = value @ dequantize_panel(weight[start:end], scale).T
    return out


def dequantize_panel(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 [N, K] of a weight with one scale per 128×128 block, scaled in place without expanding the scales."""
    panel = weight.float()
    rows, columns = panel.shape
    for first_row in range(0, rows, BLOCK):
        band = panel[first_row : first_row + BLOCK]
        row_scale = scale[first_row // BLOCK].repeat_interleave(BLOCK)[:columns]
        band.mul_(row_scale)
    return panel
