"""RMS normalisation, alone and fused with the residual addition that precedes it in every decoder layer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsengine.kernels.backend import Backend, Operation
from dsengine.kernels.checks import FLOATS, check_device, check_dtype, check_shape
from dsengine.kernels.rms_norm.ref import add_rms_norm_ref, rms_norm_ref


class RmsNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class AddRmsNorm(Protocol):
    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: RmsNorm = rms_norm_ref) -> Tensor:
    """x · rsqrt(mean(x²) + eps) · weight over the last dimension, computed in float32.

    Args:
        x: float [T, D]; the last dimension has stride 1, rows may be strided (a slice of a wider projection).
        weight: float [D], of any float dtype.
        eps: added to the mean square.

    Returns:
        [T, D] of x's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check(x, weight)
    if x.shape[0] == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return backend(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: AddRmsNorm = add_rms_norm_ref
) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and normalises the sum: (rms_norm(x + residual), x + residual).

    The sum is taken in float32; the norm sees it unrounded, the returned stream is rounded to x's dtype. That is the
    arithmetic of DeepSeek-V3.2's published inference code.

    Args:
        x: float [T, D], output of attention or of the feed-forward part.
        residual: [T, D] of x's dtype.
        weight: float [D].
        eps: added to the mean square.

    Returns:
        (normed, new_residual), both [T, D] of x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check(x, weight)
    check_shape("residual", residual, *x.shape)
    check_dtype("residual", residual, x.dtype)
    check_device(x.device, residual=residual)
    if x.shape[0] == 0:
        return torch.empty_like(x), torch.empty_like(x)
    return backend(x, residual, weight, eps)


def _check(x: Tensor, weight: Tensor) -> None:
    check_shape("x", x, None, None)
    check_dtype("x", x, *FLOATS)
    check_shape("weight", weight, x.shape[1])
    check_dtype("weight", weight, *FLOATS)
    check_device(x.device, weight=weight)


RMS_NORM = Operation(
    "rms_norm",
    rms_norm,
    (
        Backend("cpu", "dsengine.kernels.rms_norm.cpu:rms_norm_cpu", ("cpu",)),
        Backend("ref", "dsengine.kernels.rms_norm.ref:rms_norm_ref"),
    ),
)
ADD_RMS_NORM = Operation(
    "add_rms_norm",
    add_rms_norm,
    (
        Backend("cpu", "dsengine.kernels.rms_norm.cpu:add_rms_norm_cpu", ("cpu",)),
        Backend("ref", "dsengine.kernels.rms_norm.ref:add_rms_norm_ref"),
    ),
)
