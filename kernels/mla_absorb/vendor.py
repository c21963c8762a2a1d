"""Absorption by torch's batched products: cuBLAS on a GPU, MKL on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def absorb_queries_torch(q_nope: Tensor, w_uk: Tensor) -> Tensor:
    return torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)


def release_values_torch(attended: Tensor, w_uv: Tensor) -> Tensor:
    return torch.bmm(attended.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
