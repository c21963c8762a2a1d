"""Trees whose tokens are drawn from the drafter's distribution, for acceptance by rejection.

Rejection is lossless only if nothing but the draws themselves depends on the draws. Which nodes a tree has is therefore
settled beforehand, from its size alone: the children of a node are its first, second, … draw without replacement, and
the nodes kept are the likeliest if a first draw is accepted with a usual rate and each further one half as often as the
one before it. Where a distribution holds fewer tokens than draws, the rest of the draws match nothing.

A draw is a function of the request's seed and of the position that its token would have. All nodes of one depth share
their numbers, which is sound because a verification reaches at most one of them; and a number is used up only in the
step that settles the token of its position.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from dsengine.kernels.sample.ref import invert_cdf, uniform
from dsengine.model.transfer import upload
from dsengine.specdec.shape import TreeShape
from dsengine.specdec.tree import DrawnFrom, TokenTree

MOST_DRAWS = 1 << 10
"""Largest number of children that one node may have."""

_FIRST_RATE = 0.7
_LANES = 4 * MOST_DRAWS  # numbers of one position
_TRIES = MOST_DRAWS  # the first lane of those that decide about drafts
_LAST = 2 * MOST_DRAWS  # the lane of the token drawn behind the last accepted draft
_FIRST_COUNTER = 1 << 40  # behind all positions, whose numbers plain sampling uses


@dataclass(frozen=True)
class DrawSource:
    """What draws depend on, beside the distribution.

    Attributes:
        temperature: float32 [B]; 0 takes the likeliest tokens instead of drawing.
        seeds: int64 [B].
        positions: int64 [B], output position of the token after the root.
    """

    temperature: Tensor
    seeds: Tensor
    positions: Tensor

    def draft(self, depth: int, index: int) -> Tensor:
        """float64 [B], for the draw number `index` among the children of nodes at this depth."""
        return self._number(depth, index)

    def tries(self, max_depth: int, topk: int) -> Tensor:
        """float64 [B, max_depth + 1, topk + 1], for `reject`."""
        lanes = [*range(_TRIES, _TRIES + topk), _LAST]
        by_depth = [torch.stack([self._number(depth, lane) for lane in lanes], 1) for depth in range(max_depth + 1)]
        return torch.stack(by_depth, dim=1)

    def _number(self, depth: int, lane: int) -> Tensor:
        return uniform(self.seeds, (self.positions + depth) * _LANES + (_FIRST_COUNTER + lane))


@dataclass(frozen=True)
class RankTree:
    """The nodes of drawn trees of one size, parents first, siblings in the order of their draws.

    Attributes:
        parents, depths: of each node; -1 and 0 for the root.
        ranks: of each node, which of its parent's draws it is; 0 for the root.
        generations: by depth, the nodes that have children; no more than `topk` each.
    """

    parents: tuple[int, ...]
    depths: tuple[int, ...]
    ranks: tuple[int, ...]
    generations: tuple[tuple[int, ...], ...]

    @property
    def expanded(self) -> list[int]:
        """All nodes that have children, in the order in which they are expanded."""
        return [node for generation in self.generations for node in generation]


@lru_cache(maxsize=64)
def rank_tree(shape: TreeShape) -> RankTree:
    """The nodes of drawn trees of this size."""
    kept: set[tuple[int, ...]] = {()}
    parents: list[set[tuple[int, ...]]] = [set() for _ in range(shape.steps)]
    waiting: list[tuple[float, tuple[int, ...]]] = []

    def await_node(path: tuple[int, ...]) -> None:
        if len(path) <= shape.steps and path[-1] < shape.topk:
            heapq.heappush(waiting, (-math.prod(map(_usual_rate, path)), path))

    await_node((0,))
    while len(kept) < shape.num_nodes:
        _, path = heapq.heappop(waiting)
        depth, parent = len(path), path[:-1]
        generation = parents[depth - 1]
        if parent not in generation and len(generation) == shape.topk:
            continue
        generation.add(parent)
        kept.add(path)
        await_node((*parent, path[-1] + 1))
        await_node((*path, 0))
    order = sorted(kept, key=lambda path: (len(path), path))
    places = {path: place for place, path in enumerate(order)}
    return RankTree(
        parents=tuple(places[path[:-1]] if path else -1 for path in order),
        depths=tuple(map(len, order)),
        ranks=tuple(path[-1] if path else 0 for path in order),
        generations=tuple(tuple(sorted(places[path] for path in generation)) for generation in parents if generation),
    )


def _usual_rate(rank: int) -> float:
    return _FIRST_RATE if rank == 0 else (1 - _FIRST_RATE) * 0.5**rank


@dataclass(frozen=True)
class _Expansion:
    """How the nodes of one depth get their children.

    Attributes:
        nodes: int64 [F], those of that depth that have children.
        num_draws: of each of them.
        picks: int64 [n], which of the F · num_draws draws become nodes.
        parents: int64 [n], of those.
    """

    nodes: Tensor
    num_draws: int
    picks: Tensor
    parents: Tensor


@dataclass(frozen=True)
class _Layout:
    """A `RankTree` on a device.

    Attributes:
        nothing: int64 [0], the nodes after the last expansion.
        depths: int64 [N].
        rows: int64 [N], as in `DrawnFrom`.
        expansions: by depth.
    """

    nothing: Tensor
    depths: Tensor
    rows: Tensor
    expansions: tuple[_Expansion, ...]


@cache  # captured steps hold the addresses of these tensors
def _layout(shape: TreeShape, device: torch.device) -> _Layout:
    def on_device(values: Sequence[int]) -> Tensor:
        return upload(np.array(values, dtype=np.int64), device)

    tree = rank_tree(shape)
    rows = [0] * len(tree.depths)
    for row, node in enumerate(tree.expanded):
        rows[node] = row
    expansions = []
    for depth, at in enumerate(tree.generations):
        newest = [node for node, other in enumerate(tree.depths) if other == depth + 1]
        num_draws = 1 + max(tree.ranks[node] for node in newest)
        picks = [at.index(tree.parents[node]) * num_draws + tree.ranks[node] for node in newest]
        parents = [tree.parents[node] for node in newest]
        expansions.append(_Expansion(on_device(at), num_draws, on_device(picks), on_device(parents)))
    return _Layout(on_device([]), on_device(tree.depths), on_device(rows), tuple(expansions))


def num_expanded(shape: TreeShape) -> int:
    """Nodes that have children: rows of `DrawnFrom.probs`."""
    return len(rank_tree(shape).expanded)


def rows_of_expanded(shape: TreeShape, device: torch.device) -> Tensor:
    """int64 [N], the `DrawnFrom.rows` of all trees of a shape."""
    return _layout(shape, device).rows


class DrawnGrower:
    """Grows the trees of one step a generation at a time, as `TreeGrower` does.

    Args:
        roots: int64 [B], newest token of each request.
    """

    def __init__(self, roots: Tensor, shape: TreeShape, source: DrawSource) -> None:
        self._layout = _layout(shape, roots.device)
        self._source = source
        self._tokens = roots[:, None]
        self._parents = torch.full_like(self._tokens, -1)
        self._probs: list[Tensor] = []

    @property
    def frontier(self) -> Tensor:
        """int64 [B, F], the nodes to expand next; F is 0 when the trees are complete."""
        nodes = self._layout.nothing if self._is_complete else self._layout.expansions[len(self._probs)].nodes
        return nodes.expand(len(self._tokens), -1)

    @property
    def tree(self) -> TokenTree:
        """All nodes so far; with the distributions they were drawn from once the trees are complete."""
        layout = self._layout
        depths = layout.depths[: self._tokens.shape[1]].expand_as(self._tokens)
        drawn = DrawnFrom(torch.cat(self._probs, dim=1), layout.rows) if self._is_complete else None
        scores = torch.zeros(self._tokens.shape, device=self._tokens.device)
        return TokenTree(self._tokens, self._parents, depths, scores, drawn)

    @property
    def _is_complete(self) -> bool:
        return len(self._probs) == len(self._layout.expansions)

    def expand(self, log_probs: Tensor) -> None:
        """Draw the children of the frontier.

        Args:
            log_probs: float32 [B, F, V], the drafter's distribution after each frontier node; -inf forbids a token.
        """
        depth = len(self._probs)
        expansion = self._layout.expansions[depth]
        count, source = expansion.num_draws, self._source
        is_greedy = source.temperature <= 0
        heat = torch.where(is_greedy, 1.0, source.temperature)[:, None, None]
        # Shifted first, so that a tiny temperature cannot overflow.
        probs = ((log_probs - log_probs.amax(dim=-1, keepdim=True)) / heat).softmax(-1)
        assert probs.shape[1] == len(expansion.nodes)
        uniforms = torch.stack([source.draft(depth, index) for index in range(count)], dim=1)
        drawn = draw_children(probs, uniforms)
        drawn = torch.where(is_greedy[:, None, None], log_probs.topk(count, dim=2).indices, drawn)
        tokens = drawn.flatten(1)[:, expansion.picks]
        self._tokens = torch.cat((self._tokens, tokens.clamp(min=0)), dim=1)
        self._parents = torch.cat((self._parents, torch.where(tokens < 0, -1, expansion.parents)), dim=1)
        self._probs.append(probs)


def draw_children(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens drawn one after the other without replacement; int64 [B, F, n] in drawing order, -1 where none is left.

    Args:
        probs: float [B, F, V].
        uniforms: float64 [B, n] in [0, 1), shared by the rows of a request.
    """
    width, vocab = probs.shape[1:]
    weights = probs.flatten(0, 1).double()
    drawn = []
    for draws in uniforms.repeat_interleave(width, dim=0).T:
        tokens = invert_cdf(weights, draws).clamp(max=vocab - 1)
        there = weights.gather(1, tokens[:, None])[:, 0] > 0
        drawn.append(torch.where(there, tokens, -1))
        weights = weights.scatter(1, tokens[:, None], 0.0)
    return torch.stack(drawn, dim=1).view(len(probs), width, -1)
