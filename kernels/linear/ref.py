"""Executable specification of a linear layer with float weights."""

from __future__ import annotations

from torch import Tensor


def linear_ref(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() @ weight.float().T).to(x.dtype)
