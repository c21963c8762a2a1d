"""How the tokens of all ranks come to the routed experts, and the experts' sums back, in every MoE layer.

The ranks of an attention group have the same tokens, so each brings a share of them only; together the shares are the
tokens of the world. "Gather" brings every token to every rank: two collectives of fixed shapes, which CUDA graphs can
hold, and the only way where experts are cut. "All-to-all" brings a token once to each rank that holds some of its
experts, which is less wherever there are more ranks than experts per token; its shapes depend on the routing, which the
host has to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from dsengine.parallel.collectives import Group

Combine = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens, and the experts that each goes to.

    Attributes:
        x: [n, h], or only its FP8 codes and scales.
        weights: float32 [n, K]; None where K is 1 and whoever adds the results up weights them.
        places: int64 [n, K]; -1: none.
    """

    x: Tensor
    x_scale: Tensor | None
    weights: Tensor | None
    places: Tensor


@dataclass(frozen=True)
class TokenShares:
    """Which tokens of a pass each rank brings.

    Attributes:
        counts: tokens by rank of the world.
        own: this rank's rows among its group's tokens.
        width: rows of a full share of this rank's group; only the last shares are shorter.
    """

    counts: tuple[int, ...]
    own: slice
    width: int

    @property
    def num_tokens(self) -> int:
        """Of all ranks."""
        return sum(self.counts)

    @property
    def is_padded(self) -> bool:
        """Whether "gather" pads all shares to the longest, rather than summing over the shares end to end.

        Over a ring, gathering n rows of each of R ranks moves (R - 1) · n rows through every link, and summing N rows
        2 · (R - 1) / R · N; so padding is the cheaper one up to twice the rows. A step in which all groups run the
        same captured batch size needs no padding at all, and its shapes are the same at every replay.
        """
        return len(self.counts) * max(self.counts) <= 2 * self.num_tokens


@lru_cache(maxsize=256)
def token_shares(group_tokens: tuple[int, ...], group_size: int, rank: int) -> TokenShares:
    """Shares of all ranks.

    Args:
        group_tokens: tokens of each attention group.
        group_size: ranks of each.
        rank: this one, of the world.
    """
    counts: list[int] = []
    for tokens in group_tokens:
        width = -(-tokens // group_size)
        counts.extend(max(0, min(width, tokens - place * width)) for place in range(group_size))
    width = -(-group_tokens[rank // group_size] // group_size)
    start = min(rank % group_size * width, group_tokens[rank // group_size])
    return TokenShares(tuple(counts), slice(start, start + counts[rank]), width)


class TokenExchange(Protocol):
    def dispatch(self, rows: Tensor, places: Tensor, shares: TokenShares) -> tuple[Tensor, Combine]:
        """Bring tokens to experts.

        Args:
            rows: uint8 [n, bytes], this rank's share; a row of zeros must mean a token for no expert.
            places: int64 [n, K], where each token's experts lie: number of the place, counted over all ranks.
            shares: of all ranks.

        Returns:
            (uint8 [m, bytes], the rows that this rank computes on; what makes of this rank's results [m, h] the sums
            over all ranks [n, h] of the tokens that it brought).
        """


class GatherExchange:
    """Every token to every rank."""

    def __init__(self, world: Group) -> None:
        self._world = world

    def dispatch(self, rows: Tensor, places: Tensor, shares: TokenShares) -> tuple[Tensor, Combine]:
        return gather_tokens(self._world, rows, shares)


def gather_tokens(world: Group, rows: Tensor, shares: TokenShares) -> tuple[Tensor, Combine]:
    """Bring the shares of all ranks to every rank.

    Args:
        rows: [n, ...], this rank's share.

    Returns:
        ([m, ...], in the order of the ranks, where `is_padded` with rows of zeros after each shorter share; what makes
        of this rank's summands [m, h] the sums over all ranks [n, h] of the tokens that it brought).
    """
    own = len(rows)
    if shares.is_padded:
        padded = _padded(rows, max(shares.counts))
        return world.all_gather_rows(padded), lambda partial: world.reduce_scatter_rows(partial)[:own]
    first = sum(shares.counts[: world.rank])
    everything = rows.new_zeros((shares.num_tokens, *rows.shape[1:]))
    everything[first : first + own] = rows
    return world.all_reduce(everything), lambda partial: world.all_reduce(partial)[first : first + own]


class AllToAllExchange:
    """Every token once to each rank that holds some of its experts, over collectives that every backend has.

    Args:
        places_per_rank: experts that each rank holds.
    """

    def __init__(self, world: Group, places_per_rank: int) -> None:
        self._world = world
        self._places_per_rank = places_per_rank

    def dispatch(self, rows: Tensor, places: Tensor, shares: TokenShares) -> tuple[Tensor, Combine]:
        world, own = self._world, len(rows)
        goes_to = torch.zeros((world.size, own), dtype=torch.bool, device=rows.device)
        goes_to.scatter_(0, (places // self._places_per_rank).t(), True)
        tokens = goes_to.nonzero()[:, 1]
        sent, received = self._counts(goes_to.sum(1))
        arrived = world.all_to_all_rows(rows[tokens], sent, received)

        def combine(partial: Tensor) -> Tensor:
            back = world.all_to_all_rows(partial, received, sent)
            total = torch.zeros((own, partial.shape[1]), dtype=torch.float32, device=partial.device)
            # Rank by rank, in which no token occurs twice: the order of the sum is the same every time.
            for part, of in zip(back.split(sent), tokens.split(sent), strict=True):
                total.index_add_(0, of, part.float())
            return total.to(partial.dtype)

        return arrived, combine

    def _counts(self, sent: Tensor) -> tuple[list[int], list[int]]:
        ones = [1] * self._world.size
        received = self._world.all_to_all_rows(sent, ones, ones)
        both: list[list[int]] = torch.stack((sent, received)).tolist()
        return both[0], both[1]


def _padded(rows: Tensor, count: int) -> Tensor:
    if len(rows) == count:
        return rows
    padded = rows.new_zeros((count, *rows.shape[1:]))
    padded[: len(rows)] = rows
    return padded


def sum_over_group(group: Group, shared: Tensor | None, routed: Tensor, num_tokens: int, shares: TokenShares) -> Tensor:
    """Bring together what the ranks of an attention group have for their tokens.

    Args:
        shared: [T, h], each rank's part of a sum over the group, for all its tokens.
        routed: [n, h], complete, for this rank's share of the tokens.
        num_tokens: T.

    Returns:
        [T, h], the sum of both, the same on every rank of the group.
    """
    own = _padded(routed, shares.width)
    if shared is not None:
        own = own + group.reduce_scatter_rows(_padded(shared, group.size * shares.width))
    return group.all_gather_rows(own)[:num_tokens]


def group_tokens(num_tokens: int, rank_tokens: Sequence[int] | None, dp_size: int, dp_rank: int) -> tuple[int, ...]:
    """The tokens of every attention group, checked against this one's own."""
    if rank_tokens is None:
        assert dp_size == 1, "with several attention groups, the batch says how many tokens each has"
        return (num_tokens,)
    assert len(rank_tokens) == dp_size, f"{len(rank_tokens)} counts of tokens for {dp_size} attention groups"
    assert rank_tokens[dp_rank] == num_tokens, f"rank_tokens is {rank_tokens}, but there are {num_tokens} tokens here"
    return tuple(rank_tokens)
