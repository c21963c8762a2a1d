"""RMS normalisation on a CPU with one float32 temporary: fresh memory costs more than the arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normalize(x.float(), weight, eps).to(x.dtype)


def add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = torch.add(x, residual) if x.dtype == torch.float32 else x.float().add_(residual)
    return _normalize(total, weight, eps).to(x.dtype), total.to(x.dtype)


def _normalize(value: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
    return torch.mul(value, norm.square_().div_(value.shape[-1]).add_(eps).rsqrt_()).mul_(weight.float())
