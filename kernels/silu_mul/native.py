"""The gated activation of a few rows in one call of C."""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.native_support import Integer, Pointer, c_function
from dsengine.kernels.silu_mul.cpu import silu_mul_cpu

MAX_ROWS = 256  # with more, torch's threads make up for its calls

_silu_mul = c_function("silu_mul", Pointer, Integer, Pointer, Integer, Integer)


def silu_mul_native(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape
    if rows > MAX_ROWS or gate_up.dtype != torch.float32 or gate_up.stride(1) != 1:
        return silu_mul_cpu(gate_up)
    out = torch.empty((rows, width // 2))
    _silu_mul(gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), rows, width // 2)
    return out
