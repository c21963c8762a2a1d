"""How a layer's tokens travel to experts on other ranks: as rows of bytes over torch's collectives, or by DeepEP."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsengine.model.activations import Activation, ActivationFormat
from dsengine.model.config import ModelConfig
from dsengine.model.token_rows import TokenRows
from dsengine.model.weights import WeightSlots
from dsengine.parallel.deep_ep import DeepEp
from dsengine.parallel.exchange import (
    AllToAllExchange,
    Combine,
    GatherExchange,
    RoutedTokens,
    TokenExchange,
    TokenShares,
)
from dsengine.parallel.layout import Layout


class ExpertExchange(Protocol):
    def dispatch(
        self, x: Activation, weights: Tensor, places: Tensor, shares: TokenShares
    ) -> tuple[RoutedTokens, Combine]:
        """Bring tokens to experts.

        Args:
            x: [n, h], this rank's share.
            weights: float32 [n, K].
            places: int64 [n, K], where each token's experts lie: number of the place, counted over all ranks.
            shares: of all ranks.

        Returns:
            (the m rows that this rank computes on, with places counted from this rank's first; what makes of this
            rank's results [m, h] the sums over all ranks [n, h] of the tokens that it brought).
        """


class RowExchange:
    """Over collectives.

    Args:
        first, count: this rank's places.
    """

    def __init__(self, layout: Layout, exchange: TokenExchange, rows: TokenRows, first: int, count: int) -> None:
        self._layout, self._exchange, self._rows = layout, exchange, rows
        self._first, self._count = first, count

    def dispatch(
        self, x: Activation, weights: Tensor, places: Tensor, shares: TokenShares
    ) -> tuple[RoutedTokens, Combine]:
        arrived, combine = self._exchange.dispatch(self._rows.pack(x, weights, places), places, shares)
        tokens = self._rows.unpack(arrived)
        here = local_places(self._layout, tokens.places, self._first, self._count)
        return RoutedTokens(tokens.x, tokens.x_scale, tokens.weights, here), combine


class DeepEpExchange:
    """By DeepEP: by its low-latency kernels where no rank brings more than they take, which all ranks know alike.

    Args:
        activations: as the experts take them.
    """

    def __init__(self, deep_ep: DeepEp, activations: ActivationFormat) -> None:
        self._deep_ep, self._activations = deep_ep, activations

    def dispatch(
        self, x: Activation, weights: Tensor, places: Tensor, shares: TokenShares
    ) -> tuple[RoutedTokens, Combine]:
        takes_fp8 = self._activations.is_fp8
        if max(shares.counts) <= self._deep_ep.low_latency_tokens:
            rounds_scale = self._activations.scale_fmt == "ue8m0"
            return self._deep_ep.dispatch_low_latency(
                x.value, weights, places, quantises=takes_fp8, rounds_scale=rounds_scale
            )
        quantised = None
        if takes_fp8:
            assert x.codes is not None and x.scale is not None, "the norm before FP8 experts quantises"
            quantised = x.codes, x.scale
        return self._deep_ep.dispatch(x.value, quantised, weights, places)


def exchange_of(
    slots: WeightSlots, config: ModelConfig, first: int, count: int, takes_fp8: bool
) -> ExpertExchange | None:
    """A layer's; None where every rank has all tokens.

    Args:
        first, count: this rank's places of experts.
        takes_fp8: the experts' input is FP8.
    """
    layout = slots.layout
    if layout.deep_ep is not None:
        layout.deep_ep.open(config.hidden_size, count * layout.world.size, slots.device)
        return DeepEpExchange(layout.deep_ep, slots.activations if takes_fp8 else ActivationFormat())
    exchange: TokenExchange
    if layout.moe_exchange == "all_to_all" and not layout.is_single:
        exchange = AllToAllExchange(layout.world, count)
    elif layout.dp_size > 1:
        exchange = GatherExchange(layout.world)
    else:
        return None
    rows = TokenRows(config.hidden_size, config.num_experts_per_tok, slots.dtype, takes_fp8=takes_fp8)
    return RowExchange(layout, exchange, rows, first, count)


def local_places(layout: Layout, places: Tensor, first: int, count: int) -> Tensor:
    """Places counted over all ranks, as counted from this rank's first; -1 for those of others.

    Args:
        first, count: this rank's.
    """
    if layout.is_single or not layout.experts_whole:
        return places
    here = places - first
    return torch.where((here >= 0) & (here < count), here, -1)
