"""RMS normalisation in C: on few rows a call of torch costs more than the arithmetic, and this is one, not six."""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.native_support import Integer, Pointer, Real, c_function
from dsengine.kernels.rms_norm.cpu import add_rms_norm_cpu, rms_norm_cpu

MAX_ROWS = 256  # with more, torch's threads make up for its calls

_rms_norm = c_function("rms_norm", Pointer, Integer, Pointer, Real, Pointer, Integer, Integer)
_add_rms_norm = c_function("add_rms_norm", Pointer, Pointer, Pointer, Real, Pointer, Pointer, Integer, Integer)


def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, width = x.shape
    if rows > MAX_ROWS or not (x.dtype == weight.dtype == torch.float32 and x.stride(1) == 1):
        return rms_norm_cpu(x, weight, eps)
    out = torch.empty((rows, width))
    _rms_norm(x.data_ptr(), x.stride(0), weight.data_ptr(), eps, out.data_ptr(), rows, width)
    return out


def add_rms_norm_native(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    if rows > MAX_ROWS or not (x.dtype == weight.dtype == torch.float32):
        return add_rms_norm_cpu(x, residual, weight, eps)
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty((2, rows, width)).unbind()
    pointers = (x.data_ptr(), residual.data_ptr(), weight.data_ptr())
    _add_rms_norm(*pointers, eps, out.data_ptr(), total.data_ptr(), rows, width)
    return out, total
