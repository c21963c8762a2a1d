"""The device's half of speculative decoding: draft trees, verify them in the step's own pass, keep the accepted path.

A step goes: trees are drafted for the requests that decode; their nodes run through the model together with everything
else the step computes; at every node the token is drawn that the request would get there, and the tree is followed as
long as it holds that token. What the accepted nodes left in the cache moves to where their tokens belong, and the
drafter catches up with all tokens whose successor is now known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dsengine.config import DraftAcceptance
from dsengine.engine.batch import ScheduledRequest
from dsengine.engine.batch_inputs import Int64Array, table_of
from dsengine.engine.phase_times import PhaseTimes
from dsengine.engine.request import Request, RequestStatus
from dsengine.engine.sampler import SampledToken, Sampler, TokenScores
from dsengine.memory.kv_cache import KVCachePool
from dsengine.model.forward_batch import ForwardBatch
from dsengine.model.transfer import HostCopy, upload
from dsengine.specdec.drafter import Drafter, DraftTargets, NextNDrafter
from dsengine.specdec.drawn_tree import DrawSource
from dsengine.specdec.shape import TreeShape
from dsengine.specdec.tree import TokenTree
from dsengine.specdec.verification import AcceptedPaths, choose_paths, follow, follow_chains


@dataclass(frozen=True)
class PreparedDrafts:
    """What the device needs to know of a step's trees, and of what the drafter is to catch up with.

    Attributes:
        shape: of the trees of the first `len(trees)` requests of the step.
        block_table: of those, with room for `shape.num_slots` entries.
        rows: of the drafter's memory, for requests that get a token: those with trees first.
        next_ids: successors of the other requests' tokens, 0 where they are still to be drawn.
        drawn: places of those, one for each request that samples without a tree.
        only_proposals: the trees are chains that grammars propose.
    """

    shape: TreeShape | None
    trees: tuple[ScheduledRequest, ...]
    block_table: np.ndarray
    rows: Int64Array
    next_ids: Int64Array
    drawn: Int64Array
    only_proposals: bool = False


class DraftRows:
    """Which row of the drafter's memory belongs to which request; a request that stops running gives its row back."""

    def __init__(self, num_rows: int) -> None:
        self._rows: dict[Request, int] = {}
        self._free = list(range(num_rows))

    def of(self, requests: Sequence[Request]) -> Int64Array:
        """The rows of running requests."""
        for request in requests:
            if request not in self._rows:
                if not self._free:
                    self._collect()
                self._rows[request] = self._free.pop()
        return np.array([self._rows[request] for request in requests], dtype=np.int64)

    def _collect(self) -> None:
        for request in [r for r in self._rows if r.status is not RequestStatus.RUNNING]:
            self._free.append(self._rows.pop(request))


class DrawnPaths:
    """The new tokens of requests with trees, on their way from the device.

    Args:
        tokens: int64 [B, depth + 1], accepted drafts and the model's own token, then -1.
        lengths: int64 [B], tokens of each.
        scores: of all `depth + 1` places of the requests in `scored`.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor, scores: TokenScores | None, scored: Sequence[int]) -> None:
        self._copy = HostCopy(tokens, lengths)
        self._width = tokens.shape[1]
        self._scores = scores
        self._scored = scored

    def fetch(self) -> list[tuple[SampledToken, ...]]:
        """One entry per request; waits for the device. A token without a number ends its path."""
        tokens, lengths = (copy.tolist() for copy in self._copy.wait())
        scores = self._scores.fetch() if self._scores is not None else []
        first = {row: i * self._width for i, row in enumerate(self._scored)}
        paths = []
        for row, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
            at = first.get(row)
            logprobs = [None] * length if at is None else scores[at : at + length]
            path = [SampledToken(token, score) for token, score in zip(ids[:length], logprobs, strict=True)]
            if ids[length - 1] < 0:
                path[-1] = SampledToken(None, None)
            paths.append(tuple(path))
        return paths


class Speculator:
    """Drafts, verifies and keeps the drafter's cache complete.

    Args:
        drafter: what proposes; a `NextNDrafter` also catches up after every step, trees or not. None: only requests
            with a proposal have trees, and those are chains.
        num_layers: of the main model, whose entries move with the accepted tokens.
        num_rows: requests that can run at once.
        acceptance: how drafts of requests that sample are accepted.
    """

    def __init__(
        self,
        pool: KVCachePool,
        sampler: Sampler,
        drafter: Drafter | None,
        times: PhaseTimes,
        *,
        num_layers: int,
        num_rows: int,
        acceptance: DraftAcceptance = "coupled",
    ) -> None:
        self._pool = pool
        self._num_layers = num_layers
        self._sampler = sampler
        self._drafter = drafter
        self._nextn = drafter if isinstance(drafter, NextNDrafter) else None
        self._rows = DraftRows(num_rows)
        # What is looked up has no distribution that it could be drawn from.
        self._rejects = acceptance == "rejection" and self._nextn is not None
        self.times = times

    @property
    def needs_hidden(self) -> bool:
        """The drafter is fed with the hidden states of every token."""
        return self._nextn is not None

    def prepare(
        self, ordered: Sequence[ScheduledRequest], shape: TreeShape | None, *, only_proposals: bool = False
    ) -> PreparedDrafts:
        """The host's half of a step.

        Args:
            ordered: all its requests, those with drafts first.
            only_proposals: the drafts are chains that grammars propose.
        """
        trees = tuple(s for s in ordered if s.num_drafts)
        others = ordered[len(trees) :]
        size = self._pool.block_size
        rows = self._rows.of([s.request for s in (*trees, *others) if s.samples])
        block_table, next_ids, drawn = np.zeros((0, 0), np.int32), [], []
        if trees:
            assert shape is not None
            ends = np.array([s.start + shape.num_slots for s in trees], dtype=np.int64)
            block_table = table_of([s.request for s in trees], -(-ends // size))
        for s in others:
            next_ids += s.request.token_ids(s.start + 1, s.start + s.num_tokens + 1)
            if s.samples:
                drawn.append(len(next_ids))
                next_ids.append(0)
        return PreparedDrafts(
            shape, trees, block_table, rows, np.array(next_ids, np.int64), np.array(drawn, np.int64), only_proposals
        )

    def draft(self, plan: PreparedDrafts) -> TokenTree | None:
        """The step's trees, None if it has none."""
        tree = self._draft(plan)
        if self._nextn is not None and plan.shape is not None and not plan.only_proposals:
            self._nextn.wait_for_others()
        return tree

    def _draft(self, plan: PreparedDrafts) -> TokenTree | None:
        if not plan.trees:
            return None
        assert plan.shape is not None
        device = self._pool.layers[0].device
        roots = np.array([s.request.token_ids(s.start, s.start + 1)[0] for s in plan.trees], dtype=np.int64)
        targets = DraftTargets(
            texts=[s.request for s in plan.trees],
            roots=upload(roots, device),
            contexts=upload(np.array([s.start for s in plan.trees], dtype=np.int64), device),
            context_lens=tuple(s.start for s in plan.trees),
            block_table=upload(plan.block_table, device),
            rows=upload(plan.rows[: len(plan.trees)], device),
            draws=self._draw_source(plan, device),
        )
        proposals = [s.request.proposal for s in plan.trees]
        if plan.only_proposals:
            return proposed_chains(targets.roots, proposals, plan.shape)
        assert self._drafter is not None, "without a drafter only proposals make trees"
        tree = self._drafter.draft(targets, plan.shape)
        return with_proposals(tree, proposals, plan.shape) if any(proposals) else tree

    def _draw_source(self, plan: PreparedDrafts, device: torch.device) -> DrawSource | None:
        """What the drafts are drawn by, None where they are not drawn."""
        requests = [s.request for s in plan.trees]
        if not self._rejects or plan.only_proposals or all(r.params.temperature <= 0 for r in requests):
            return None
        return DrawSource(
            temperature=upload(np.array([r.params.temperature for r in requests], dtype=np.float32), device),
            seeds=upload(np.array([r.seed for r in requests], dtype=np.int64), device),
            positions=upload(np.array([s.num_output_tokens for s in plan.trees], dtype=np.int64), device),
        )

    def verify(self, plan: PreparedDrafts, tree: TokenTree, logits: Tensor) -> tuple[AcceptedPaths, Tensor, DrawnPaths]:
        """Find the accepted path of each tree, and move what it left in the cache.

        Args:
            logits: float32 [B · N, vocab_size], of all nodes.

        Returns:
            the paths, their new tokens [B, depth + 1], and these on their way to the host.
        """
        assert plan.shape is not None
        requests = [s.request for s in plan.trees]
        counts = [s.num_output_tokens for s in plan.trees]
        self._sampler.process_trees(logits, requests, counts, tree)
        paths = self._accept(plan, tree, logits)
        if plan.shape.topk > 1:
            self._compact(plan, paths)
        tokens = paths.new_tokens(tree)
        scored = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        scores = None
        if scored:
            rows = upload(np.array(scored, dtype=np.int64), logits.device)
            at = (rows * tree.num_nodes)[:, None] + paths.nodes[rows].clamp(min=0)
            num_top = [requests[row].params.logprobs or 0 for row in scored for _ in range(tokens.shape[1])]
            scores = TokenScores(logits[at.flatten()], tokens[rows].clamp(min=0).flatten(), num_top)
        return paths, tokens, DrawnPaths(tokens, paths.lengths, scores, scored)

    def _accept(self, plan: PreparedDrafts, tree: TokenTree, logits: Tensor) -> AcceptedPaths:
        assert plan.shape is not None
        requests = [s.request for s in plan.trees]
        source = self._draw_source(plan, logits.device) if tree.drawn is not None else None
        if source is None:
            return self._follow(plan, tree, logits)
        # Greedy requests and proposals of grammars: candidates that were not drawn.
        follows = [r.params.temperature <= 0 or len(r.proposal) > 0 for r in requests]
        paths = self._sampler.reject_drafts(logits, requests, source, tree, plan.shape)
        if not any(follows):
            return paths
        return choose_paths(upload(np.array(follows), logits.device), self._follow(plan, tree, logits), paths)

    def _follow(self, plan: PreparedDrafts, tree: TokenTree, logits: Tensor) -> AcceptedPaths:
        assert plan.shape is not None
        counts = [s.num_output_tokens for s in plan.trees]
        choices = self._sampler.draw_trees(logits, [s.request for s in plan.trees], counts, tree)
        if plan.shape.topk == 1:
            return follow_chains(tree, choices)
        return follow(tree, choices, plan.shape.max_depth)

    def _compact(self, plan: PreparedDrafts, paths: AcceptedPaths) -> None:
        """Moves the entries of accepted nodes to the places of their tokens, in all layers of the main model."""
        places = torch.arange(paths.nodes.shape[1], device=paths.nodes.device).expand_as(paths.nodes)
        # Behind the end of a path everything stays where it is.
        kept = torch.where(paths.nodes < 0, places, paths.nodes)
        (_, sources), (_, targets) = self._places(plan, kept[:, 1:]), self._places(plan, places[:, 1:])
        self._pool.move(sources, targets, self._num_layers)

    def _places(self, plan: PreparedDrafts, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """(positions, slots) that lie so far [B, n] after the contexts of the requests with trees, int64 [B · n]."""
        size = self._pool.block_size
        context = upload(np.array([s.start for s in plan.trees], dtype=np.int64), offsets.device)
        positions = context[:, None] + offsets
        blocks = upload(plan.block_table, offsets.device).long().gather(1, positions // size)
        return positions.flatten(), (blocks * size + positions % size).flatten()

    def catch_up(
        self,
        plan: PreparedDrafts,
        batch: ForwardBatch,
        hidden: Tensor,
        accepted: tuple[AcceptedPaths, Tensor] | None,
        drawn: Tensor | None,
    ) -> None:
        """Let the drafter enter the step's tokens into its cache, with the model's true hidden states.

        Args:
            batch: the step's own.
            hidden: [T, hidden_size] of the step.
            accepted: what is kept of the trees, and the new tokens [B, depth + 1].
            drawn: int64, tokens of the requests that sampled without a tree.
        """
        if self._nextn is None:
            return
        device = hidden.device
        next_ids, last = upload(plan.next_ids, device), upload(plan.drawn, device)
        positions, slots = batch.positions, batch.slot_mapping
        if drawn is not None and len(plan.drawn):
            next_ids.index_copy_(0, last, drawn.clamp(min=0))
        if accepted is not None:
            assert plan.shape is not None
            paths, tokens = accepted
            count, width = paths.nodes.shape
            num_nodes = count * plan.shape.num_nodes
            nodes = hidden[:num_nodes].view(count, plan.shape.num_nodes, -1)
            kept = nodes.gather(1, paths.nodes.clamp(min=0)[:, :, None].expand(-1, -1, nodes.shape[2]))
            # Behind the end of a path nobody reads the entries before they are written again.
            steps = torch.arange(width, device=device).expand_as(tokens)
            tree_positions, tree_slots = self._places(plan, steps)
            ends = torch.arange(0, count * width, width, device=device) + paths.lengths - 1
            hidden = torch.cat((kept.flatten(0, 1), hidden[num_nodes:]))
            next_ids = torch.cat((tokens.clamp(min=0).flatten(), next_ids))
            positions = torch.cat((tree_positions, positions[num_nodes:]))
            slots = torch.cat((tree_slots, slots[num_nodes:]))
            last = torch.cat((ends, last + count * width))
        self._nextn.extend(hidden, next_ids, positions, slots, last, upload(plan.rows, device))


def proposed_chains(roots: Tensor, proposals: Sequence[Sequence[int]], shape: TreeShape) -> TokenTree:
    """Trees that hold nothing but these proposals; what is left of their nodes matches nothing.

    Args:
        roots: int64 [B].
    """
    nodes = shape.num_nodes
    lengths = [min(len(proposal), shape.max_depth) for proposal in proposals]
    tokens = [[0, *p[:length], *[0] * (nodes - 1 - length)] for p, length in zip(proposals, lengths, strict=True)]
    parents = [[*range(-1, length), *[-1] * (nodes - 1 - length)] for length in lengths]
    depths = [[*range(length + 1), *[0] * (nodes - 1 - length)] for length in lengths]
    grid = upload(np.array([tokens, parents, depths], dtype=np.int64), roots.device)
    grid[0, :, 0] = roots
    return TokenTree(grid[0], grid[1], grid[2], torch.zeros(grid.shape[1:], device=roots.device))


def with_proposals(tree: TokenTree, proposals: Sequence[Sequence[int]], shape: TreeShape) -> TokenTree:
    """Trees in which the chains of proposals, where there are any, take the place of what was drafted."""
    ours = proposed_chains(tree.tokens[:, 0], proposals, shape)
    mine = upload(np.array([len(proposal) > 0 for proposal in proposals]), tree.tokens.device)[:, None]
    return TokenTree(
        torch.where(mine, ours.tokens, tree.tokens),
        torch.where(mine, ours.parents, tree.parents),
        torch.where(mine, ours.depths, tree.depths),
        torch.where(mine, ours.scores, tree.scores),
        tree.drawn,
    )


def with_trees(batch: ForwardBatch, tree: TokenTree, is_chain: bool) -> ForwardBatch:
    """A batch whose first requests bring the nodes of these trees.

    Args:
        batch: as laid out for chains; its absorbed tokens after the trees stay causal.
        is_chain: the trees have no branches.
    """
    count, nodes = tree.tokens.shape
    num_tokens = count * nodes
    batch.input_ids[:num_tokens] = tree.tokens.flatten()
    if is_chain:
        return batch
    positions = batch.positions[:num_tokens].view(count, nodes)
    positions.copy_(positions[:, :1] + tree.depths)
    mask = tree.ancestor_mask().flatten(0, 1)
    if batch.num_decode_tokens > num_tokens:
        lens = batch.query_lens[count : batch.num_decodes]
        width = max(nodes, *lens)
        index = upload(np.concatenate([np.arange(length) for length in lens]), mask.device)
        padded = torch.zeros((batch.num_decode_tokens, width), dtype=torch.bool, device=mask.device)
        padded[:num_tokens, :nodes] = mask
        padded[num_tokens:] = torch.arange(width, device=mask.device) <= index[:, None]
        mask = padded
    return replace(batch, tree_mask=mask)
