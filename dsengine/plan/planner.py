"""One plan: for each layout of a model on some GPUs, what is in memory, what fits, how fast it could be at best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from dsengine.plan.communication import GPUS_PER_NODE
from dsengine.plan.hardware import Gpu
from dsengine.plan.layout import Layout, layouts
from dsengine.plan.memory import (
    CONTEXT_BYTES,
    GRAPH_BYTES,
    RESERVE_BYTES,
    Weights,
    cache_bytes_per_token,
    cache_row_bytes,
    cache_tokens,
    suggested_fraction,
    weigh,
    working_bytes,
)
from dsengine.plan.roofline import Load, RankWork, total_seconds
from dsengine.plan.source import PlannedModel


@dataclass(frozen=True)
class Question:
    """What a plan is asked.

    Attributes:
        requests: numbers of requests decoded at a time by all GPUs together.
        contexts: tokens cached of each of them.
        mem_fraction: as `--mem-fraction-static`; None: suggest one.
        chunk_tokens: as `--chunked-prefill-size`.
        is_fp8_cache: as `--kv-cache-dtype fp8_e4m3`.
        dense_over_world, lm_head_over_world: as `--dense-parallel world` and `--lm-head-parallel world`.
    """

    gpu: Gpu
    num_gpus: int
    requests: tuple[int, ...]
    contexts: tuple[int, ...]
    mem_fraction: float | None
    block_size: int
    chunk_tokens: int
    is_fp8_cache: bool = False
    dense_over_world: bool = False
    lm_head_over_world: bool = False


@dataclass(frozen=True)
class StepBound:
    """Upper bounds for decoding at one load; times in seconds, of the rank with most requests.

    Attributes:
        operations: seconds of each operation of a MoE layer.
        fits: whether the cache holds all these tokens at once.
    """

    requests: int
    context: int
    fits: bool
    operations: dict[str, float]
    moe_layer: float
    dense_layer: float
    step: float

    @property
    def tokens_per_second(self) -> float:
        return self.requests / self.step

    @property
    def tokens_per_second_per_user(self) -> float:
        return 1 / self.step


@dataclass(frozen=True)
class LayoutPlan:
    """What one layout comes to.

    Attributes:
        part_bytes: weights on each rank, by part.
        cache_tokens: tokens in the cache of one attention group; 0: not even the weights fit.
        longest_context: of a single request.
        most_requests: of all groups together, by context.
    """

    layout: Layout
    part_bytes: dict[str, int]
    weight_bytes: int
    cache_tokens: int
    longest_context: int
    most_requests: dict[int, int]
    steps: tuple[StepBound, ...]


@dataclass(frozen=True)
class Plan:
    """The answer, before it is printed; `mem_fraction` is the one asked for or suggested."""

    model: PlannedModel
    weights: Weights
    question: Question
    mem_fraction: float
    working_bytes: int
    token_bytes: int
    layouts: tuple[LayoutPlan, ...]


def make_plan(model: PlannedModel, question: Question) -> Plan:
    """Work out every layout of `model` on the GPUs in question.

    Raises:
        ValueError: the model cannot be cut into that many parts in any way.
    """
    found = layouts(
        model.config,
        question.num_gpus,
        dense_over_world=question.dense_over_world,
        lm_head_over_world=question.lm_head_over_world,
    )
    if not found:
        reason = Layout(1, question.num_gpus, "ep").problem(model.config)
        raise ValueError(f"num_gpus is {question.num_gpus}, and no layout divides the model so: {reason}")
    weights = weigh(model, question.gpu)
    most = max(question.requests)
    needed = max(working_bytes(model.config, each, question.chunk_tokens, most) for each in found)
    fraction = question.mem_fraction or suggested_fraction(question.gpu, needed)
    token_bytes = cache_bytes_per_token(model.config, question.is_fp8_cache)
    plans = tuple(_plan_layout(model, question, weights, layout, fraction, needed) for layout in found)
    return Plan(model, weights, question, fraction, needed, token_bytes, plans)


def _plan_layout(
    model: PlannedModel, question: Question, weights: Weights, layout: Layout, fraction: float, needed: int
) -> LayoutPlan:
    weight_bytes = weights.bytes_per_rank(layout)
    token_bytes = cache_bytes_per_token(model.config, question.is_fp8_cache)
    tokens = cache_tokens(question.gpu, weight_bytes, needed, token_bytes, fraction, question.block_size)
    row_bytes = cache_row_bytes(model.config, question.is_fp8_cache)
    rank = RankWork(model.config, layout, question.gpu, row_bytes)
    return LayoutPlan(
        layout,
        {part.name: part.bytes_per_rank(layout) for part in weights.parts},
        weight_bytes,
        tokens,
        min(tokens, model.config.max_position_embeddings),
        {context: most_requests(tokens, context, question.block_size, layout) for context in question.contexts},
        tuple(
            bound_step(rank, requests, context, tokens, question.block_size)
            for context in question.contexts
            for requests in question.requests
        ),
    )


def most_requests(tokens: int, context: int, block_size: int, layout: Layout) -> int:
    """Requests of `context` tokens that the caches of all attention groups hold together."""
    blocks_each = ceil(context / block_size)
    return tokens // block_size // blocks_each * layout.attn_dp


def bound_step(rank: RankWork, requests: int, context: int, tokens: int, block_size: int) -> StepBound:
    """The roofline of one decode step."""
    layout, gpu = rank.layout, rank.gpu
    load = Load.decode(layout, requests, context)
    works = rank.decode_layer(load, is_moe=True)
    return StepBound(
        requests,
        context,
        requests <= most_requests(tokens, context, block_size, layout),
        {work.name: work.seconds(gpu) for work in works},
        total_seconds(works, gpu),
        total_seconds(rank.decode_layer(load, is_moe=False), gpu),
        rank.decode_step_seconds(load),
    )


def suggestions(plan: Plan) -> dict[str, LayoutPlan]:
    """The layout to serve with, by what it is best at: most tokens a second, or the quickest step of few requests.

    Both by the rooflines at the smallest context, of those layouts that hold a request of it; empty if none does.
    """
    context, requests = min(plan.question.contexts), min(plan.question.requests)
    holding = [layout for layout in plan.layouts if layout.most_requests[context] > 0]
    if not holding:
        return {}

    def most_tokens(layout: LayoutPlan) -> float:
        return _bound_full(plan, layout, context).tokens_per_second

    def quickest(layout: LayoutPlan) -> float:
        return next(step.step for step in layout.steps if (step.requests, step.context) == (requests, context))

    return {"throughput": max(holding, key=most_tokens), "latency": min(holding, key=quickest)}


def _bound_full(plan: Plan, layout: LayoutPlan, context: int) -> StepBound:
    """A step of as many requests as a layout would be started with."""
    config, question = plan.model.config, plan.question
    row_bytes = cache_row_bytes(config, question.is_fp8_cache)
    rank = RankWork(config, layout.layout, question.gpu, row_bytes)
    requests = _at_once(layout, context) * layout.layout.attn_dp
    return bound_step(rank, requests, context, layout.cache_tokens, question.block_size)


def _at_once(layout: LayoutPlan, context: int) -> int:
    """Requests at a time in each attention group."""
    return max(1, min(256, layout.most_requests[context] // layout.layout.attn_dp))


def suggested_flags(plan: Plan, chosen: LayoutPlan) -> tuple[str, ...]:
    """Flags of `dsengine serve` for one of the plan's layouts. More than one node: R and HOST:PORT stand for this
    machine's number and for where the first one listens."""
    question, layout = plan.question, chosen.layout
    longest = chosen.longest_context // question.block_size * question.block_size
    world = [("--tp-size", layout.world)] if layout.world > 1 else []
    world += [("--attn-dp-size", layout.attn_dp)] if layout.attn_dp > 1 else []
    world += [("--ep-size", layout.world)] if layout.world > 1 and layout.experts == "ep" else []
    shared = [("--dense-parallel", "world")] if layout.dense_over_world else []
    shared += [("--lm-head-parallel", "world")] if layout.lm_head_over_world else []
    nodes: list[tuple[str, object]] = []
    if layout.world > GPUS_PER_NODE:
        count = ceil(layout.world / GPUS_PER_NODE)
        nodes = [("--nnodes", count), ("--node-rank", "R"), ("--dist-init-addr", "HOST:PORT")]
    flags: Sequence[tuple[str, object]] = (
        *world,
        *shared,
        *nodes,
        ("--block-size", question.block_size),
        ("--mem-fraction-static", plan.mem_fraction),
        ("--context-length", min(longest, plan.model.config.max_position_embeddings)),
        ("--max-running-requests", _at_once(chosen, min(question.contexts))),
        ("--chunked-prefill-size", question.chunk_tokens),
        *([("--kv-cache-dtype", "fp8_e4m3")] if question.is_fp8_cache else []),
    )
    return tuple(word for name, value in flags for word in (name, str(value)))


def overhead_bytes(plan: Plan) -> dict[str, int]:
    """What else lies in a GPU's memory, estimated; the engine measures all but the first at start-up."""
    return {
        "CUDA context": CONTEXT_BYTES,
        "CUDA graphs": GRAPH_BYTES,
        "largest step": plan.working_bytes,
        "reserve": RESERVE_BYTES,
    }
