"""Weights as the exported checkpoint holds them, seen from training: block-FP8 or bf16 values, gradients untouched."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def block_scales(weight: Tensor) -> Tensor:
    """Float32 scales [..., ceil(m/128), ceil(n/128)] of weight [..., m, n]."""
    rows, columns = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.abs(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scales: Tensor = blocks.amax((-3, -1)).clamp_min(1e-12) / 448.0
    return scales


def through_fp8(weight: Tensor) -> Tensor:
    """The values that survive block-FP8 storage, for weight [..., m, n]."""
    scales = block_scales(weight)
    rows, columns = weight.shape[-2:]
    spread = scales.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    return (weight / spread).to(torch.float8_e4m3fn).to(torch.float32) * spread


@torch.no_grad()
def stored(weight: Tensor, fp8: bool) -> Tensor:
    return through_fp8(weight) if fp8 else weight.to(torch.bfloat16).to(weight.dtype)


def stored_form(weight: Tensor, fp8: bool) -> Tensor:
    """The straight-through form: stored values forwards, identity backwards."""
    return weight + (stored(weight, fp8) - weight).detach()
