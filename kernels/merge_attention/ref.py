"""Executable specification of the log-sum-exp merge."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention_ref(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    finite_lse = lse.masked_fill(lse == -torch.inf, 0.0)
    out = _weighted(out_a, lse_a, finite_lse) + _weighted(out_b, lse_b, finite_lse)
    return out.to(out_a.dtype), lse


def _weighted(out: Tensor, lse: Tensor, total: Tensor) -> Tensor:
    share = torch.exp(lse - total).unsqueeze(-1)
    # A part without keys may hold anything, NaN included; a product with its zero share would keep the NaN.
    return torch.where(share == 0, 0.0, out.float() * share)
