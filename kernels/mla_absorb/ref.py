"""Executable specification of absorption: one product for each head."""

from __future__ import annotations

import torch
from torch import Tensor


def absorb_queries_ref(q_nope: Tensor, w_uk: Tensor) -> Tensor:
    return torch.einsum("thn,hnr->thr", q_nope.float(), w_uk.float()).to(q_nope.dtype)


def release_values_ref(attended: Tensor, w_uv: Tensor) -> Tensor:
    return torch.einsum("thr,hvr->thv", attended.float(), w_uv.float()).to(attended.dtype)
