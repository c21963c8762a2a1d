"""All that one engine captures: plain decode steps, those that verify trees, drafting, and catching up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from dsengine.engine.draft_graphs import CatchUpGraphs, DraftGraphs
from dsengine.engine.graph_runner import GraphBackend, GraphRunner, TreeGraphs
from dsengine.engine.lock_step import StepKind
from dsengine.engine.model_runner import decode_function
from dsengine.engine.speculation import DrafterGraphs
from dsengine.memory.kv_cache import KVCachePool
from dsengine.model.deepseek import DeepseekModel
from dsengine.specdec.drafter import NextNDrafter
from dsengine.specdec.shape import TreeShape

_TREES_UP_TO = 64  # requests: logits take as many rows as there are nodes; on large batches trees do not pay anyway


@dataclass(frozen=True)
class StepGraphs:
    """Graphs that share their memory, and what has to be captured in this order.

    Attributes:
        sizes: batch sizes of plain steps, rising.
        tree_sizes: of steps with trees, rising.
    """

    plain: GraphRunner
    trees: TreeGraphs | None
    drafter: DrafterGraphs | None
    sizes: Sequence[int]
    tree_sizes: Sequence[int]

    def capture(self, most: int | None = None) -> None:
        """Captures all sizes, or of each kind of step the `most` largest ones, to learn what they take."""
        first = 0 if most is None else -most
        sizes, tree_sizes = self.sizes[first:], self.tree_sizes[first:]
        self.plain.capture(sizes)
        if self.trees is not None and tree_sizes:
            self.trees.capture(tree_sizes)
        if self.drafter is None:
            return
        if tree_sizes:
            self.drafter.drafts.capture(tree_sizes)
        for kind, graphs in self.drafter.catch_up.items():
            graphs.capture(sizes if kind == self.plain.kind else tree_sizes)


def tree_sizes_of(sizes: Sequence[int], most_trees: int | None) -> list[int]:
    """Batch sizes for which steps with trees are captured.

    Args:
        sizes: of plain steps, rising.
        most_trees: no more of them can be captured; None: any number can.
    """
    possible = [size for size in sizes if most_trees is None or size <= most_trees]
    return [size for size in possible if size <= _TREES_UP_TO] or possible[:1]


def make_step_graphs(
    model: DeepseekModel,
    pool: KVCachePool,
    backend: GraphBackend,
    *,
    context_length: int,
    sizes: Sequence[int],
    tree_sizes: Sequence[int] = (),
    shapes: Sequence[TreeShape] = (),
    drafter: NextNDrafter | None = None,
    draws: bool = False,
) -> StepGraphs:
    """Graphs that are still to be captured.

    Args:
        context_length: longest request.
        shapes: of the trees that may be drafted.
        drafter: whose work is to be captured too.
        draws: trees may be drawn.
    """
    layout = model.slots.layout
    runner = partial(
        GraphRunner,
        partial(decode_function, model, pool, with_hidden=drafter is not None),
        backend,
        device=model.device,
        block_size=pool.block_size,
        context_length=context_length,
        dp_size=layout.dp_size,
    )
    plain, trees = runner(), TreeGraphs(runner, shapes) if shapes and tree_sizes else None
    if drafter is None:
        return StepGraphs(plain, trees, None, sizes, tree_sizes)
    depths = {plain.kind: 0}
    for shape in shapes if trees is not None else ():
        kind = StepKind.of_trees(shape)
        depths[kind] = max(depths.get(kind, 0), shape.max_depth)
    catch_up = {}
    for kind, depth in depths.items():
        steps = plain if trees is None else trees.of(kind) or plain
        catch_up[kind] = CatchUpGraphs(steps, drafter, pool, backend, num_layers=len(model.layers), max_depth=depth)
    drafts = DraftGraphs(
        drafter,
        backend,
        shapes,
        draws=draws,
        device=model.device,
        block_size=pool.block_size,
        context_length=context_length,
        dp_size=layout.dp_size,
        vocab_size=model.config.vocab_size,
    )
    return StepGraphs(plain, trees, DrafterGraphs(drafts, catch_up), sizes, tree_sizes)
