"""Captured drafting, and what follows a captured step once its tokens are known: both are many small kernels.

A tree of 3/4/8 takes some 190 launches, and keeping its path in 61 layers some 145 (operations counted on the CPU);
on a small batch the host could not keep up. As with decode steps, what a graph reads lies in static buffers and batches
are padded to the next captured size. A padding row of a draft has no context: it sees nothing, stores nothing and
starts from a zero hidden state. One of a kept path has no slot: it stores nothing, and moves once more what the first
request moves.

With several attention groups all of them draft the same captured size together or none does, because the layer's
experts are everybody's. Keeping paths is each group's own business.

Not yet run on a GPU: here and in the tests everything but the capture itself is tried, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dsengine.engine.batch_inputs import Int64Array
from dsengine.engine.draft_inputs import DraftInputs
from dsengine.engine.graph_runner import CapturedFunction, GraphBackend, GraphRunner
from dsengine.engine.kept_paths import move_kept, new_entries
from dsengine.memory.kv_cache import KVCachePool
from dsengine.model.transfer import upload
from dsengine.specdec.drafter import DraftTargets, NextNDrafter, PassCounts
from dsengine.specdec.drawn_tree import DrawSource, num_expanded, rows_of_expanded
from dsengine.specdec.shape import TreeShape
from dsengine.specdec.tree import DrawnFrom, TokenTree
from dsengine.specdec.verification import AcceptedPaths

_ROOTS, _CONTEXTS, _ROWS, _SEEDS, _POSITIONS = range(5)


class DraftGraphs:
    """Graphs that grow whole trees, for every shape that may be asked for.

    Args:
        shapes: of the trees.
        draws: trees may also be drawn.
        context_length: longest request; bounds the block table and, in every graph, the lengths.
        dp_size: attention groups, all of which capture and replay the same at the same time.
        vocab_size: of the model's logits.
    """

    def __init__(
        self,
        drafter: NextNDrafter,
        backend: GraphBackend,
        shapes: Sequence[TreeShape],
        *,
        draws: bool,
        device: torch.device,
        block_size: int,
        context_length: int,
        dp_size: int,
        vocab_size: int,
    ) -> None:
        self._drafter = drafter
        self._backend = backend
        # Those of most nodes first, so that all others fit into their memory.
        self._shapes = sorted(shapes, key=lambda shape: (shape.num_drafter_nodes, shape), reverse=True)
        self._kinds = [(shape, drawn) for drawn in ((True, False) if draws else (False,)) for shape in self._shapes]
        self._device = device
        self._context_length = context_length
        self._max_blocks = -(-max(context_length, *(shape.num_slots for shape in shapes)) // block_size)
        self._dp_size = dp_size
        self._vocab_size = vocab_size
        self._sizes: list[int] = []
        self._graphs: dict[tuple[TreeShape, bool, int], CapturedFunction] = {}

    def capture(self, sizes: Sequence[int]) -> None:
        """Captures a graph for each size and shape."""
        self._sizes, largest, device = sorted(sizes), max(sizes), self._device
        self._integers = torch.zeros((5, largest), dtype=torch.int64, device=device)
        self._integers[_ROWS].fill_(self._drafter.padding_row)
        self._temperature = torch.zeros(largest, dtype=torch.float32, device=device)
        self._block_table = torch.zeros((largest, self._max_blocks), dtype=torch.int32, device=device)
        self._allocate_trees(largest)
        for shape, drawn in self._kinds:
            for size in reversed(self._sizes):
                self._graphs[shape, drawn, size] = self._backend.capture(partial(self._grow, shape, drawn, size))

    def holds(self, shape: TreeShape, num_requests: int) -> bool:
        """Whether there is a graph for so many requests."""
        return shape in self._shapes and 0 < num_requests <= max(self._sizes, default=0)

    def run(self, inputs: DraftInputs, shape: TreeShape, *, drawn: bool, at_least: int = 0) -> TokenTree:
        """Draft for requests that it `holds`, or, where another attention group has some, for none.

        Args:
            drawn: draw the nodes; greedy requests get the likeliest ones.
            at_least: requests for which there must be room, as the largest attention group has them.

        Returns:
            the trees, valid until the next run.
        """
        count = len(inputs.trees)
        size = next(size for size in self._sizes if size >= max(count, at_least))
        self._load(inputs, size)
        self._graphs[shape, drawn, size].replay()
        return _first(self._trees[shape, drawn], count)

    def _allocate_trees(self, largest: int) -> None:
        """Where all graphs of one kind write their trees; what those were drawn from shares one place."""
        device = self._device
        most = max(num_expanded(shape) if drawn else 0 for shape, drawn in self._kinds)
        probs = torch.empty(largest * most * self._vocab_size, dtype=torch.float32, device=device)
        self._trees: dict[tuple[TreeShape, bool], TokenTree] = {}
        for shape, drawn in self._kinds:
            grid = torch.zeros((3, largest, shape.num_nodes), dtype=torch.int64, device=device)
            tree = TokenTree(grid[0], grid[1], grid[2], torch.zeros(grid.shape[1:], device=device))
            if drawn:
                here = (largest, num_expanded(shape), self._vocab_size)
                place = probs[: here[0] * here[1] * here[2]].view(here)
                tree = replace(tree, drawn=DrawnFrom(place, rows_of_expanded(shape, device)))
            self._trees[shape, drawn] = tree

    def _load(self, inputs: DraftInputs, size: int) -> None:
        """Fills the static tensors of one size; what stood there before must not shine through."""
        count = len(inputs.trees)
        integers = np.zeros((5, size), dtype=np.int64)
        integers[_ROWS] = self._drafter.padding_row
        integers[:, :count] = inputs.roots, inputs.contexts, inputs.rows, inputs.seeds, inputs.draw_positions
        temperature = np.zeros(size, dtype=np.float32)
        temperature[:count] = inputs.temperature
        self._integers[:, :size].copy_(upload(integers, self._device))
        self._temperature[:size].copy_(upload(temperature, self._device))
        # Entries past a request's last block, and those of padding, only make slots that are not used.
        self._block_table[:count, : inputs.block_table.shape[1]].copy_(upload(inputs.block_table, self._device))

    def _grow(self, shape: TreeShape, drawn: bool, size: int) -> None:
        integers = self._integers[:, :size]
        targets = DraftTargets(
            texts=(),
            roots=integers[_ROOTS],
            contexts=integers[_CONTEXTS],
            context_lens=(max(self._context_length - shape.num_slots, 1),) * size,
            block_table=self._block_table[:size],
            rows=integers[_ROWS],
            draws=DrawSource(self._temperature[:size], integers[_SEEDS], integers[_POSITIONS]) if drawn else None,
        )
        grown = self._drafter.draft(targets, shape, self._meet)
        place = _first(self._trees[shape, drawn], size)
        for name in ("tokens", "parents", "depths", "scores"):
            getattr(place, name).copy_(getattr(grown, name))
        if place.drawn is not None and grown.drawn is not None:
            place.drawn.probs.copy_(grown.drawn.probs)

    def _meet(self, num_tokens: int, num_logits: int) -> PassCounts | None:
        if self._dp_size == 1:
            return None
        return PassCounts((num_tokens,) * self._dp_size, (num_logits,) * self._dp_size)


def _first(trees: TokenTree, count: int) -> TokenTree:
    """The first trees, in place."""
    drawn = None if trees.drawn is None else DrawnFrom(trees.drawn.probs[:count], trees.drawn.rows)
    return TokenTree(trees.tokens[:count], trees.parents[:count], trees.depths[:count], trees.scores[:count], drawn)


class CatchUpGraphs:
    """Graphs that keep what captured steps of one kind have brought: accepted entries move, the drafter catches up.

    They read the steps' own static tensors, and are to be captured after them, for the same sizes.

    Args:
        steps: captured steps, with hidden states.
        num_layers: of the main model.
        max_depth: drafts of the longest path; 0 where there are none.
    """

    def __init__(
        self,
        steps: GraphRunner,
        drafter: NextNDrafter,
        pool: KVCachePool,
        backend: GraphBackend,
        *,
        num_layers: int,
        max_depth: int,
    ) -> None:
        self._steps = steps
        self._drafter = drafter
        self._pool = pool
        self._backend = backend
        self._num_layers = num_layers
        self._width = max_depth + 1
        self._graphs: dict[int, CapturedFunction] = {}

    def capture(self, sizes: Sequence[int]) -> None:
        """Captures a graph for each size."""
        largest, device = max(sizes), self._pool.layers[0].device
        self._nodes = torch.zeros((largest, self._width), dtype=torch.int64, device=device)
        self._tokens = torch.zeros((largest, self._width), dtype=torch.int64, device=device)
        self._lengths = torch.ones(largest, dtype=torch.int64, device=device)
        self._rows = torch.full((largest,), self._drafter.padding_row, device=device)
        for size in sorted(sizes, reverse=True):
            self._graphs[size] = self._backend.capture(partial(self._catch_up, size))

    def run(self, tokens: Tensor, rows: Int64Array, paths: AcceptedPaths | None) -> None:
        """Keep what the step that was replayed last has brought.

        Args:
            tokens: int64 [B, at most max_depth + 1], new tokens of its requests.
            rows: theirs, of the drafter's memory.
            paths: accepted ones; None: there are no drafts.
        """
        count, width = tokens.shape
        size = min(size for size in self._graphs if size >= count)
        padded_rows = np.full(size, self._drafter.padding_row, dtype=np.int64)
        padded_rows[:count] = rows
        self._rows[:size].copy_(upload(padded_rows, self._rows.device))
        self._tokens[:count, :width].copy_(tokens)
        if paths is not None:
            self._lengths[:count].copy_(paths.lengths)
            self._nodes[:count, :width].copy_(paths.nodes)
            self._nodes[:count, width:].fill_(-1)
        self._graphs[size].replay()

    def _catch_up(self, size: int) -> None:
        batch, (_, hidden) = self._steps.part(size)
        nodes, rows = self._nodes[:size], self._rows[:size]
        slots = batch.slot_mapping.view(size, -1)
        is_padding = slots[:, 0] < 0
        if self._steps.kind.has_branches:
            owners = torch.arange(size, device=slots.device).masked_fill(is_padding, 0)
            move_kept(self._pool, self._num_layers, nodes[owners], slots[owners].clamp(min=0))
        entries = new_entries(
            nodes, self._lengths[:size], self._tokens[:size], hidden, batch.positions, batch.slot_mapping
        )
        entries.hidden.view(size, -1).masked_fill_(is_padding[:, None], 0.0)
        self._drafter.extend(entries.hidden, entries.next_ids, entries.positions, entries.slots, entries.last, rows)
