"""Ways to choose the attention group of a request, so that the engine's own can be compared with simpler ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from dsengine.parallel.prefix_routing import PrefixRouter

RoutingName = Literal["prefix", "least_loaded", "round_robin"]


class Router(Protocol):
    """Chooses groups; told of what ends there."""

    def route(self, token_ids: Sequence[int], salt: str, loads: Sequence[int]) -> int:
        """The group for a prompt; `loads` are outstanding tokens of every group."""

    def finished(self, rank: int, token_ids: Sequence[int], salt: str) -> None:
        """A request of a group has ended with these tokens."""


class RoundRobin:
    """Each group in its turn."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._next = 0

    def route(self, token_ids: Sequence[int], salt: str, loads: Sequence[int]) -> int:
        chosen, self._next = self._next, (self._next + 1) % self.num_ranks
        return chosen

    def finished(self, rank: int, token_ids: Sequence[int], salt: str) -> None:
        pass


class LeastLoaded(RoundRobin):
    """The group with the fewest outstanding tokens; equal ones take turns."""

    def route(self, token_ids: Sequence[int], salt: str, loads: Sequence[int]) -> int:
        chosen = min(range(self.num_ranks), key=lambda rank: (loads[rank], (rank - self._next) % self.num_ranks))
        self._next = (chosen + 1) % self.num_ranks
        return chosen


def make_router(name: RoutingName, num_ranks: int, block_size: int, cache_blocks: int) -> Router:
    if name == "prefix":
        return PrefixRouter(num_ranks, block_size, cache_blocks)
    return LeastLoaded(num_ranks) if name == "least_loaded" else RoundRobin(num_ranks)
