"""Memory for weights, and the register of which stored tensor fills which part of it.

A module allocates its parameters when it is built and names, for each, the checkpoint tensors that fill it: stacked
experts and fused projections are filled slice by slice, so a checkpoint streams in without a second copy of anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsengine.model.activations import FLOAT_ACTIVATIONS, ActivationFormat
from dsengine.model.tensors import scale_shape
from dsengine.parallel.layout import Layout

FP8_BLOCK = (128, 128)


@dataclass(frozen=True)
class Slot:
    """Destination of one stored weight: a view of a parameter, and one of its scales where it stays FP8.

    Attributes:
        cut: the rows, or rows and columns, of the stored weight that go there; None: all of it. Where the weight stays
            FP8 they start at blocks' edges.
    """

    weight: Tensor
    scale: Tensor | None = None
    cut: tuple[slice, ...] | None = None


class WeightSlots:
    """Allocates parameters and remembers their slots.

    Args:
        device: where parameters live.
        dtype: type of activations and of every weight that is neither FP8 nor kept in float32.
        fp8_weights: stored tensors that stay FP8 if the module they belong to can compute with FP8.
        activations: what the layers of such weights are given as input.
        layout: how the model is spread over ranks; None: it is not.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        fp8_weights: frozenset[str] = frozenset(),
        activations: ActivationFormat = FLOAT_ACTIVATIONS,
        layout: Layout | None = None,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.activations = activations
        self.layout = layout or Layout()
        self.by_name: dict[str, Slot] = {}
        self.elsewhere: set[str] = set()
        self._fp8_weights = fp8_weights

    def add(self, name: str, slot: Slot) -> None:
        assert name not in self.by_name, f"two parameters want {name}"
        self.by_name[name] = slot

    def leave(self, *names: str) -> None:
        """Stored tensors that other ranks hold."""
        self.elsewhere.update(names)

    def move(self, here: Mapping[str, Slot], elsewhere: Collection[str]) -> None:
        """Some stored tensors belong to other places from now on: to these, or on other ranks."""
        for name in elsewhere:
            self.by_name.pop(name, None)
        self.elsewhere.update(elsewhere)
        self.by_name.update(here)
        self.elsewhere.difference_update(here)

    def keeps_fp8(self, names: Sequence[str]) -> bool:
        """Whether a parameter made of these tensors stays FP8: all of them must be stored so."""
        return all(name in self._fp8_weights for name in names)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A parameter that one stored tensor fills."""
        parameter = self.empty(*shape, dtype=dtype)
        self.add(name, Slot(parameter))
        return parameter

    def empty_fp8(self, *shape: int) -> Tensor:
        return self.empty(*shape, dtype=torch.float8_e4m3fn)

    def empty_scales(self, *leading: int, rows: int, columns: int) -> Tensor:
        """float32 scales of FP8 weights [*leading, rows, columns]."""
        return self.empty(*leading, *scale_shape((rows, columns), FP8_BLOCK), dtype=torch.float32)
