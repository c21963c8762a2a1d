"""Runs one scheduled batch through the model: numbers in, logits out.

`prepare` is the host's half and `forward` the device's: while the device is busy with one step, the host can prepare
the next. Batches of decodes alone run as a captured graph where there is one; all others run kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dsengine.engine.batch import ScheduledBatch, ScheduledRequest
from dsengine.engine.batch_inputs import BatchInputs, build_inputs
from dsengine.engine.graph_runner import GraphRunner, TreeGraphs
from dsengine.engine.lock_step import DECODE, LockStep, StepKind
from dsengine.engine.request import Request
from dsengine.engine.speculation import DrafterGraphs, PreparedDrafts, Speculator, with_trees
from dsengine.engine.step_outputs import StepOutputs
from dsengine.memory.kv_cache import KVCachePool
from dsengine.model.attention_plan import runs_absorbed
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.forward_batch import ForwardBatch
from dsengine.specdec.tree import TokenTree


@dataclass(frozen=True)
class PromptRows:
    """Tokens of one scheduled chunk whose logits score the next prompt token.

    Attributes:
        start, stop: rows of the hidden states; row `start + i` scores the prompt token at `scheduled.start + i + 1`.
    """

    scheduled: ScheduledRequest
    start: int
    stop: int


@dataclass(frozen=True)
class PreparedStep:
    """What the device needs to know of a step.

    Attributes:
        sampled: the requests that get a new token, in the order of the rows of the logits.
        prompts: chunks of prompts that are to be scored.
        drafts: trees and the drafter's work, where there is a drafter. Requests with trees stand first everywhere, and
            their logits are those of all their nodes.
        lock_step: of all attention groups, where there are several.
    """

    inputs: BatchInputs
    sampled: tuple[ScheduledRequest, ...]
    prompts: tuple[PromptRows, ...]
    drafts: PreparedDrafts | None = None
    lock_step: LockStep | None = None

    @property
    def most_scored(self) -> int:
        """Tokens of prompts that score the next one, in the attention group that has most of them."""
        if self.lock_step is not None:
            return max(self.lock_step.rank_scored)
        return sum(prompt.stop - prompt.start for prompt in self.prompts)


class ModelRunner:
    """Owns the model and its KV cache; turns a `ScheduledBatch` into logits.

    Args:
        graphs: captured decode steps, as from `GraphRunner.capture`.
        tree_graphs: captured steps that verify the speculator's trees.
        speculator: drafts trees and verifies them; None decodes token by token.

    Attributes:
        capture: captures all steps that are to be replayed, and has the runner use them; None: none are.
    """

    def __init__(
        self,
        model: DeepseekModel,
        pool: KVCachePool,
        graphs: GraphRunner | None = None,
        speculator: Speculator | None = None,
        tree_graphs: TreeGraphs | None = None,
    ) -> None:
        self.model = model
        self.pool = pool
        self.graphs = graphs
        self.speculator = speculator
        self.tree_graphs = tree_graphs
        self.capture: Callable[[], None] | None = None
        self.device = pool.layers[0].device

    def use_graphs(
        self, plain: GraphRunner | None, trees: TreeGraphs | None = None, drafter: DrafterGraphs | None = None
    ) -> None:
        """Replay these from now on, or nothing."""
        self.graphs, self.tree_graphs = plain, trees
        if self.speculator is not None:
            self.speculator.graphs = drafter

    def prepare(
        self,
        batch: ScheduledBatch,
        drawn_rows: Mapping[Request, int],
        lock_step: LockStep | None = None,
    ) -> PreparedStep:
        """Work out a step on the host.

        Args:
            drawn_rows: row of each request among the tokens that the previous step draws.
            lock_step: of all attention groups, where there are several; this one's part may be empty.
        """
        ordered = sorted(batch.requests, key=_part)
        sampled, prompts, logits_indices = _plan_rows(ordered)
        inputs = build_inputs(ordered, logits_indices, self.pool.block_size, drawn_rows)
        if lock_step is not None:
            inputs = replace(inputs, rank_tokens=lock_step.rank_tokens, rank_logits=lock_step.rank_logits)
        drafts = None
        if self.speculator is not None and (self.speculator.needs_hidden or any(s.num_drafts for s in ordered)):
            drafts = self.speculator.prepare(ordered, batch.tree, only_proposals=batch.only_proposals)
        return PreparedStep(inputs, tuple(sampled), tuple(prompts), drafts, lock_step)

    def forward(self, step: PreparedStep, drawn: Tensor | None, tree: TokenTree | None = None) -> StepOutputs:
        """Queue a step's work on the device.

        Args:
            drawn: int64 [N], tokens drawn by the previous step, on the device.
            tree: of the step's first requests.
        """
        needs_hidden = step.most_scored > 0 or (self.speculator is not None and self.speculator.needs_hidden)
        graphs, num_requests = self._graphs_for(step)
        if graphs is not None:
            logits, *hidden_states = graphs.run(step.inputs, drawn, tree, at_least=num_requests)
            static, _ = graphs.part(step.inputs.num_requests)
            hidden = hidden_states[0] if hidden_states else None
            return StepOutputs(logits, hidden, static.positions, static.slot_mapping, graphs.kind)
        batch = step.inputs.to_device(self.device, drawn)
        if tree is not None:
            assert step.drafts is not None and step.drafts.shape is not None
            batch = with_trees(batch, tree, is_chain=step.drafts.shape.topk == 1)
        hidden = self.model.forward(batch, self.pool.layers)
        logits = self.model.compute_logits(hidden[batch.logits_indices], batch.rank_logits)
        return StepOutputs(logits, hidden if needs_hidden else None, batch.positions, batch.slot_mapping)

    def _graphs_for(self, step: PreparedStep) -> tuple[GraphRunner | None, int]:
        """What replays a step, and how many requests its size must hold; (None, 0): it runs kernel by kernel."""
        if step.lock_step is not None:
            return self._graphs_for_all(step.lock_step, step)
        shape = step.drafts.shape if step.drafts is not None and step.drafts.trees else None
        graphs = self._graphs_of(DECODE if shape is None else StepKind.of_trees(shape))
        if graphs is None or step.prompts or not graphs.fits(step.inputs):
            return None, 0
        return graphs, step.inputs.num_requests

    def _graphs_for_all(self, lock_step: LockStep, step: PreparedStep) -> tuple[GraphRunner | None, int]:
        """The same with several attention groups: nothing but what all of them know may decide."""
        graphs = None if lock_step.kind is None else self._graphs_of(lock_step.kind)
        if graphs is None or not graphs.holds(lock_step.most_requests):
            return None, 0
        is_idle = step.inputs.num_requests == 0
        assert is_idle or (not step.prompts and graphs.fits(step.inputs)), f"not a step of kind {lock_step.kind}"
        return graphs, lock_step.most_requests

    def _graphs_of(self, kind: StepKind) -> GraphRunner | None:
        if kind == DECODE:
            return self.graphs
        return self.tree_graphs.of(kind) if self.tree_graphs is not None else None


def _part(scheduled: ScheduledRequest) -> int:
    """Trees come first, then what else runs absorbed, then what runs expanded."""
    if scheduled.num_drafts:
        return 0
    return 1 if runs_absorbed(scheduled.num_tokens, scheduled.start) else 2


def decode_function(
    model: DeepseekModel, pool: KVCachePool, batch: ForwardBatch, *, with_hidden: bool = False
) -> tuple[Tensor, ...]:
    """What a captured step computes: the logits of all tokens, float32 [T, vocab_size], and their hidden states."""
    hidden = model.forward(batch, pool.layers)
    logits = model.compute_logits(hidden, batch.rank_tokens)
    return (logits, hidden) if with_hidden else (logits,)


def _plan_rows(
    ordered: Sequence[ScheduledRequest],
) -> tuple[list[ScheduledRequest], list[PromptRows], list[int]]:
    sampled: list[ScheduledRequest] = []
    prompts: list[PromptRows] = []
    indices: list[int] = []
    first_token = 0
    for scheduled in ordered:
        if scheduled.is_scored:
            prompts.append(PromptRows(scheduled, first_token, first_token + scheduled.num_scored))
        first_token += scheduled.num_tokens
        if scheduled.samples:
            sampled.append(scheduled)
            indices.extend(range(first_token - scheduled.num_logits, first_token))
    return sampled, prompts, indices
