"""The log-sum-exp merge on a CPU as one interpolation, where both parts saw keys."""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.merge_attention.ref import merge_attention_ref


def merge_attention_cpu(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    if not (lse_a.isfinite().all() and lse_b.isfinite().all()):
        return merge_attention_ref(out_a, lse_a, out_b, lse_b)
    share_b = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)
    return torch.lerp(out_a.float(), out_b.float(), share_b).to(out_a.dtype), torch.logaddexp(lse_a, lse_b)
