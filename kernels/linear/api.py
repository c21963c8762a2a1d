"""A linear layer with float weights: every projection that is not kept in FP8, and the head."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsengine.kernels.backend import Backend, Operation
from dsengine.kernels.checks import FLOATS, check_device, check_dtype, check_shape
from dsengine.kernels.linear.ref import linear_ref
from dsengine.kernels.native_support import needs_compiler


class Linear(Protocol):
    def __call__(self, x: Tensor, weight: Tensor) -> Tensor: ...


def linear(x: Tensor, weight: Tensor, *, backend: Linear = linear_ref) -> Tensor:
    """x · weightᵀ, accumulated in float32 at least and rounded once.

    Args:
        x: float [T, K]; rows may be strided.
        weight: [N, K] of x's dtype.

    Returns:
        [T, N] of x's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check_shape("x", x, None, None)
    check_dtype("x", x, *FLOATS)
    check_shape("weight", weight, None, x.shape[1])
    check_dtype("weight", weight, x.dtype)
    check_device(x.device, weight=weight)
    if x.shape[0] == 0:
        return torch.empty((0, weight.shape[0]), dtype=x.dtype, device=x.device)
    return backend(x, weight)


LINEAR = Operation(
    "linear",
    linear,
    (
        Backend("native", "dsengine.kernels.linear.native:linear_native", ("cpu",), probe=needs_compiler),
        Backend("torch", "dsengine.kernels.linear.vendor:linear_torch"),
        Backend("ref", "dsengine.kernels.linear.ref:linear_ref"),
    ),
)
