"""RMS normalisation with its weight kept in float32, the type the norm is computed in."""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.registry import Kernels
from dsengine.model.weights import WeightSlots


class Norm:
    """RMS norm over the last dimension of [T, size]."""

    def __init__(self, slots: WeightSlots, kernels: Kernels, name: str, size: int, eps: float) -> None:
        self._kernels = kernels
        self.eps = eps
        self.weight = slots.tensor(name, size, dtype=torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, size] of x's dtype."""
        return self._kernels.rms_norm(x, self.weight, self.eps)

    def after_add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual); without a residual yet, x itself starts the residual stream."""
        if residual is None:
            return self(x), x
        return self._kernels.add_rms_norm(x, residual, self.weight, self.eps)
