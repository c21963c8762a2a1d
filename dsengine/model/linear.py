"""Linear layers, whose weight may be plain or block-FP8, and may hold several projections of the same input.

Everything above asks only for `layer(x)`; which form a checkpoint and a device allow is settled here when the layer
is built.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from dsengine.kernels.quant_fp8_group.ref import AMAX_FLOOR
from dsengine.kernels.registry import Kernels
from dsengine.model.activations import Activation
from dsengine.model.tensors import scale_shape
from dsengine.model.weights import FP8_BLOCK, Slot, WeightSlots
from dsengine.parallel.collectives import Group


class Linear:
    """y = x · Wᵀ, for one or several stored weights stacked on their output dimension.

    FP8 scales are stacked likewise. Where a stored weight's rows do not end at a block's edge, the next one's blocks do
    not continue its own; such layers are computed part by part.

    Args:
        in_features: width of the input.
        parts: output width by name of the stored weight [width, in_features], in the order of the outputs.
        cut_rows: parts of which each rank holds, and computes, its share of the outputs.
        cut_columns: each rank holds, and takes, its share of the input; the ranks' results add up to the layer's.
        over: the ranks that share it; None: those of the attention group.
        may_be_fp8: False for weights that are needed in the activations' dtype whatever the checkpoint holds.
    """

    def __init__(
        self,
        slots: WeightSlots,
        kernels: Kernels,
        in_features: int,
        parts: Mapping[str, int],
        may_be_fp8: bool = True,
        *,
        cut_rows: Collection[str] = (),
        cut_columns: bool = False,
        over: Group | None = None,
    ) -> None:
        self._kernels = kernels
        self._activations = slots.activations
        layout = slots.layout
        columns = layout.part(in_features, over) if cut_columns else slice(0, in_features)
        rows_of = {
            name: layout.part(width, over) if name in cut_rows else slice(0, width) for name, width in parts.items()
        }
        parts = {name: rows.stop - rows.start for name, rows in rows_of.items()}
        in_features = columns.stop - columns.start
        out_features = sum(parts.values())
        is_fp8 = may_be_fp8 and slots.keeps_fp8(list(parts))
        scale_rows = [scale_shape((width, in_features), FP8_BLOCK)[0] for width in parts.values()]
        self.scale: Tensor | None = None
        if is_fp8:
            self.weight = slots.empty_fp8(out_features, in_features)
            self.scale = slots.empty(sum(scale_rows), -(-in_features // FP8_BLOCK[1]), dtype=torch.float32)
        else:
            self.weight = slots.empty(out_features, in_features)
        self._parts: list[Slot] = []
        row = scale_row = 0
        for (name, width), rows in zip(parts.items(), scale_rows, strict=True):
            scale = None if self.scale is None else self.scale[scale_row : scale_row + rows]
            is_cut = not layout.is_single and (cut_columns or name in cut_rows)
            part = Slot(self.weight[row : row + width], scale, (rows_of[name], columns) if is_cut else None)
            slots.add(name, part)
            self._parts.append(part)
            row, scale_row = row + width, scale_row + rows
        self._one_product = all(width % FP8_BLOCK[0] == 0 for width in list(parts.values())[:-1])

    @property
    def takes_fp8(self) -> bool:
        """Whether the product is one of FP8 weights and FP8 activations."""
        return self.scale is not None and self._activations.is_fp8

    def __call__(self, x: Tensor | Activation) -> Tensor:
        """[T, in_features] → [T, sum of the parts' widths], of x's dtype."""
        activation = x if isinstance(x, Activation) else Activation(x)
        value = activation.value
        if self.scale is None:
            return self._kernels.linear(value, self.weight)
        if not self._activations.is_fp8:
            return self._product(value, None, value.dtype)
        codes, scale = activation.codes, activation.scale
        if codes is None or scale is None:
            codes, scale = self._kernels.quant_fp8_group(value, scale_fmt=self._activations.scale_fmt, floor=AMAX_FLOOR)
        return self._product(codes, scale, value.dtype)

    def multiply_fp8(self, codes: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        """The same for an input that exists in FP8 only; the layer must take FP8."""
        assert self.takes_fp8
        return self._product(codes, scale, out_dtype)

    def _product(self, x: Tensor, x_scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        gemm = self._kernels.gemm_fp8_block
        if self._one_product:
            assert self.scale is not None
            return gemm(x, self.weight, self.scale, x_scale, out_dtype=out_dtype)
        parts = []
        for part in self._parts:
            assert part.scale is not None
            parts.append(gemm(x, part.weight, part.scale, x_scale, out_dtype=out_dtype))
        return torch.cat(parts, dim=-1)
