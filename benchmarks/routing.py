"""What does routing by prefixes gain over taking turns and over the least loaded rank?

The same conversations go, in one run, through each way of choosing the attention-DP rank: real schedulers and prefix
caches of every rank, steps timed by the rooflines of `dsengine plan` and published exchange costs (DeepSeek-V3 on 8
H200s, DP8 EP8). No model runs; cache hits are exact, times are the simulator's. Ends with one JSON line.

    python -m benchmarks.routing [--quick]
"""

from __future__ import annotations

import argparse
import json
import random
import time
import timeit
from dataclasses import replace
from typing import Any

from dsengine.parallel.prefix_routing import PrefixRouter
from dsengine.plan.hardware import GPUS
from dsengine.plan.layout import Layout
from dsengine.plan.source import find_model
from dsengine.simulate.routing import RoutingName
from dsengine.simulate.simulation import Cluster, Outcome, simulate
from dsengine.simulate.workload import Synthetic

ROUTINGS: tuple[RoutingName, ...] = ("round_robin", "least_loaded", "prefix")
RANKS = 8
WORKLOADS = {
    # Conversations of five turns, each of which begins with all that was said before.
    "multi-turn": Synthetic(
        conversations=480, concurrency=160, input_len=600, output_len=60, turns=5, think_time=2.0, spread=0.5
    ),
    # Documents that several requests are about: one rank's cache does not hold them all, those of 8 ranks do.
    "shared documents": Synthetic(
        conversations=1800,
        concurrency=256,
        input_len=300,
        output_len=60,
        prefix_groups=300,
        prefix_len=6000,
        spread=0.5,
    ),
    # One prompt that all requests begin with: nothing to gain, and something to lose by crowding.
    "one prefix": Synthetic(
        conversations=1200, concurrency=256, input_len=300, output_len=60, prefix_len=3000, spread=0.5
    ),
    "nothing shared": Synthetic(conversations=900, concurrency=256, input_len=1200, output_len=60, spread=0.5),
}


def lookup_microseconds(prompt_tokens: int, ranks: int) -> float:
    """Of one `route`, when the first three quarters of the prompt are known."""
    rng = random.Random(0)
    router = PrefixRouter(ranks, 64, 100_000)
    known = [rng.randrange(129_280) for _ in range(prompt_tokens * 3 // 4)]
    count = 100
    prompts = iter([known + [rng.randrange(129_280) for _ in range(prompt_tokens - len(known))] for _ in range(count)])
    return (
        timeit.timeit(lambda: router.route(next(prompts), "", [0] * ranks), number=count, timer=time.thread_time)
        / count
        * 1e6
    )


def show(name: str, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    print(f"\n{name}")
    headings = ("cache hits", "in tok/s", "out tok/s", "TTFT p50", "p99", "ITL p50", "p99", "fullest")
    print(f"{'routing':>14}" + "".join(f"{heading:>11}" for heading in headings))
    rows = []
    for outcome in outcomes:
        print(
            f"{outcome.cluster.routing:>14}{outcome.cache_hit_rate:11.1%}{outcome.input_tokens_per_second:11.0f}"
            f"{outcome.output_tokens_per_second:11.0f}{outcome.ttft_p50:9.2f} s{outcome.ttft_p99:9.2f} s"
            f"{outcome.itl_p50 * 1e3:8.0f} ms{outcome.itl_p99 * 1e3:8.0f} ms{outcome.imbalance:9.2f} x"
        )
        data = outcome.as_data()
        names = ("routing", "cache_hit_rate", "input_tokens_per_second", "computed_tokens_per_second", "seconds",
                 "output_tokens_per_second", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "imbalance")  # fmt: skip
        rows.append({name: data[name] for name in names})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sixth of the conversations")
    parser.add_argument("--efficiency", type=float, default=0.65, help="part of the rooflines that is reached [0.65]")
    args = parser.parse_args()
    cluster = Cluster(
        find_model("deepseek-v3"), GPUS["h200"], Layout(1, RANKS, "ep"), RANKS, efficiency=args.efficiency
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for name, workload in WORKLOADS.items():
        load = replace(workload, conversations=workload.conversations // 6) if args.quick else workload
        found[name] = show(name, [simulate(replace(cluster, routing=routing), load) for routing in ROUTINGS])
    microseconds = lookup_microseconds(4096, RANKS)
    print(f"\none look-up of a prompt of 4096 tokens: {microseconds:.0f} us")
    print(json.dumps({
        "benchmark": "routing", "efficiency": args.efficiency, "ranks": RANKS, "quick": args.quick,
        "workloads": found, "lookup_us_4096_tokens": round(microseconds, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
