"""Decode steps captured once per batch size and replayed: what a small step costs without a launch per kernel.

A batch is padded to the next captured size. What the graph reads lies in static buffers; a padding row has token 0 at
position 0, slot -1 (its latent is stored nowhere) and a cache of no tokens (it attends to nothing and yields 0), so
it computes finite numbers that nobody reads and disturbs no other row. Host-side bounds of the lengths are baked into a
graph and therefore those of the context. With several attention groups all of them capture the same sizes in the same
order and replay the same one at the same time, because collectives are in the graphs; a group may have padding only.

Not yet run on a GPU: here and in the tests everything but the capture itself is tried, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsengine.engine.batch_inputs import BatchInputs
from dsengine.engine.lock_step import StepKind
from dsengine.kernels.registry import Kernels
from dsengine.model.forward_batch import ForwardBatch
from dsengine.model.transfer import upload
from dsengine.specdec.shape import TreeShape
from dsengine.specdec.tree import TokenTree

GraphFunction = Callable[[], None]

DEFAULT_MAX_BATCH_SIZE = 256

# Operations that no captured step calls; every other one must run without waiting for the host.
OUTSIDE_GRAPHS = frozenset({"mla_prefill", "merge_attention", "gather_latents", "rope", "process_logits", "sample"})
# Operations that only models with FP8 weights call.
FP8_WEIGHTS_ONLY = frozenset(
    {"gemm_fp8_block", "quant_fp8_group", "rms_norm_quant", "add_rms_norm_quant", "silu_mul_quant"}
)


class CapturedFunction(Protocol):
    """A function that has been captured."""

    def replay(self) -> None:
        """Does once more what the function did, with what the tensors that it read hold now."""


class GraphBackend(Protocol):
    """Captures functions that read and write the same tensors every time; one runs at a time, so they share memory."""

    def capture(self, function: GraphFunction) -> CapturedFunction: ...


def graph_batch_sizes(wanted: Sequence[int], largest: int | None, max_running_requests: int) -> list[int]:
    """Batch sizes to capture, rising: those wanted, or 1, 2, 4 and multiples of 8 (of 16 above 256), up to `largest`.

    Nothing larger than `max_running_requests` can occur; unless the caller names the sizes, the last one is exactly
    the largest batch there may be.

    Args:
        largest: None: 256.

    Raises:
        ValueError: none of the wanted sizes is left.
    """
    limit = min(largest if largest is not None else DEFAULT_MAX_BATCH_SIZE, max_running_requests)
    if wanted:
        sizes = sorted({size for size in wanted if size <= limit})
        if not sizes:
            raise ValueError(
                f"cuda_graph_bs is {', '.join(map(str, wanted))}; at least one size must be at most {limit} "
                "(the smaller of --cuda-graph-max-bs and --max-running-requests)"
            )
        return sizes
    usual = [1, 2, 4, *range(8, 256, 8), *range(256, limit + 1, 16)]
    return sorted({size for size in usual if size < limit} | {limit})


def operations_against_capture(kernels: Kernels, has_fp8_weights: bool) -> list[str]:
    """Operations of a decode step whose chosen backend may wait for the host, as "moe_experts=ref"."""
    exempt = OUTSIDE_GRAPHS if has_fp8_weights else OUTSIDE_GRAPHS | FP8_WEIGHTS_ONLY
    return [
        f"{operation}={backend}"
        for operation, backend in kernels.table().items()
        if backend in ("ref", "cpu", "native") and operation not in exempt
    ]


class GraphRunner:
    """Runs batches in which every request brings the same number of new tokens through captured graphs.

    Args:
        function: what is captured: reads a batch, returns tensors with one row per token.
        backend: captures and replays.
        device: of the model.
        block_size: tokens per cache block.
        context_length: longest request; bounds the block table and, in every graph, the lengths.
        tokens_per_request: new tokens of each request: 1 for decode, more to verify drafts.
        has_branches: these tokens form trees rather than chains.
        dp_size: attention groups, all of which capture and replay the same sizes at the same time.
    """

    def __init__(
        self,
        function: Callable[[ForwardBatch], tuple[Tensor, ...]],
        backend: GraphBackend,
        *,
        device: torch.device,
        block_size: int,
        context_length: int,
        tokens_per_request: int = 1,
        has_branches: bool = False,
        dp_size: int = 1,
    ) -> None:
        self._function = function
        self._backend = backend
        self._device = device
        self._block_size = block_size
        self._context_length = context_length
        self._tokens_per_request = tokens_per_request
        self._has_branches = has_branches
        self._dp_size = dp_size
        self._graphs: dict[int, CapturedFunction] = {}
        self._inputs: ForwardBatch | None = None
        self._outputs: tuple[Tensor, ...] = ()

    @property
    def sizes(self) -> list[int]:
        """Captured batch sizes, rising."""
        return sorted(self._graphs)

    @property
    def kind(self) -> StepKind:
        """Of the steps."""
        return StepKind(self._tokens_per_request, self._has_branches)

    def capture(self, sizes: Sequence[int]) -> None:
        """Captures a graph for each size; the largest first, so that all others fit into its memory."""
        largest = max(sizes)
        static = self._inputs = self._padding_batch(largest)
        if not self._outputs:
            # All graphs write their results to the same place: kept apart, logits alone would take gigabytes.
            self._outputs = tuple(torch.empty_like(output) for output in self._function(static))
        for size in sorted(sizes, reverse=True):
            batch = self._first_requests(static, size)
            self._graphs[size] = self._backend.capture(lambda batch=batch: self._compute(batch))  # type: ignore[misc]

    def write_where(self, other: GraphRunner) -> None:
        """Write the results where another runner does, which has captured as many rows at least; before `capture`."""
        self._outputs = other._outputs

    def holds(self, num_requests: int) -> bool:
        """Whether there is a graph for so many requests."""
        return 0 < num_requests <= max(self._graphs, default=0)

    def fits(self, inputs: BatchInputs) -> bool:
        """Whether there is a graph for this batch: equally many new tokens everywhere, and all their outputs wanted."""
        per_request, count = self._tokens_per_request, inputs.num_requests
        return (
            self.holds(count)
            and inputs.num_tokens == len(inputs.logits_indices) == count * per_request
            and inputs.num_decodes == count
            and all(length == per_request for length in inputs.query_lens)
        )

    def run(
        self, inputs: BatchInputs, drawn: Tensor | None, tree: TokenTree | None = None, at_least: int = 0
    ) -> tuple[Tensor, ...]:
        """Run a batch that `fits`, or, where another attention group has requests, an empty one.

        Args:
            drawn: int64 [N], tokens drawn by the previous step, on the device.
            tree: the requests' tokens, where they are drafts.
            at_least: requests for which there must be room, as the largest attention group has them.

        Returns:
            the function's outputs, one row per token of the batch; valid until the next run.
        """
        size = min(size for size in self._graphs if size >= max(inputs.num_requests, at_least))
        self._load(inputs, size, drawn)
        if tree is not None:
            self._load_trees(tree)
        self._clear_masks(inputs.num_tokens, size)
        self._graphs[size].replay()
        return tuple(output[: inputs.num_tokens] for output in self._outputs)

    def part(self, num_requests: int) -> tuple[ForwardBatch, tuple[Tensor, ...]]:
        """The static batch and outputs of the first requests: after a run theirs, then padding up to its size.

        The batch's host-side bounds are those of the graphs, not of any run.
        """
        assert self._inputs is not None, "nothing is captured"
        tokens = num_requests * self._tokens_per_request
        return self._first_requests(self._inputs, num_requests), tuple(output[:tokens] for output in self._outputs)

    def _compute(self, batch: ForwardBatch) -> None:
        for place, output in zip(self._outputs, self._function(batch), strict=True):
            place[: len(output)].copy_(output)

    def _load(self, inputs: BatchInputs, size: int, drawn: Tensor | None) -> None:
        """Fills the static tensors of one size; what stood there before must not shine through."""
        static = self._inputs
        assert static is not None
        count, tokens = inputs.num_requests, inputs.num_tokens
        padded_tokens = size * self._tokens_per_request
        for place, values, padding in (
            (static.input_ids[:padded_tokens], inputs.input_ids, 0),
            (static.positions[:padded_tokens], inputs.positions, 0),
            (static.slot_mapping[:padded_tokens], inputs.slot_mapping, -1),
            (static.cache_seqlens[:size], inputs.cache_seqlens, 0),
        ):
            used = len(values)
            place[:used].copy_(upload(values, self._device))
            place[used:].fill_(padding)
        # Entries past a request's last block are never read, so the rest of the table may be anything.
        static.block_table[:count, : inputs.block_table.shape[1]].copy_(upload(inputs.block_table, self._device))
        inputs.fill_open_tokens(static.input_ids[:tokens], drawn)

    def _load_trees(self, tree: TokenTree) -> None:
        static, tokens = self._inputs, tree.tokens.numel()
        assert static is not None
        static.input_ids[:tokens].copy_(tree.tokens.flatten())
        if static.tree_mask is not None:
            positions = static.positions[:tokens].view_as(tree.depths)
            positions.copy_(positions[:, :1] + tree.depths)
            static.tree_mask[:tokens].copy_(tree.ancestor_mask().flatten(0, 1))

    def _clear_masks(self, num_tokens: int, size: int) -> None:
        """Those of padding, of which there may be nothing else."""
        static = self._inputs
        assert static is not None
        if static.tree_mask is not None:
            static.tree_mask[num_tokens : size * self._tokens_per_request].fill_(False)

    def _padding_batch(self, size: int) -> ForwardBatch:
        per_request, device = self._tokens_per_request, self._device
        tokens = size * per_request
        max_blocks = -(-self._context_length // self._block_size)
        return ForwardBatch(
            input_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
            positions=torch.zeros(tokens, dtype=torch.int64, device=device),
            slot_mapping=torch.full((tokens,), -1, dtype=torch.int64, device=device),
            block_table=torch.zeros((size, max_blocks), dtype=torch.int32, device=device),
            cache_seqlens=torch.zeros(size, dtype=torch.int32, device=device),
            cu_seqlens_q=torch.arange(0, tokens + 1, per_request, dtype=torch.int32, device=device),
            num_decodes=size,
            num_decode_tokens=tokens,
            query_lens=(per_request,) * size,
            context_lens=(self._context_length - per_request,) * size,
            logits_indices=torch.arange(tokens, device=device),
            tree_mask=torch.zeros((tokens, per_request), dtype=torch.bool, device=device)
            if self._has_branches
            else None,
            rank_tokens=self._rank_tokens(tokens),
        )

    def _first_requests(self, batch: ForwardBatch, size: int) -> ForwardBatch:
        """Views of the first `size` requests' tensors."""
        tokens = size * self._tokens_per_request
        return ForwardBatch(
            input_ids=batch.input_ids[:tokens],
            positions=batch.positions[:tokens],
            slot_mapping=batch.slot_mapping[:tokens],
            block_table=batch.block_table[:size],
            cache_seqlens=batch.cache_seqlens[:size],
            cu_seqlens_q=batch.cu_seqlens_q[: size + 1],
            num_decodes=size,
            num_decode_tokens=tokens,
            query_lens=batch.query_lens[:size],
            context_lens=batch.context_lens[:size],
            logits_indices=batch.logits_indices[:tokens],
            tree_mask=None if batch.tree_mask is None else batch.tree_mask[:tokens],
            rank_tokens=self._rank_tokens(tokens),
        )

    def _rank_tokens(self, tokens: int) -> tuple[int, ...] | None:
        return (tokens,) * self._dp_size if self._dp_size > 1 else None


class TreeGraphs:
    """Graphs that verify trees, for every shape that may be asked for.

    What is captured depends on the number of nodes and on whether they branch. There are few of these: a chain of every
    depth, and a tree of every number of generations. Their results share one place.

    Args:
        new_runner: makes a runner, given `tokens_per_request` and `has_branches`.
        shapes: of the trees.
    """

    def __init__(self, new_runner: Callable[..., GraphRunner], shapes: Sequence[TreeShape]) -> None:
        kinds = sorted({StepKind.of_trees(shape) for shape in shapes}, reverse=True)
        self._runners = {kind: new_runner(**kind._asdict()) for kind in kinds}

    def capture(self, sizes: Sequence[int]) -> None:
        """Captures a graph for each size and shape; those of most nodes first."""
        runners = list(self._runners.values())
        for runner in runners:
            if runner is not runners[0]:
                runner.write_where(runners[0])
            runner.capture(sizes)

    def of(self, kind: StepKind) -> GraphRunner | None:
        """The runner for steps of this kind, None if there is none."""
        return self._runners.get(kind)

    @property
    def kinds(self) -> list[StepKind]:
        """Of the steps that are captured; those of most nodes first."""
        return list(self._runners)
