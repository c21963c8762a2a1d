"""Finds, on a CPU, what would make the host wait for a GPU: numbers that it asks for, shapes that depend on them, and
tensors made of Python numbers, whose copy from ordinary memory waits for all that was queued before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsengine.kernels.registry import OPERATIONS, Kernels

_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}


class HostWaits(TorchDispatchMode):
    """Watches all that torch is asked to do, but for what happens inside of kernels, whose GPU backends are others.

    Attributes:
        found: names of operations that would have waited, where `with` was entered.
        num_launches: operations that are a kernel on a GPU, or more.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.num_launches = 0
        self._is_inside_kernel = False
        self._patch = pytest.MonkeyPatch()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._is_inside_kernel:
            name = func._schema.name.removeprefix("aten::")
            by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
                index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
            )
            counts = name == "repeat_interleave" and func._overloadname != "self_int"
            if by_mask or counts or name in _WAITS:
                self.found.append(name)
            is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            self.num_launches += not is_view and not name.startswith(("empty", "new_empty", "_unsafe_view"))
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> HostWaits:
        # These are no operations that a mode would see.
        self._patch.setattr(torch, "tensor", self._found("torch.tensor", torch.tensor))
        for name in ("tolist", "numpy", "cpu"):
            self._patch.setattr(torch.Tensor, name, self._found(name, getattr(torch.Tensor, name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patch.undo()

    def _found(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._is_inside_kernel:
                self.found.append(name)
            return function(*args, **kwargs)

        return call

    def watched(self, kernels: Kernels) -> Kernels:
        """The same kernels, each a launch."""
        opaque: dict[str, Any] = {op.name: self._opaque(getattr(kernels, op.name)) for op in OPERATIONS}
        return replace(kernels, **opaque)

    def _opaque(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.num_launches += 1
            self._is_inside_kernel = True
            try:
                return kernel(*args, **kwargs)
            finally:
                self._is_inside_kernel = False

        return call
