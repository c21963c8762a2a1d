"""What does the cluster simulator predict, and how far is that from what has been published of a real cluster?

First attention-DP on and off on 8, 16, 96 and 1,000 H200s under a load that grows with them. Then the phases that
SGLang measured apart on 12 nodes of 8 H100s (LMSYS, 5 May 2025), DeepSeek-V3 in both: prompts on 4 nodes (EP32, 16,384
tokens a GPU and step), and decoding on 9 (EP72, 32 redundant experts, 256 sequences a GPU with 2,000 tokens each). The
efficiency is given, not fitted: 1 is the roofline's bound, 0.65 about what the best published kernels reach of it on
whole layers (0.54 to 0.64 at EP32, 0.71 to 0.75 at EP8). Ends with one JSON line.

    python -m benchmarks.cluster [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

from dsengine.plan.hardware import GPUS
from dsengine.plan.layout import Layout
from dsengine.plan.source import PlannedModel, find_model
from dsengine.simulate.simulation import Cluster, find_layout, simulate, usual_layouts
from dsengine.simulate.workload import Synthetic

SIZES = (8, 16, 96, 1000)
EFFICIENCIES = (1.0, 0.65)
PUBLISHED_PROMPTS = {1000: 57_674, 2000: 54_543, 4000: 50_302}
"""Input tokens a second and node by length of the prompts; the round figure for 2,000 is 52.3k."""
PUBLISHED_DECODE = 22_282
"""Output tokens a second and node; the round figure is 22.3k."""


def sizes(model: PlannedModel, quick: bool) -> list[dict[str, Any]]:
    """The same load per GPU on more and more GPUs."""
    print(f"{'GPUs':>5} {'layout':>24} {'in tok/s/node':>14} {'out':>6} {'TTFT p50':>9} {'p99':>8} {'ITL p50':>8} "
          f"{'p99':>8} {'cached':>7} {'exchanges':>10} {'took':>6}")  # fmt: skip
    rows = []
    for gpus in SIZES:
        load = Synthetic(
            conversations=gpus * (24 if quick else 96), concurrency=gpus * 32, input_len=1000, output_len=100,
            prefix_groups=gpus, prefix_len=500,
        )  # fmt: skip
        base = Cluster(model, GPUS["h200"], Layout(), gpus, efficiency=0.65, sampled_groups=16 if quick else 96)
        for layout in usual_layouts(base):
            # As many tokens of prompts a step on each node, and as many requests at a time.
            share = layout.attn_tp
            began = time.perf_counter()
            cluster = replace(base, layout=layout, chunk_tokens=2048 * share, max_running_requests=256 * share)
            outcome = simulate(cluster, load)
            took = time.perf_counter() - began
            name = f"{cluster.instances} x {layout.name}" if cluster.instances > 1 else layout.name
            print(
                f"{gpus:5d} {name:>24} {outcome.input_tokens_per_second / outcome.nodes:14.0f} "
                f"{outcome.output_tokens_per_second / outcome.nodes:6.0f} {outcome.ttft_p50:7.2f} s "
                f"{outcome.ttft_p99:6.2f} s {outcome.itl_p50 * 1e3:5.0f} ms {outcome.itl_p99 * 1e3:5.0f} ms "
                f"{outcome.cache_hit_rate:7.0%} {outcome.communication:10.0%} {took:4.0f} s",
                flush=True,
            )
            rows.append(outcome.as_data() | {"took_s": round(took, 1)})
    return rows


def published(model: PlannedModel, quick: bool) -> list[dict[str, Any]]:
    """The phases of SGLang's 96 GPUs, each beside what was measured."""
    h100, config = GPUS["h100"], model.config
    prefill = Cluster(
        model, h100, find_layout(config, 32, "DP32 EP32"), 32, chunk_tokens=16384, phase="prefill", mem_fraction=0.85
    )
    # All groups have the same to do, so that a few of them stand for all.
    decode = Cluster(
        model, h100, find_layout(config, 72, "DP72 EP72"), 72, phase="decode", mem_fraction=0.85, sampled_groups=4
    )
    rows = []
    print(f"\n{'phase':>22} {'efficiency':>11} {'overlap':>8} {'predicted':>10} {'published':>10} {'difference':>11}")
    for efficiency in EFFICIENCIES:
        for overlap in (False, True):
            cases = [
                (f"prompts of {length}", prefill, measured, Synthetic(
                    conversations=32 * (16 if quick else 64), concurrency=32 * 32, input_len=length, output_len=1,
                    spread=0,
                )) for length, measured in PUBLISHED_PROMPTS.items()
            ]  # fmt: skip
            # 2,000 tokens in the middle of the answer.
            cases.append(("decoding at 2000", decode, PUBLISHED_DECODE, Synthetic(
                conversations=72 * 512, concurrency=72 * 256, input_len=1950, output_len=100, spread=0,
            )))  # fmt: skip
            for name, cluster, measured, load in cases:
                outcome = simulate(replace(cluster, efficiency=efficiency, overlap=overlap), load)
                rate = outcome.output_tokens_per_second if "dec" in name else outcome.input_tokens_per_second
                predicted = rate / outcome.nodes
                difference = predicted / measured - 1
                print(
                    f"{name:>22} {efficiency:11} {overlap!s:>8} {predicted:10.0f} {measured:10d} {difference:11.0%}",
                    flush=True,
                )
                rows.append({
                    "phase": name, "efficiency": efficiency, "overlap": overlap, "predicted": round(predicted),
                    "published": measured, "difference": round(difference, 3), "step_s": round(outcome.step_p50, 4),
                    "communication": round(outcome.communication, 3),
                })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests, and fewer groups simulated")
    parser.add_argument("--only", choices=("sizes", "published"), help="one of the two parts")
    args = parser.parse_args()
    model = find_model("deepseek-v3")
    found = {
        name: part(model, args.quick)
        for name, part in (("published", published), ("sizes", sizes))
        if args.only in (None, name)
    }
    print(json.dumps({"benchmark": "cluster", "model": model.name, "quick": args.quick, **found}))


if __name__ == "__main__":
    main()
