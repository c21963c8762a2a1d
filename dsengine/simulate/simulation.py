"""One question to the simulator and its answer: which layout, under which load, does what.

A cluster is made of identical instances of a layout, of which one is simulated; of very many attention groups some are
simulated. Both get their share of the workload, and the totals are scaled up again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from dsengine.engine.policy import SchedulerConfig
from dsengine.model.config import ModelConfig
from dsengine.plan.communication import GPUS_PER_NODE
from dsengine.plan.hardware import Gpu
from dsengine.plan.layout import Layout
from dsengine.plan.memory import (
    Weights,
    cache_bytes_per_token,
    cache_row_bytes,
    cache_tokens,
    suggested_fraction,
    weigh,
)
from dsengine.plan.memory import working_bytes as largest_step
from dsengine.plan.source import PlannedModel
from dsengine.simulate.cluster import Instance, Phase, Record
from dsengine.simulate.routing import RoutingName, make_router
from dsengine.simulate.step_model import StepModel
from dsengine.simulate.workload import Conversation, Synthetic

MOST_GROUPS = 64
"""Attention groups that are simulated, unless asked for others. Of 96 busy groups, 64 (or 8) gave 3 (4) % more output;
of 32 with little to do, 8 gave 44 % more, because they more often had no prompt to wait for."""
LARGEST_TP = 16


@dataclass(frozen=True)
class Cluster:
    """Machines and how they are used.

    Attributes:
        num_gpus: a multiple of the layout's world.
        mem_fraction: as `--mem-fraction-static`; None: suggest one.
        efficiency, overlap: as in `StepModel`.
        sampled_groups: attention groups of an instance that are simulated, at most.
    """

    model: PlannedModel
    gpu: Gpu
    layout: Layout
    num_gpus: int
    chunk_tokens: int = 2048
    block_size: int = 64
    max_running_requests: int = 256
    is_fp8_cache: bool = False
    mem_fraction: float | None = None
    efficiency: float = 1.0
    overlap: bool = False
    phase: Phase = "both"
    routing: RoutingName = "prefix"
    sampled_groups: int = MOST_GROUPS

    @property
    def instances(self) -> int:
        return self.num_gpus // self.layout.world

    @property
    def groups(self) -> int:
        """That are simulated."""
        return min(self.layout.attn_dp, self.sampled_groups)

    @property
    def thinning(self) -> float:
        """How many groups of the cluster each of those that are simulated stands for."""
        return self.instances * self.layout.attn_dp / self.groups

    def cache_tokens(self, weights: Weights | None = None) -> int:
        """Tokens that the cache of one group holds, by the plan's own rule.

        Args:
            weights: of the model on these GPUs, where they are at hand: adding them up takes a while.

        Raises:
            ValueError: the weights do not fit, or no request would.
        """
        config, layout = self.model.config, self.layout
        needed = largest_step(config, layout, self.chunk_tokens, self.max_running_requests)
        fraction = self.mem_fraction or suggested_fraction(self.gpu, needed)
        held = (weights or weigh(self.model, self.gpu)).bytes_per_rank(layout)
        row = cache_bytes_per_token(config, self.is_fp8_cache)
        tokens = cache_tokens(self.gpu, held, needed, row, fraction, self.block_size)
        if tokens < 2 * self.block_size:
            raise ValueError(
                f"{self.model.name} does not fit as {layout.name}: {held / 2**30:.1f} GiB of weights on each "
                f"{self.gpu.name} leave no room for a cache; more or larger GPUs are needed"
            )
        return tokens


def find_layout(config: ModelConfig, num_gpus: int, name: str) -> Layout:
    """A layout by its name, as in "TP8", "DP8 EP8" or "DP2 TP4 EP8"; redundant experts are added until all divide.

    Raises:
        ValueError: there is no such layout of this model, or it does not fill the GPUs.
    """
    matched = re.fullmatch(r"(?:DP(\d+))? ?(?:TP(\d+))? ?(?:EP(\d+))?", name.strip().upper())
    if not matched or not name.strip():
        raise ValueError(f"layout is {name!r}; it must look like TP8, DP8 EP8 or DP2 TP4 EP8")
    attn_dp, attn_tp = (int(size or 1) for size in matched.groups()[:2])
    world = attn_dp * attn_tp
    if matched[3] is not None and int(matched[3]) != world:
        raise ValueError(
            f"layout is {name!r}; experts are spread over all of its {world} GPUs, so it must say EP{world}"
        )
    if min(attn_dp, attn_tp) < 1 or num_gpus % world:
        raise ValueError(f"layout is {name!r}, of {world} GPUs, and num_gpus is {num_gpus}, which is no multiple of it")
    redundant = -config.n_routed_experts % world if matched[3] else 0
    layout = Layout(attn_tp, attn_dp, "ep" if matched[3] else "tp", redundant)
    if (problem := layout.problem(config)) is not None:
        raise ValueError(f"layout is {name!r}, and the model cannot be cut so: {problem}")
    return layout


def usual_layouts(cluster: Cluster) -> list[Layout]:
    """Attention-DP on and off: as wide as the cluster, and instances of the fewest GPUs that hold a model cut by TP."""
    config, found = cluster.model.config, []
    weights = weigh(cluster.model, cluster.gpu)
    if cluster.num_gpus > 1 and config.n_routed_experts:
        wide = Layout(1, cluster.num_gpus, "ep", -config.n_routed_experts % cluster.num_gpus)
        found += [wide] if _fits(replace(cluster, layout=wide), weights) else []
    size = 1
    while size <= min(LARGEST_TP, cluster.num_gpus):
        layout = Layout(size, 1, "tp")
        usable = cluster.num_gpus % size == 0 and layout.problem(config) is None
        if usable and _fits(replace(cluster, layout=layout), weights):
            return [*found, layout]
        size *= 2
    return found


def _fits(cluster: Cluster, weights: Weights) -> bool:
    try:
        return cluster.cache_tokens(weights) > 0
    except ValueError:
        return False


@dataclass(frozen=True)
class Outcome:
    """What came of a simulation; rates are of the whole cluster, between a fifth and four fifths of the answers.

    Attributes:
        input_tokens_per_second: of prompts, those found in the cache included; `computed` are the others.
        cache_hit_rate: tokens of prompts that were found in the cache.
        imbalance: tokens of the fullest group over the mean, averaged over the steps.
        communication: part of the time that exchanges add.
    """

    cluster: Cluster
    cache_tokens: int
    answered: int
    seconds: float
    steps: int
    input_tokens_per_second: float
    computed_tokens_per_second: float
    output_tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    step_p50: float
    cache_hit_rate: float
    imbalance: float
    communication: float
    preemptions: int

    @property
    def nodes(self) -> float:
        return self.cluster.num_gpus / GPUS_PER_NODE

    def as_data(self) -> dict[str, Any]:
        """JSON-ready; seconds, tokens and counts."""
        cluster = self.cluster
        data = {name: value for name, value in asdict(self).items() if name != "cluster"}
        return {
            "layout": cluster.layout.name,
            "instances": cluster.instances,
            "gpus": cluster.num_gpus,
            "gpu": cluster.gpu.name,
            "phase": cluster.phase,
            "routing": cluster.routing,
            "efficiency": cluster.efficiency,
            "overlap": cluster.overlap,
            "groups_simulated": cluster.groups,
            "groups": cluster.instances * cluster.layout.attn_dp,
            "input_tokens_per_second_per_node": round(self.input_tokens_per_second / self.nodes, 1),
            "output_tokens_per_second_per_node": round(self.output_tokens_per_second / self.nodes, 1),
            **{name: round(value, 6) if isinstance(value, float) else value for name, value in data.items()},
        }


def simulate(cluster: Cluster, workload: Synthetic | Sequence[Conversation]) -> Outcome:
    """Serve a workload, which is the whole cluster's, to its end.

    Raises:
        ValueError: the model does not fit, or a request cannot.
    """
    tokens, config = cluster.cache_tokens(), cluster.model.config
    conversations, concurrency = _share(workload, cluster)
    blocks = tokens // cluster.block_size
    scheduler = SchedulerConfig(
        block_size=cluster.block_size,
        max_running_requests=cluster.max_running_requests,
        # Prompts that arrive computed take no room in a step.
        token_budget=2**30 if cluster.phase == "decode" else cluster.chunk_tokens,
        context_length=config.max_position_embeddings,
    )
    row = cache_row_bytes(config, cluster.is_fp8_cache)
    layout, gpu = cluster.layout, cluster.gpu
    model = StepModel(config, layout, gpu, row, efficiency=cluster.efficiency, overlap=cluster.overlap)
    instance = Instance(
        model,
        scheduler,
        blocks,
        make_router(cluster.routing, cluster.groups, cluster.block_size, blocks),
        num_groups=cluster.groups,
        weight=layout.attn_dp / cluster.groups,
        phase=cluster.phase,
        concurrency=concurrency,
    )
    return _summarise(cluster, tokens, instance.run(conversations))


def _share(workload: Synthetic | Sequence[Conversation], cluster: Cluster) -> tuple[list[Conversation], int | None]:
    """The part of the workload that the simulated groups get, and how much of it at a time.

    Where prompts follow their prefixes, whole prefix groups are left out; elsewhere each group of the cluster sees all
    of them, and so do those that are simulated.
    """
    thinning, by_prefix = cluster.thinning, cluster.routing == "prefix"
    if isinstance(workload, Synthetic):
        thinned = replace(
            workload,
            conversations=ceil(workload.conversations / thinning),
            rate=workload.rate / thinning,
            concurrency=ceil(workload.concurrency / thinning),
            prefix_groups=ceil(workload.prefix_groups / thinning) if by_prefix else workload.prefix_groups,
        )
        return thinned.generate(), None if workload.rate else thinned.concurrency
    step = round(thinning)
    if by_prefix and len({each.prefix_group for each in workload}) > step:
        return [each for each in workload if each.prefix_group % step == 0], None
    return list(workload[::step]), None


def _summarise(cluster: Cluster, cache_tokens: int, record: Record) -> Outcome:
    finished = record.finished
    begin, end = finished[len(finished) // 5], finished[len(finished) * 4 // 5]
    steady = [step for step in record.steps if begin < step[0] <= end]
    if len(steady) < 10:
        steady = record.steps
    seconds = sum(step[1] for step in steady)
    entered, computed, drawn = (cluster.thinning * sum(step[i] for step in steady) / seconds for i in (3, 4, 5))
    durations = sorted(step[1] for step in steady)
    first, gaps = sorted(record.first_token), sorted(record.gaps.items())
    return Outcome(
        cluster,
        cache_tokens,
        len(finished),
        record.steps[-1][0],
        len(record.steps),
        entered,
        computed,
        drawn,
        first[len(first) // 2],
        first[min(len(first) * 99 // 100, len(first) - 1)],
        _quantile(gaps, 0.5),
        _quantile(gaps, 0.99),
        durations[len(durations) // 2],
        record.hit_tokens / max(record.prompt_tokens, 1),
        sum(record.imbalance) / len(record.imbalance),
        sum(step[2] for step in steady) / seconds,
        record.preemptions,
    )


def _quantile(counts: Sequence[tuple[float, int]], part: float) -> float:
    """Of values with their numbers, in ascending order; 0 where there are none."""
    left = part * sum(count for _, count in counts)
    for value, count in counts:
        left -= count
        if left <= 0:
            return value
    return 0.0
