"""Executable specification of RMS normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    value = x.float()
    scale = torch.rsqrt(value.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (value * scale * weight.float()).to(x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x.float() + residual.float()
    scale = torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (total * scale * weight.float()).to(x.dtype), total.to(x.dtype)
