"""The gated activation between an MLP's two products, alone and fused with the quantisation of its result."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dsengine.kernels.backend import Backend, Operation
from dsengine.kernels.capability import needs_fp8_tensor_cores
from dsengine.kernels.checks import FLOATS, check_dtype, check_shape
from dsengine.kernels.native_support import needs_compiler
from dsengine.kernels.quant_fp8_group.api import ScaleFormat, check_scale_fmt, empty_groups
from dsengine.kernels.silu_mul.ref import silu_mul_quant_ref, silu_mul_ref


class SiluMul(Protocol):
    def __call__(self, gate_up: Tensor) -> Tensor: ...


class SiluMulQuant(Protocol):
    def __call__(self, gate_up: Tensor, *, scale_fmt: ScaleFormat | None) -> tuple[Tensor, Tensor]: ...


def silu_mul(gate_up: Tensor, *, backend: SiluMul = silu_mul_ref) -> Tensor:
    """silu(gate) · up, computed in float32 and rounded once.

    Args:
        gate_up: float [T, 2I]: I columns of gate, then I of up; rows may be strided.

    Returns:
        [T, I] of gate_up's dtype, contiguous.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _check(gate_up)
    if gate_up.numel() == 0:
        return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
    return backend(gate_up)


def silu_mul_quant(
    gate_up: Tensor, *, scale_fmt: ScaleFormat | None = None, backend: SiluMulQuant = silu_mul_quant_ref
) -> tuple[Tensor, Tensor]:
    """quant_fp8_group(silu_mul(gate_up)): what is quantised has first been rounded to gate_up's dtype.

    Args:
        gate_up: as for `silu_mul`.
        scale_fmt: as for `quant_fp8_group`.

    Returns:
        (codes float8_e4m3fn [T, I], scale float32 [T, ⌈I/128⌉]).

    Raises:
        ValueError: a shape or dtype does not fit, or `scale_fmt` is unknown.
    """
    _check(gate_up)
    check_scale_fmt(scale_fmt)
    if gate_up.numel() == 0:
        return empty_groups(gate_up.shape[0], gate_up.shape[1] // 2, gate_up.device)
    return backend(gate_up, scale_fmt=scale_fmt)


def _check(gate_up: Tensor) -> None:
    check_shape("gate_up", gate_up, None, None)
    check_dtype("gate_up", gate_up, *FLOATS)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns; gate and up have equally many, so it must be even")


SILU_MUL = Operation(
    "silu_mul",
    silu_mul,
    (
        Backend("triton", "dsengine.kernels.silu_mul.triton:silu_mul_triton", ("cuda",), ("triton",)),
        Backend("native", "dsengine.kernels.silu_mul.native:silu_mul_native", ("cpu",), probe=needs_compiler),
        Backend("cpu", "dsengine.kernels.silu_mul.cpu:silu_mul_cpu", ("cpu",)),
        Backend("ref", "dsengine.kernels.silu_mul.ref:silu_mul_ref"),
    ),
)
SILU_MUL_QUANT = Operation(
    "silu_mul_quant",
    silu_mul_quant,
    (
        Backend(
            "triton",
            "dsengine.kernels.silu_mul.triton:silu_mul_quant_triton",
            ("cuda",),
            ("triton",),
            needs_fp8_tensor_cores,
        ),
        Backend("ref", "dsengine.kernels.silu_mul.ref:silu_mul_quant_ref"),
    ),
)
