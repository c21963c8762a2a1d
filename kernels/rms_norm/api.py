"""RMS normalisation, alone and fused with its neighbours in a decoder layer: the residual addition before it, the FP8
quantisation of what it feeds to the next product after it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsengine.kernels.backend import Backend, Operation
from dsengine.kernels.capability import needs_fp8_tensor_cores
from dsengine.kernels.checks import FLOATS, check_device, check_dtype, check_shape
from dsengine.kernels.native_support import needs_compiler
from dsengine.kernels.quant_fp8_group.api import ScaleFormat, check_scale_fmt, empty_groups
from dsengine.kernels.rms_norm.ref import add_rms_norm_quant_ref, add_rms_norm_ref, rms_norm_quant_ref, rms_norm_ref


class RmsNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class AddRmsNorm(Protocol):
    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...


class RmsNormQuant(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, *, scale_fmt: ScaleFormat | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class AddRmsNormQuant(Protocol):
    def __call__(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, scale_fmt: ScaleFormat | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


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
    _check_residual(x, residual)
    if x.shape[0] == 0:
        return torch.empty_like(x), torch.empty_like(x)
    return backend(x, residual, weight, eps)


def rms_norm_quant(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    scale_fmt: ScaleFormat | None = None,
    backend: RmsNormQuant = rms_norm_quant_ref,
) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm and, in the same pass, the quantisation of its rounded result: codes and scale are exactly
    quant_fp8_group(normed).

    Args:
        x, weight, eps: as for `rms_norm`.
        scale_fmt: as for `quant_fp8_group`.

    Returns:
        (normed [T, D] of x's dtype, codes float8_e4m3fn [T, D], scale float32 [T, ⌈D/128⌉]).

    Raises:
        ValueError: a shape, dtype or device does not fit, or `scale_fmt` is unknown.
    """
    _check(x, weight)
    check_scale_fmt(scale_fmt)
    if x.shape[0] == 0:
        return torch.empty_like(x), *empty_groups(x.shape[0], x.shape[1], x.device)
    return backend(x, weight, eps, scale_fmt=scale_fmt)


def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    scale_fmt: ScaleFormat | None = None,
    backend: AddRmsNormQuant = add_rms_norm_quant_ref,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """add_rms_norm and, in the same pass, the quantisation of its rounded norm, as in `rms_norm_quant`.

    Args:
        x, residual, weight, eps: as for `add_rms_norm`.
        scale_fmt: as for `quant_fp8_group`.

    Returns:
        (normed, codes, scale, new_residual); shapes and dtypes as in `rms_norm_quant` and `add_rms_norm`.

    Raises:
        ValueError: a shape, dtype or device does not fit, or `scale_fmt` is unknown.
    """
    _check(x, weight)
    _check_residual(x, residual)
    check_scale_fmt(scale_fmt)
    if x.shape[0] == 0:
        return torch.empty_like(x), *empty_groups(x.shape[0], x.shape[1], x.device), torch.empty_like(x)
    return backend(x, residual, weight, eps, scale_fmt=scale_fmt)


def _check_residual(x: Tensor, residual: Tensor) -> None:
    check_shape("residual", residual, *x.shape)
    check_dtype("residual", residual, x.dtype)
    check_device(x.device, residual=residual)


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
        Backend("triton", "dsengine.kernels.rms_norm.triton:rms_norm_triton", ("cuda",), ("triton",)),
        Backend("native", "dsengine.kernels.rms_norm.native:rms_norm_native", ("cpu",), probe=needs_compiler),
        Backend("cpu", "dsengine.kernels.rms_norm.cpu:rms_norm_cpu", ("cpu",)),
        Backend("ref", "dsengine.kernels.rms_norm.ref:rms_norm_ref"),
    ),
)
ADD_RMS_NORM = Operation(
    "add_rms_norm",
    add_rms_norm,
    (
        Backend("triton", "dsengine.kernels.rms_norm.triton:add_rms_norm_triton", ("cuda",), ("triton",)),
        Backend("native", "dsengine.kernels.rms_norm.native:add_rms_norm_native", ("cpu",), probe=needs_compiler),
        Backend("cpu", "dsengine.kernels.rms_norm.cpu:add_rms_norm_cpu", ("cpu",)),
        Backend("ref", "dsengine.kernels.rms_norm.ref:add_rms_norm_ref"),
    ),
)
RMS_NORM_QUANT = Operation(
    "rms_norm_quant",
    rms_norm_quant,
    (
        Backend(
            "triton",
            "dsengine.kernels.rms_norm.triton:rms_norm_quant_triton",
            ("cuda",),
            ("triton",),
            needs_fp8_tensor_cores,
        ),
        Backend("ref", "dsengine.kernels.rms_norm.ref:rms_norm_quant_ref"),
    ),
)
ADD_RMS_NORM_QUANT = Operation(
    "add_rms_norm_quant",
    add_rms_norm_quant,
    (
        Backend(
            "triton",
            "dsengine.kernels.rms_norm.triton:add_rms_norm_quant_triton",
            ("cuda",),
            ("triton",),
            needs_fp8_tensor_cores,
        ),
        Backend("ref", "dsengine.kernels.rms_norm.ref:add_rms_norm_quant_ref"),
    ),
)
