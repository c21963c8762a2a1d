"""RMS normalisation on a CPU through torch's own fused kernel, which keeps the statistics in float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x.float() + residual.float()
    return F.rms_norm(total, weight.shape, weight.float(), eps).to(x.dtype), total.to(x.dtype)
