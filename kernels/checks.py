"""Argument checks shared by the operations: each names the tensor, what it is and what it should be.

The checks read only what lies on the host (shapes, dtypes, devices), so they never wait for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP8 = (torch.float8_e4m3fn,)
INTS = (torch.int32, torch.int64)


def check_shape(name: str, tensor: Tensor, *sizes: int | None) -> None:
    """`tensor` has these sizes; None stands for any.

    Raises:
        ValueError: it does not.
    """
    shape = tensor.shape
    if shape == sizes:
        return
    fits = len(shape) == len(sizes)
    if fits:
        for have, want in zip(shape, sizes, strict=True):  # a loop: an `any` of a generator takes twice as long
            if want is not None and have != want:
                fits = False
                break
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name} has shape {list(shape)}; expected [{wanted}]")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """`tensor` has one of these dtypes.

    Raises:
        ValueError: it does not.
    """
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected {' or '.join(str(dtype) for dtype in allowed)}")


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """All `tensors` lie on `device`.

    Raises:
        ValueError: one does not.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} lies on {tensor.device}; expected {device}")


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
