"""Token trees: candidates for the next tokens of a request, grown by a drafter and verified in one pass.

A tree's root is the request's newest token, the one no model pass has seen yet. Every other node is a drafted token
that continues its parent. Trees of all requests of a batch have the same number of nodes, so that growing, selecting
and masking are a few tensor operations for the whole batch, on the device, without a loop over requests.

Growing follows EAGLE-2 (Li et al. 2024, section 4): at each step the likeliest nodes of the newest generation are
expanded by the `topk` likeliest tokens each; in the end the nodes of largest cumulative draft probability are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class DrawnFrom:
    """What the nodes of B trees were drawn from.

    Attributes:
        probs: float32 [B, E, V], the distributions that the children of E expanded nodes were drawn from.
        rows: int64 [N], where in `probs` each node's children come from; anything for nodes without children.
    """

    probs: Tensor
    rows: Tensor


@dataclass(frozen=True)
class TokenTree:
    """Trees of B requests with N nodes each; node 0 is the root, parents stand before their children.

    Attributes:
        tokens: int64 [B, N].
        parents: int64 [B, N], -1 for the root.
        depths: int64 [B, N], 0 for the root: a node's position is its root's plus its depth.
        scores: float32 [B, N], logarithm of the cumulative draft probability; 0 where nodes are drawn or looked up.
        drawn: for nodes that were drawn rather than chosen.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    drawn: DrawnFrom | None = None

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[1]

    def ancestor_mask(self) -> Tensor:
        """bool [B, N, N]: [b, i, j] whether node j is node i or an ancestor of it, as `mla_decode` wants it."""
        batch, nodes = self.tokens.shape
        mask = torch.eye(nodes, dtype=torch.bool, device=self.tokens.device).expand(batch, nodes, nodes)
        # A root is its own parent here: it has seen nothing but itself. Every pass reaches twice as far up.
        jumps = self.parents.clamp(min=0)
        for _ in range(max(nodes - 1, 1).bit_length()):
            mask = mask | mask.gather(1, jumps[:, :, None].expand(-1, -1, nodes))
            jumps = jumps.gather(1, jumps)
        return mask

    def paths(self) -> list[list[list[int]]]:
        """For each request and node, the drafted tokens from below the root to the node; waits for the device."""
        found = []
        for tokens, parents in torch.stack((self.tokens, self.parents), dim=1).tolist():
            below: list[list[int]] = [[]]
            for token, parent in zip(tokens[1:], parents[1:], strict=True):
                below.append([*below[parent], token] if parent >= 0 else [])
            found.append(below)
        return found


class Grower(Protocol):
    """Grows the trees of one step, a generation at a time."""

    @property
    def frontier(self) -> Tensor:
        """int64 [B, F], the nodes to expand next."""
        ...

    @property
    def tree(self) -> TokenTree:
        """All nodes so far, in the order they were grown: later generations only append."""
        ...

    def expand(self, log_probs: Tensor) -> None:
        """Give the frontier nodes their children.

        Args:
            log_probs: float32 [B, F, V], the drafter's distribution after each frontier node; -inf forbids a token.
        """
        ...


class ChainGrower:
    """The likeliest token after the likeliest token, and so on.

    Args:
        roots: int64 [B], newest token of each request.
    """

    def __init__(self, roots: Tensor) -> None:
        self._tokens = roots[:, None]
        self._scores = torch.zeros_like(self._tokens, dtype=torch.float32)

    @property
    def frontier(self) -> Tensor:
        """int64 [B, 1], the newest node."""
        return torch.full_like(self._tokens[:, :1], self._tokens.shape[1] - 1)

    @property
    def tree(self) -> TokenTree:
        """All nodes so far."""
        depths = torch.arange(self._tokens.shape[1], device=self._tokens.device).expand_as(self._tokens)
        return TokenTree(self._tokens, depths - 1, depths, self._scores)

    def expand(self, log_probs: Tensor) -> None:
        """Appends the likeliest token; arguments as for `Grower`."""
        values, best = log_probs[:, 0].max(dim=1, keepdim=True)
        self._tokens = torch.cat((self._tokens, best), dim=1)
        self._scores = torch.cat((self._scores, self._scores[:, -1:] + values), dim=1)


class TreeGrower:
    """Grows trees of the likeliest nodes.

    Args:
        roots: int64 [B], newest token of each request.
        topk: children of an expanded node, and nodes expanded per generation.
    """

    def __init__(self, roots: Tensor, topk: int) -> None:
        if topk < 1:
            raise ValueError(f"topk is {topk}; a node needs one child at least")
        self._topk = topk
        batch, device = roots.shape[0], roots.device
        self._tokens = roots[:, None]
        self._parents = torch.full((batch, 1), -1, dtype=torch.int64, device=device)
        self._depths = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._scores = torch.zeros((batch, 1), dtype=torch.float32, device=device)
        self._frontier = torch.zeros((batch, 1), dtype=torch.int64, device=device)

    @property
    def frontier(self) -> Tensor:
        """int64 [B, F], the nodes to expand next (F is 1, then topk)."""
        return self._frontier

    @property
    def tree(self) -> TokenTree:
        """All nodes so far, in the order they were grown: later generations only append."""
        return TokenTree(self._tokens, self._parents, self._depths, self._scores)

    def expand(self, log_probs: Tensor) -> None:
        """Give every frontier node its children; the likeliest of them are the next frontier."""
        width, vocab = log_probs.shape[1:]
        count = min(self._topk, vocab)
        # Which of equally likely tokens is drafted does not matter, so the vocabulary need not be sorted stably.
        values, children = log_probs.topk(count, dim=2)
        scores = values + self._scores.gather(1, self._frontier)[:, :, None]
        first = self._tokens.shape[1]
        depth = self._depths.gather(1, self._frontier)[:, :, None].expand(-1, -1, count) + 1
        parents = self._frontier[:, :, None].expand(-1, -1, count)
        self._tokens = torch.cat((self._tokens, children.flatten(1)), dim=1)
        self._parents = torch.cat((self._parents, parents.flatten(1)), dim=1)
        self._depths = torch.cat((self._depths, depth.flatten(1)), dim=1)
        self._scores = torch.cat((self._scores, scores.flatten(1)), dim=1)
        self._frontier = first + largest(scores.flatten(1), min(self._topk, width * count))

    def select(self, num_nodes: int) -> TokenTree:
        """The root and the nodes of largest cumulative probability, `num_nodes` in all (or as many as there are).

        A child is never likelier than its parent and stands after it, so that the stable order keeps whole paths.
        """
        kept = largest(self._scores, min(num_nodes, self._scores.shape[1])).sort(dim=1).values
        places = torch.zeros_like(self._tokens).scatter_(
            1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        )
        parents = self._parents.gather(1, kept)
        return TokenTree(
            tokens=self._tokens.gather(1, kept),
            parents=torch.where(parents < 0, parents, places.gather(1, parents.clamp(min=0))),
            depths=self._depths.gather(1, kept),
            scores=self._scores.gather(1, kept),
        )


def largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values along the last dimension, largest first, the lower index among equals."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
