"""`dsengine plan --simulate`: a trace or a made-up load replayed on GPUs that nobody has to own."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsengine.cli_flags import UsageError
from dsengine.config import EngineConfig

if TYPE_CHECKING:
    from dsengine.plan.source import PlannedModel
    from dsengine.simulate.simulation import Cluster, Outcome
    from dsengine.simulate.workload import Conversation, Synthetic

REMARKS = (
    "Requests go through the engine's own scheduler, prefix cache and routing, one of each per attention group. A step "
    "takes as long as the fullest group's rooflines, divided by --efficiency, and published costs of all-reduces and "
    "of DeepEP's dispatch and combine on Hopper; nothing is counted for launches and sampling, experts are chosen "
    "evenly, nothing is drafted. With --efficiency 1 it is a bound; no figure here was measured.",
    "The engine exchanges tokens through torch.distributed, or by DeepEP with --moe-exchange deepep, which has not run "
    "on GPUs yet, and overlaps nothing with that: --overlap-communication is what could be had.",
)


def add_simulation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a simulation; they mean nothing without the first of them, and are refused then."""
    group = parser.add_argument_group("simulation")
    group.add_argument(
        "--simulate",
        nargs="+",
        metavar="TRACE",
        help="replay a trace (JSON lines with arrival, input_len, output_len, and if wanted prefix_group and "
        "prefix_len), or a load made up from NAME=VALUE: conversations, rate or concurrency, input_len, output_len, "
        "spread, prefix_groups, prefix_len, turns, think_time, seed",
    )
    unset = argparse.SUPPRESS
    group.add_argument(
        "--layout", action="append", default=unset, metavar="NAME", help="as in TP8 or 'DP8 EP8'; may be repeated "
        "[attention-DP on and off]",
    )  # fmt: skip
    group.add_argument(
        "--efficiency",
        type=float,
        default=unset,
        metavar="X",
        help="part of each roofline that is reached [1.0: a bound]",
    )
    group.add_argument(
        "--overlap-communication", action="store_true", default=unset, help="exchanges run beside computation, for free"
    )
    group.add_argument(
        "--phase",
        choices=("both", "prefill", "decode"),
        default=unset,
        metavar="{both,prefill,decode}",
        help="work of these GPUs, where prompts and decoding are kept apart [both]",
    )
    group.add_argument(
        "--routing",
        choices=("prefix", "least_loaded", "round_robin"),
        default=unset,
        metavar="{prefix,least_loaded,round_robin}",
        help="how attention-DP groups are chosen [prefix]",
    )
    group.add_argument(
        "--sampled-groups", type=int, default=unset, metavar="N", help="attention-DP groups simulated, at most [64]"
    )


_FLAGS = ("layout", "efficiency", "overlap_communication", "phase", "routing", "sampled_groups")


def check_no_simulation(args: argparse.Namespace) -> None:
    """Refuse flags that only a simulation has.

    Raises:
        UsageError: one was given.
    """
    for name in _FLAGS:
        if name in args:
            raise UsageError(f"--{name.replace('_', '-')} is of use with --simulate only")


def run_simulation(args: argparse.Namespace, config: EngineConfig, model: PlannedModel) -> int:
    """Simulate every layout asked for, and print what came of it; returns the exit status."""
    from dsengine.plan.hardware import find_gpu
    from dsengine.plan.layout import Layout
    from dsengine.simulate.simulation import MOST_GROUPS, Cluster, find_layout, simulate, usual_layouts

    given = vars(args)
    for name in ("dense_parallel", "lm_head_parallel"):
        if getattr(config, name) == "world":
            raise UsageError(f"--{name.replace('_', '-')} is world, which --simulate does not know; leave it out")
    if given.get("sampled_groups", 1) < 1:
        raise UsageError(f"--sampled-groups is {args.sampled_groups}; it must be at least 1")
    cluster = Cluster(
        model,
        find_gpu(args.gpu),
        Layout(),
        args.num_gpus,
        chunk_tokens=config.chunked_prefill_size,
        block_size=config.block_size_on("cuda"),
        max_running_requests=config.max_running_requests,
        is_fp8_cache=config.kv_cache_dtype == "fp8_e4m3",
        mem_fraction=given.get("mem_fraction_static"),
        efficiency=given.get("efficiency", 1.0),
        overlap=given.get("overlap_communication", False),
        phase=given.get("phase", "both"),
        routing=given.get("routing", "prefix"),
        sampled_groups=given.get("sampled_groups", MOST_GROUPS),
    )
    names = given.get("layout")
    layouts = [find_layout(model.config, args.num_gpus, name) for name in names] if names else usual_layouts(cluster)
    if not layouts:
        raise UsageError(f"{model.name} does not fit on {args.num_gpus} x {cluster.gpu.name}, however it is cut")
    workload = _workload(args.simulate)
    outcomes = [simulate(replace(cluster, layout=layout), workload) for layout in layouts]
    if args.json:
        print(json.dumps({"simulations": [outcome.as_data() for outcome in outcomes], "remarks": REMARKS}))
    else:
        _print(cluster, outcomes)
    return 0


def _workload(words: list[str]) -> Synthetic | list[Conversation]:
    from dsengine.simulate.workload import Synthetic, read_trace

    if len(words) == 1 and "=" not in words[0]:
        try:
            return read_trace(Path(words[0]))
        except OSError as error:
            raise UsageError(f"--simulate: {error}") from None
    return Synthetic.parse(words)


def _print(cluster: Cluster, outcomes: list[Outcome]) -> None:
    from rich.table import Table

    from dsengine.progress import table_console

    console = table_console()
    title = (
        f"{cluster.model.name} on {cluster.num_gpus} x {cluster.gpu.name}, simulated at efficiency {cluster.efficiency}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("layout", no_wrap=True)
    for heading in ("in tok/s/node", "computed", "out tok/s/node", "TTFT s p50", "p99", "ITL ms p50", "p99", "cached",
                    "fullest", "exchanges"):  # fmt: skip
        table.add_column(heading, justify="right")
    for each in outcomes:
        count = f"{each.cluster.instances} x " if each.cluster.instances > 1 else ""
        table.add_row(
            count + each.cluster.layout.name,
            f"{each.input_tokens_per_second / each.nodes:.0f}",
            f"{each.computed_tokens_per_second / each.nodes:.0f}",
            f"{each.output_tokens_per_second / each.nodes:.0f}",
            f"{each.ttft_p50:.2f}",
            f"{each.ttft_p99:.2f}",
            f"{each.itl_p50 * 1e3:.1f}",
            f"{each.itl_p99 * 1e3:.1f}",
            f"{each.cache_hit_rate:.0%}",
            f"{each.imbalance:.2f} x",
            f"{each.communication:.0%}",
        )
    console.print(table)
    for each in outcomes:
        simulated, there = each.cluster.groups, each.cluster.instances * each.cluster.layout.attn_dp
        if simulated < there:
            console.print(f"- {each.cluster.layout.name}: {simulated} of {there} attention groups were simulated.")
    for remark in REMARKS:
        console.print(f"- {remark}")
