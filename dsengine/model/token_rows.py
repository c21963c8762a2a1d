"""A token on its way to other ranks: one row of bytes, so that one collective carries all there is to it."""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.model.activations import Activation
from dsengine.parallel.exchange import RoutedTokens


class ActivationRows:
    """Packs and unpacks rows that hold a layer's input.

    Args:
        takes_fp8: the layer takes FP8, which is what travels then: half the bytes of bfloat16.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, *, takes_fp8: bool) -> None:
        self._dtype = torch.float8_e4m3fn if takes_fp8 else dtype
        self._groups = -(-hidden_size // 128) if takes_fp8 else 0
        # Hidden sizes are multiples of 16, and so all parts are aligned.
        self._widths = (hidden_size * self._dtype.itemsize, _aligned(4 * self._groups))

    @property
    def num_bytes(self) -> int:
        """Of one row."""
        return sum(self._widths)

    def pack(self, x: Activation) -> Tensor:
        """uint8 [n, num_bytes]."""
        rows = torch.zeros((len(x.value), self.num_bytes), dtype=torch.uint8, device=x.value.device)
        self.write(x, rows)
        return rows

    def write(self, x: Activation, rows: Tensor) -> None:
        """Into rows of zeros."""
        value, scale = rows.split(self._widths, dim=1)
        if self._groups:
            assert x.codes is not None and x.scale is not None, "the norm before FP8 layers quantises"
            value.copy_(x.codes.contiguous().view(torch.uint8))
            scale[:, : 4 * self._groups].copy_(_bytes(x.scale))
        else:
            value.copy_(_bytes(x.value))

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """What was packed: values, or FP8 codes and their scales."""
        value, scale = rows.split(self._widths, dim=1)
        return (
            value.contiguous().view(self._dtype),
            _view(scale, self._groups, torch.float32) if self._groups else None,
        )


class TokenRows:
    """Packs and unpacks rows for experts.

    Args:
        takes_fp8: the experts' input is FP8.
    """

    def __init__(self, hidden_size: int, top_k: int, dtype: torch.dtype, *, takes_fp8: bool) -> None:
        self._input = ActivationRows(hidden_size, dtype, takes_fp8=takes_fp8)
        self._widths = (self._input.num_bytes, _aligned(4 * top_k), _aligned(4 * top_k))
        self._top_k = top_k

    @property
    def num_bytes(self) -> int:
        """Of one row."""
        return sum(self._widths)

    def pack(self, x: Activation, weights: Tensor, places: Tensor) -> Tensor:
        """uint8 [n, num_bytes]; all zeros would be a token that goes nowhere."""
        rows = torch.zeros((len(places), self.num_bytes), dtype=torch.uint8, device=places.device)
        own, weight, place = rows.split(self._widths, dim=1)
        self._input.write(x, own)
        weight[:, : 4 * self._top_k].copy_(_bytes(weights))
        place[:, : 4 * self._top_k].copy_(_bytes((places + 1).to(torch.int32)))
        return rows

    def unpack(self, rows: Tensor) -> RoutedTokens:
        """What was packed."""
        own, weight, place = rows.split(self._widths, dim=1)
        x, x_scale = self._input.unpack(own)
        return RoutedTokens(
            x=x,
            x_scale=x_scale,
            weights=_view(weight, self._top_k, torch.float32),
            places=_view(place, self._top_k, torch.int32).long() - 1,
        )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _view(part: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return part[:, : 4 * count].contiguous().view(dtype)
