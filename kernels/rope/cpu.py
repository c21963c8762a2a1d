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
    pairs = torch.view_as_complex(torch.unflatten(x.float(), -1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
