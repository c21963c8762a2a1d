"""Which drafted tokens are kept: the path through a tree that the model itself would have written.

The model's distribution is known at every node after one pass over the tree. `follow` keeps what sampling would have
produced anyway: the model's own token is drawn at each node with the uniform number that belongs to its position, and
as long as the tree holds that token, the next node is already computed. The output is therefore the same, token for
token, as without speculation, at any temperature and with every filter and penalty; drafting only decides in how many
steps. A step goes on with the probability the model gives to a node's children: no rule does better for candidates that
are a fixed function of the text.

`reject` is the other lossless rule (Leviathan et al. 2023; several candidates without replacement: Jeon et al. 2024),
for candidates that were themselves drawn from the drafter's distribution (`drawn_tree`). It goes on more often where
single drafts meet a flat distribution; it gives the same distribution, but not the same tokens for a seed. For a
candidate that was not drawn both rules go on equally often, so that only one of them is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsengine.kernels.sample.ref import invert_cdf
from dsengine.specdec.tree import DrawnFrom, TokenTree


@dataclass(frozen=True)
class AcceptedPaths:
    """What a verification keeps of B trees.

    Attributes:
        nodes: int64 [B, max_depth + 1], accepted nodes from the root down; -1 after the last one.
        lengths: int64 [B], accepted nodes, the root included: 1 if no draft was right.
        bonus: int64 [B], the model's own token after the last accepted node; -1 where it has none.
    """

    nodes: Tensor
    lengths: Tensor
    bonus: Tensor

    def new_tokens(self, tree: TokenTree) -> Tensor:
        """int64 [B, max_depth + 1]: the accepted drafts, then the bonus token, then -1."""
        drafts = tree.tokens.gather(1, self.nodes[:, 1:].clamp(min=0)).masked_fill(self.nodes[:, 1:] < 0, -1)
        padded = torch.cat((drafts, torch.full_like(self.bonus, -1)[:, None]), dim=1)
        return padded.scatter(1, (self.lengths - 1)[:, None], self.bonus[:, None])


def follow(tree: TokenTree, choices: Tensor, max_depth: int) -> AcceptedPaths:
    """Follow the model's own choices down the trees.

    Args:
        tree: of B requests and N nodes.
        choices: int64 [B, N], the token the model chooses after each node: its argmax, or its draw for that position;
            -1 where it has none (the path ends there, and the bonus token is -1).
        max_depth: depth of the deepest node, or more.
    """
    current = torch.zeros_like(choices[:, 0])
    alive = torch.ones_like(current, dtype=torch.bool)
    path = [current]
    for _ in range(max_depth):
        wanted = choices.gather(1, current[:, None])
        matches = (tree.parents == current[:, None]) & (tree.tokens == wanted)
        alive = alive & matches.any(dim=1)
        current = torch.where(alive, matches.to(torch.int8).argmax(dim=1), current)
        path.append(torch.where(alive, current, -1))
    nodes = torch.stack(path, dim=1)
    return AcceptedPaths(nodes, (nodes >= 0).sum(dim=1), choices.gather(1, current[:, None]).squeeze(1))


def follow_chains(tree: TokenTree, choices: Tensor) -> AcceptedPaths:
    """What `follow` does, for trees without branches whose nodes stand in order; padding comes last."""
    right = (choices[:, :-1] == tree.tokens[:, 1:]) & (tree.parents[:, 1:] >= 0)
    lengths = right.cumprod(dim=1).sum(dim=1) + 1
    places = torch.arange(choices.shape[1], device=choices.device)
    nodes = torch.where(places < lengths[:, None], places, -1)
    return AcceptedPaths(nodes, lengths, choices.gather(1, (lengths - 1)[:, None]).squeeze(1))


def reject(
    tree: TokenTree, drawn: DrawnFrom, target: Callable[[Tensor], Tensor], uniforms: Tensor, max_depth: int, topk: int
) -> AcceptedPaths:
    """Accept drawn candidates by recursive rejection.

    At a node the children are tried in the order they were drawn. One is accepted with probability p(x) / q(x);
    otherwise p becomes the normalised positive part of p - q, and q loses x. If all fail, the token is drawn from what
    is left of p.

    Args:
        tree: B trees of N nodes whose shape does not depend on the tokens drawn; siblings stand in drawing order.
        drawn: what the nodes were drawn from.
        target: from nodes int64 [B] to the model's distribution after each, float64 [B, V], all filters applied; rows
            of 0 where it has none (the path ends there, and the bonus token is -1).
        uniforms: float64 [B, max_depth + 1, topk + 1] in [0, 1), independent: at each depth one for each try and one
            for the last draw.
        max_depth: depth of the deepest node.
        topk: most children of a node.
    """
    rows = torch.arange(tree.tokens.shape[0], device=tree.tokens.device)
    siblings = (tree.parents[:, :, None] == tree.parents[:, None, :]).tril(-1).sum(dim=2)
    current, alive = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    path, bonus = [], torch.full_like(rows, -1)
    for depth in range(max_depth + 1):
        path.append(torch.where(alive, current, -1))
        p, following, accepted = target(current), current, torch.zeros_like(alive)
        q = drawn.probs[rows, drawn.rows[current]].to(p.dtype)
        for attempt in range(topk if depth < max_depth else 0):
            is_child = (tree.parents == current[:, None]) & (siblings == attempt)
            child = is_child.to(torch.int8).argmax(dim=1)
            token = tree.tokens[rows, child]
            tries = alive & ~accepted & is_child.any(dim=1)
            success = tries & (uniforms[:, depth, attempt] * q[rows, token] < p[rows, token])
            following = torch.where(success, child, following)
            accepted = accepted | success
            failed = (tries & ~success)[:, None]
            left = (p - q).clamp(min=0)
            p = torch.where(failed & (left.sum(1, keepdim=True) > 0), _normalised(left), p)
            q = torch.where(failed, _normalised(q.scatter(1, token[:, None], 0.0)), q)
        ends = alive & ~accepted & (p.sum(dim=1) > 0)
        last = invert_cdf(p, uniforms[:, depth, -1]).clamp(max=p.shape[1] - 1)
        bonus = torch.where(ends, last, bonus)
        alive, current = accepted, following
    nodes = torch.stack(path, dim=1)
    return AcceptedPaths(nodes, (nodes >= 0).sum(dim=1), bonus)


def choose_paths(first: Tensor, paths: AcceptedPaths, others: AcceptedPaths) -> AcceptedPaths:
    """`paths` where bool [B] `first` says so, `others` elsewhere."""
    return AcceptedPaths(
        torch.where(first[:, None], paths.nodes, others.nodes),
        torch.where(first, paths.lengths, others.lengths),
        torch.where(first, paths.bonus, others.bonus),
    )


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-38)
