"""Sampling on a CPU: sorts only the rows whose filters need an order, and of them only as many tokens as they need."""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.sample.ref import sample_ref


def sample_cpu(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    highest, tokens = logits.max(dim=-1)
    drawn = ((temperature > 0) & highest.isfinite()).nonzero().squeeze(1)
    if drawn.numel():
        tokens[drawn] = sample_ref(
            logits[drawn], temperature[drawn], top_k[drawn], top_p[drawn], min_p[drawn], seeds[drawn], positions[drawn]
        )
    return torch.where(highest.isfinite(), tokens, -1)
