"""Interleaved rope on a CPU as one complex product per pair, which torch computes in a single pass."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_cpu(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, rotations(cos_sin, positions))


def rotations(cos_sin: Tensor, positions: Tensor) -> Tensor:
    """complex64 [T, 1, dr/2]: cos + i sin of each token's angles."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    return torch.complex(cos, sin)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [T, H, dr] turned by `rotation`, in x's dtype and contiguous."""
    # Always a copy: a complex view also needs even strides and offsets, which a slice of a projection need not have.
    value = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    torch.view_as_complex(torch.unflatten(value, -1, (-1, 2))).mul_(rotation)
    return value.to(x.dtype)
