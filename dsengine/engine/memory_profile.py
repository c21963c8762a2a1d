"""Trying the largest steps before the cache is sized, so that none of them fails for want of memory later.

The steps are real ones through the real launcher: only the tokens are zeros, every block is the same one, and nothing
is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from dsengine.engine.batch import ScheduledBatch, ScheduledRequest
from dsengine.engine.batch_inputs import BatchInputs
from dsengine.engine.launch import StepLauncher
from dsengine.engine.lock_step import LockStep, summary
from dsengine.engine.memory_probe import MemoryProbe
from dsengine.engine.model_runner import PreparedStep, PromptRows
from dsengine.engine.request import Request
from dsengine.engine.sampling_params import MAX_TOP_LOGPROBS, SamplingParams
from dsengine.model.attention_plan import PIECE_TOKENS, runs_absorbed
from dsengine.specdec.shape import TreeShape


class Capturing(Protocol):
    def capture(self, most: int | None = None) -> None:
        """Captures graphs of the `most` largest sizes."""


# The most expensive choices: every row is sorted for top-p and once more for its alternatives.
_COSTLY = SamplingParams(
    temperature=1.0, top_p=0.9, min_p=0.01, logprobs=MAX_TOP_LOGPROBS, prompt_logprobs=MAX_TOP_LOGPROBS
)


def measure_steps(
    launcher: StepLauncher,
    probe: MemoryProbe,
    *,
    token_budget: int,
    max_running_requests: int,
    context_length: int,
    tree: TreeShape | None = None,
) -> int:
    """Bytes that the most demanding step needs for a while.

    Two steps are tried: a budget full of prompts with long contexts, all of whose tokens are scored; and as many
    decodes as there may be, the rest of the budget filled up with a prompt. Where trees are drafted, a third one drafts
    and verifies as many as there may be.

    Args:
        launcher: of a runner with a cache of at least one block.
        token_budget: most tokens of a step.
        tree: largest trees that the launcher's runner drafts.
    """
    block_size = launcher.runner.pool.block_size
    dp_size = launcher.runner.model.slots.layout.dp_size
    decodes = min(max_running_requests, token_budget)
    steps = [
        largest_step(count, token_budget - count, context_length=context_length, block_size=block_size, dp_size=dp_size)
        for count in (0, decodes)
    ]
    if tree is not None:
        count = min(max_running_requests, token_budget // tree.num_nodes)
        steps += [tree_step(launcher, count, tree, context_length)] if count else []
    return max(probe.extra_needed(lambda step=step: launcher.compute(step, None)) for step in steps)  # type: ignore[misc]


def largest_step(
    num_decodes: int, num_prompt_tokens: int, *, context_length: int, block_size: int, dp_size: int = 1
) -> PreparedStep:
    """A step of `num_decodes` decodes at the end of their context, and of prompts that continue long ones; the same in
    every attention group."""
    chunks = [(1, context_length - 1)] * num_decodes
    while num_prompt_tokens > 0:
        tokens = min(num_prompt_tokens, context_length)
        chunks.append((tokens, min(PIECE_TOKENS, context_length - tokens)))
        num_prompt_tokens -= tokens
    chunks.sort(key=lambda chunk: not runs_absorbed(*chunk))
    sampled: list[ScheduledRequest] = []
    prompts: list[PromptRows] = []
    first = 0
    for number, (tokens, context) in enumerate(chunks):
        request = Request(f"largest-{number}", [0] * (context + tokens), _COSTLY)
        scheduled = ScheduledRequest(request, context, tokens, samples=True)
        sampled.append(scheduled)
        if num_decodes == 0:
            prompts.append(PromptRows(scheduled, first, first + tokens - 1))
        first += tokens
    inputs = _inputs(chunks, context_length, block_size)
    if dp_size == 1:
        return PreparedStep(inputs, tuple(sampled), tuple(prompts))
    scored = sum(prompt.stop - prompt.start for prompt in prompts)
    alike = ((count,) * dp_size for count in (inputs.num_tokens, len(chunks), scored))
    rank_tokens, rank_logits, rank_scored = alike
    lock_step = LockStep(rank_tokens, None, len(chunks), rank_logits, rank_scored)
    inputs = replace(inputs, rank_tokens=rank_tokens, rank_logits=rank_logits)
    return PreparedStep(inputs, tuple(sampled), tuple(prompts), lock_step=lock_step)


def tree_step(launcher: StepLauncher, count: int, tree: TreeShape, context_length: int) -> PreparedStep:
    """A step of `count` trees at the end of their contexts. What it stores goes to the first block, over and over."""
    block_size = launcher.runner.pool.block_size
    start = max(context_length - tree.num_slots, 1)
    scheduled = []
    for number in range(count):
        request = Request(f"largest-tree-{number}", [0] * start, _COSTLY, output_token_ids=[0])
        request.block_table = [0] * -(-(start + tree.num_slots) // block_size)
        drafts = tree.num_nodes - 1
        scheduled.append(ScheduledRequest(request, start, tree.num_nodes, samples=True, num_drafts=drafts))
    batch = ScheduledBatch(scheduled, tree=tree)
    dp_size = launcher.runner.model.slots.layout.dp_size
    return launcher.runner.prepare(batch, {}, LockStep.of([summary(batch)] * dp_size) if dp_size > 1 else None)


def _inputs(chunks: Sequence[tuple[int, int]], context_length: int, block_size: int) -> BatchInputs:
    """(new tokens, context) of each request as the numbers of a pass that reads block 0 and stores nothing."""
    lengths = np.array([tokens for tokens, _ in chunks], dtype=np.int64)
    contexts = np.array([context for _, context in chunks], dtype=np.int64)
    ends = np.cumsum(lengths)
    num_tokens = int(ends[-1])
    starts = np.repeat(ends - lengths, lengths)
    nothing = np.empty(0, dtype=np.int64)
    return BatchInputs(
        input_ids=np.zeros(num_tokens, dtype=np.int64),
        positions=np.arange(num_tokens) - starts + np.repeat(contexts, lengths),
        slot_mapping=np.full(num_tokens, -1, dtype=np.int64),
        block_table=np.zeros((len(chunks), -(-context_length // block_size)), dtype=np.int32),
        cache_seqlens=(contexts + lengths).astype(np.int32),
        cu_seqlens_q=np.concatenate(([0], ends)).astype(np.int32),
        num_decodes=sum(runs_absorbed(*chunk) for chunk in chunks),
        query_lens=tuple(lengths.tolist()),
        context_lens=tuple(contexts.tolist()),
        logits_indices=ends - 1,
        open_tokens=nothing,
        open_sources=nothing,
    )


def measure_graphs(new_graphs: Callable[[], Capturing], probe: MemoryProbe, num_sizes: int) -> int:
    """Bytes that graphs for all sizes will keep, told from trial captures of the largest and of the two largest.

    The largest graph brings the memory that all share; every other one adds about what the second adds.
    """

    def kept_by(most: int) -> int:
        before = probe.free()
        graphs = new_graphs()
        graphs.capture(most)
        return before - probe.free()

    kept_by(1)  # the first capture also loads what stays loaded
    largest = kept_by(1)
    if num_sizes == 1:
        return largest
    return largest + max(kept_by(2) - largest, 0) * (num_sizes - 1)
