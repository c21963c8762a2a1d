"""A token on its way to experts on other ranks: one row of bytes, so that one collective carries all there is to it."""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.model.activations import Activation
from dsengine.parallel.exchange import RoutedTokens


class TokenRows:
    """Packs and unpacks rows.

    Args:
        takes_fp8: the experts' input is FP8, which is what travels then: half the bytes of bfloat16.
    """

    def __init__(self, hidden_size: int, top_k: int, dtype: torch.dtype, *, takes_fp8: bool) -> None:
        self._dtype = torch.float8_e4m3fn if takes_fp8 else dtype
        groups = -(-hidden_size // 128) if takes_fp8 else 0
        values = hidden_size * self._dtype.itemsize  # hidden sizes are multiples of 16, and so all parts are aligned
        self._widths = (
            values,
            _aligned(4 * groups),
            _aligned(4 * top_k),
            _aligned(4 * top_k),
        )
        self._groups, self._top_k = groups, top_k

    @property
    def num_bytes(self) -> int:
        """Of one row."""
        return sum(self._widths)

    def pack(self, x: Activation, weights: Tensor, places: Tensor) -> Tensor:
        """uint8 [n, num_bytes]; all zeros would be a token that goes nowhere."""
        rows = torch.zeros((len(places), self.num_bytes), dtype=torch.uint8, device=places.device)
        value, scale, weight, place = rows.split(self._widths, dim=1)
        if self._groups:
            assert x.codes is not None and x.scale is not None, "the norm before FP8 experts quantises"
            value.copy_(x.codes.contiguous().view(torch.uint8))
            scale[:, : 4 * self._groups].copy_(_bytes(x.scale))
        else:
            value.copy_(_bytes(x.value))
        weight[:, : 4 * self._top_k].copy_(_bytes(weights))
        place[:, : 4 * self._top_k].copy_(_bytes((places + 1).to(torch.int32)))
        return rows

    def unpack(self, rows: Tensor) -> RoutedTokens:
        """What was packed."""
        value, scale, weight, place = rows.split(self._widths, dim=1)
        return RoutedTokens(
            x=value.contiguous().view(self._dtype),
            x_scale=_view(scale, self._groups, torch.float32) if self._groups else None,
            weights=_view(weight, self._top_k, torch.float32),
            places=_view(place, self._top_k, torch.int32).long() - 1,
        )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _view(part: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return part[:, : 4 * count].contiguous().view(dtype)
