"""Executable specification of the block-FP8 product: dequantise both sides, multiply in float32."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # rows and columns of a weight block, columns of an activation group: fixed by DeepSeek's format


def gemm_fp8_block_ref(
    x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor | None = None, *, out_dtype: torch.dtype
) -> Tensor:
    value = x.float() if x_scale is None else dequantize_groups(x, x_scale)
    return (value @ dequantize_blocks(weight, weight_scale).T).to(out_dtype)


def dequantize_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 [N, K] of a weight [N, K] with one scale per 128×128 block, [⌈N/128⌉, ⌈K/128⌉]."""
    rows, columns = weight.shape
    expanded = scale.repeat_interleave(BLOCK, dim=0)[:rows].repeat_interleave(BLOCK, dim=1)[:, :columns]
    return weight.float() * expanded


def dequantize_groups(x: Tensor, scale: Tensor) -> Tensor:
    """float32 [T, K] of activations [T, K] with one scale per 128 channels, [T, ⌈K/128⌉]."""
    return x.float() * scale.repeat_interleave(BLOCK, dim=1)[:, : x.shape[1]]
