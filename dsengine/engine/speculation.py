"""The device's half of speculative decoding: draft trees, verify them in the step's own pass, keep the accepted path.

A step goes: trees are drafted for the requests that decode; their nodes run through the model together with everything
else the step computes; at every node the token is drawn that the request would get there, and the tree is followed as
long as it holds that token. What the accepted nodes left in the cache moves to where their tokens belong, and the
drafter catches up with all tokens whose successor is now known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dsengine.config import DraftAcceptance
from dsengine.engine.batch import ScheduledRequest
from dsengine.engine.batch_inputs import Int64Array
from dsengine.engine.draft_graphs import CatchUpGraphs, DraftGraphs
from dsengine.engine.draft_inputs import DraftInputs
from dsengine.engine.kept_paths import move_kept, new_entries
from dsengine.engine.lock_step import LockStep, StepKind
from dsengine.engine.phase_times import PhaseTimes
from dsengine.engine.request import Request, RequestStatus
from dsengine.engine.sampler import SampledToken, Sampler, TokenScores
from dsengine.engine.step_outputs import StepOutputs
from dsengine.memory.kv_cache import KVCachePool
from dsengine.model.forward_batch import ForwardBatch
from dsengine.model.transfer import HostCopy, upload
from dsengine.specdec.drafter import Drafter, NextNDrafter
from dsengine.specdec.shape import TreeShape
from dsengine.specdec.tree import TokenTree
from dsengine.specdec.verification import AcceptedPaths, choose_paths, follow, follow_chains


@dataclass(frozen=True)
class PreparedDrafts:
    """What the device needs to know of a step's trees, and of what the drafter is to catch up with.

    Attributes:
        shape: of the trees of the step's first requests.
        targets: those requests.
        rows: of the drafter's memory, for requests that get a token: those with trees first.
        next_ids: successors of the other requests' tokens, 0 where they are still to be drawn.
        drawn: places of those, one for each request that samples without a tree.
        only_proposals: the trees are chains that grammars propose.
    """

    shape: TreeShape | None
    targets: DraftInputs
    rows: Int64Array
    next_ids: Int64Array
    drawn: Int64Array
    only_proposals: bool = False

    @property
    def trees(self) -> tuple[ScheduledRequest, ...]:
        """The requests with trees."""
        return self.targets.trees


@dataclass(frozen=True)
class DrafterGraphs:
    """A drafter's work, captured: the trees, and for each kind of captured step what follows it."""

    drafts: DraftGraphs
    catch_up: Mapping[StepKind, CatchUpGraphs]


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

    Attributes:
        graphs: what drafts and catches up without launching kernel by kernel; None: nothing does.
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
        self._device = pool.layers[0].device
        self._num_layers = num_layers
        self._sampler = sampler
        self._drafter = drafter
        self._nextn = drafter if isinstance(drafter, NextNDrafter) else None
        self._rows = DraftRows(num_rows)
        # What is looked up has no distribution that it could be drawn from.
        self._rejects = acceptance == "rejection" and self._nextn is not None
        self.times = times
        self.graphs: DrafterGraphs | None = None

    @property
    def nextn(self) -> NextNDrafter | None:
        """The drafter, where it is the checkpoint's own layer."""
        return self._nextn

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
        rows = self._rows.of([s.request for s in (*trees, *others) if s.samples])
        targets = DraftInputs.of(trees, rows[: len(trees)], shape, self._pool.block_size)
        next_ids, drawn = [], []
        for s in others:
            next_ids += s.request.token_ids(s.start + 1, s.start + s.num_tokens + 1)
            if s.samples:
                drawn.append(len(next_ids))
                next_ids.append(0)
        return PreparedDrafts(
            shape, targets, rows, np.array(next_ids, np.int64), np.array(drawn, np.int64), only_proposals
        )

    def draft(self, plan: PreparedDrafts, lock_step: LockStep | None = None) -> TokenTree | None:
        """The step's trees, None if it has none.

        Args:
            lock_step: of all attention groups, where there are several.
        """
        shape, trees = plan.shape, plan.trees
        if shape is None:
            return None
        proposals = [s.request.proposal for s in trees]
        if plan.only_proposals:
            return proposed_chains(upload(plan.targets.roots, self._device), proposals, shape) if trees else None
        tree = self._drafted(plan.targets, shape, lock_step)
        return with_proposals(tree, proposals, shape) if tree is not None and any(proposals) else tree

    def _drafted(self, targets: DraftInputs, shape: TreeShape, lock_step: LockStep | None) -> TokenTree | None:
        most_trees, samples = len(targets.trees), targets.samples
        if lock_step is not None:
            most_trees, samples = lock_step.most_trees, lock_step.samples
        graphs = None if self.graphs is None else self.graphs.drafts
        if graphs is not None and graphs.holds(shape, most_trees):
            replayed = graphs.run(targets, shape, drawn=self._rejects and samples, at_least=most_trees)
            return replayed if targets.trees else None
        tree = None
        if targets.trees:
            assert self._drafter is not None, "without a drafter only proposals make trees"
            draws = self._rejects and targets.samples
            tree = self._drafter.draft(targets.to_device(self._device, draws=draws), shape)
        if self._nextn is not None:
            self._nextn.wait_for_others()
        return tree

    def verify(
        self, plan: PreparedDrafts, tree: TokenTree, outputs: StepOutputs
    ) -> tuple[AcceptedPaths, Tensor, DrawnPaths]:
        """Find the accepted path of each tree, and move what it left in the cache, unless catching up does.

        Args:
            outputs: of the step; the logits of its trees' nodes are changed.

        Returns:
            the paths, their new tokens [B, depth + 1], and these on their way to the host.
        """
        assert plan.shape is not None
        num_nodes = tree.tokens.numel()
        logits = outputs.logits[:num_nodes]
        requests = [s.request for s in plan.trees]
        counts = [s.num_output_tokens for s in plan.trees]
        self._sampler.process_trees(logits, requests, counts, tree)
        paths = self._accept(plan, tree, logits)
        if plan.shape.topk > 1 and self._catch_up_graphs(outputs) is None:
            slots = outputs.slots[:num_nodes].view(tree.tokens.shape)
            move_kept(self._pool, self._num_layers, paths.nodes, slots)
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
        if tree.drawn is None or not plan.targets.samples:
            return self._follow(plan, tree, logits)
        source = plan.targets.source(logits.device)
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

    def catch_up(
        self,
        plan: PreparedDrafts,
        outputs: StepOutputs,
        accepted: tuple[AcceptedPaths, Tensor] | None,
        drawn: Tensor | None,
    ) -> None:
        """Let the drafter enter the step's tokens into its cache, with the model's true hidden states.

        Args:
            outputs: of the step.
            accepted: what is kept of the trees, and the new tokens [B, depth + 1].
            drawn: int64, tokens of the requests that sampled without a tree.
        """
        if self._nextn is None or outputs.hidden is None:
            return
        graphs = self._catch_up_graphs(outputs)
        if graphs is None:
            self._catch_up(plan, outputs, accepted, drawn)
        elif accepted is not None:
            graphs.run(accepted[1], plan.rows, accepted[0])
        elif drawn is not None:
            graphs.run(drawn[:, None], plan.rows, None)

    def _catch_up_graphs(self, outputs: StepOutputs) -> CatchUpGraphs | None:
        if self.graphs is None or outputs.kind is None:
            return None
        return self.graphs.catch_up.get(outputs.kind)

    def _catch_up(
        self,
        plan: PreparedDrafts,
        outputs: StepOutputs,
        accepted: tuple[AcceptedPaths, Tensor] | None,
        drawn: Tensor | None,
    ) -> None:
        assert self._nextn is not None and outputs.hidden is not None
        device, hidden, positions, slots = self._device, outputs.hidden, outputs.positions, outputs.slots
        next_ids, last = upload(plan.next_ids, device), upload(plan.drawn, device)
        if drawn is not None and len(plan.drawn):
            next_ids.index_copy_(0, last, drawn.clamp(min=0))
        if accepted is not None:
            assert plan.shape is not None
            paths, tokens = accepted
            n = len(plan.trees) * plan.shape.num_nodes
            kept = new_entries(paths.nodes, paths.lengths, tokens, hidden[:n], positions[:n], slots[:n])
            hidden = torch.cat((kept.hidden, hidden[n:]))
            next_ids = torch.cat((kept.next_ids, next_ids))
            positions = torch.cat((kept.positions, positions[n:]))
            slots = torch.cat((kept.slots, slots[n:]))
            last = torch.cat((kept.last, last + tokens.numel()))
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
