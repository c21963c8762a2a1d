"""What does speculative decoding gain, over trees, batches and temperatures, beside plain decoding in the same run?

Every tree has an engine of its own; all of them and the plain one take turns within every round, so that a machine
that slows down slows all. The prompts are held-out problems of the demo model. The answers of each tree are compared
with the plain engine's, token for token, at every temperature, but for sampled ones accepted by rejection, whose
tokens are others. On a CPU that other programs use too, the speedup in processor time is the steadier figure.

    python benchmarks/specdec.py                                          the demo checkpoint
    python benchmarks/specdec.py --tree 3/1/4 3/4/8 --batch-size 1 8 --temperature 0 0.8 --plot speedup.png
    python benchmarks/specdec.py --tree 3/1/4 3/1/4:rejection --temperature 1         both rules of acceptance
    python benchmarks/specdec.py --roofline deepseek-v3                   no model is run: the plan's roofline

With --roofline the speedup of true shapes is computed, not measured, for acceptance rates that are imposed: the best
tree by the least time of drafting, verifying and catching up on H200s. The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsengine import LLM, SamplingParams
from dsengine.demo.problems import other_problems, three_digit_problems, tool_problems
from dsengine.engine.messages import SpeculationStats
from dsengine.engine.step_costs import RooflineCosts
from dsengine.plan.hardware import GPUS
from dsengine.plan.layout import Layout
from dsengine.plan.source import find_model
from dsengine.specdec.controller import Load, expected_tokens, ladder, step_cost
from dsengine.specdec.shape import TreeShape

ADAPTIVE = "adaptive"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    trees = ["1/1/2", "2/1/3", "3/1/4", "5/1/6", "3/4/8", ADAPTIVE]
    add("--model", help="folder of a checkpoint [the demo checkpoint]")
    add(
        "--tree",
        nargs="+",
        default=trees,
        metavar="S/K/N",
        help=f"steps/topk/nodes, or adaptive; :rejection behind it changes the rule [{' '.join(trees)}]",
    )
    add("--batch-size", type=int, nargs="+", default=[1, 8], metavar="B", help="requests at once [1 8]")
    add("--temperature", type=float, nargs="+", default=[0.0], metavar="T", help="[0]")
    add("--prompts", type=int, default=8, metavar="N", help="prompts of each cell [8]")
    add("--max-tokens", type=int, default=128, metavar="N", help="longest answer [128]")
    add("--rounds", type=int, default=3, metavar="N", help="rounds, after one to warm up [3]")
    add("--device", default="auto", help="[auto]")
    add("--num-threads", type=int, default=os.cpu_count(), metavar="N", help="CPU threads [all cores]")
    add("--plot", type=Path, metavar="FILE", help="write a heat map of the speedup")
    add("--roofline", metavar="MODEL", help="compute for this model's shapes instead, as `dsengine plan` names it")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Run:
    """One engine's answers to all prompts of a cell, so many at once.

    Attributes:
        seconds: from the first step to the last.
        decode_seconds: of these, what came after the first tokens of each batch were there.
        processor_seconds: of all threads, from the first step to the last.
        before, after: the engine's counts; None without speculation.
    """

    answers: list[list[int]]
    seconds: float
    decode_seconds: float
    processor_seconds: float
    steps: int
    before: SpeculationStats | None
    after: SpeculationStats | None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.answers))


def make_engine(tree: str | None, args: argparse.Namespace) -> LLM:
    """An engine for one tree; None decodes plainly, "adaptive" chooses up to 3/4/8."""
    options: dict[str, Any] = {}
    if tree is not None:
        tree, _, rule = tree.partition(":")
        steps, topk, nodes = (3, 4, 8) if tree == ADAPTIVE else map(int, tree.split("/"))
        options = {
            "speculative_algorithm": "NEXTN",
            "speculative_num_steps": steps,
            "speculative_eagle_topk": topk,
            "speculative_num_draft_tokens": nodes,
            "speculative_adaptive": tree == ADAPTIVE,
            "speculative_acceptance": rule or "coupled",
        }
    size = {"max_total_tokens": 32768, "disable_radix_cache": True, "num_threads": args.num_threads}
    return LLM(args.model, progress=False, device=args.device, **size, **options)


def evaluation_prompts(llm: LLM, count: int) -> list[list[int]]:
    """Held-out problems of all kinds in turn, as token ids."""
    kinds = (three_digit_problems(count), other_problems(1, thinking=True), tool_problems(count))
    mixed = [problem for group in zip(*(kind * count for kind in kinds), strict=False) for problem in group]
    return [llm.tokenizer.encode(problem.prompt, add_special_tokens=False) for problem in mixed[:count]]


def run(llm: LLM, prompts: list[list[int]], batch_size: int, params: Sequence[SamplingParams]) -> Run:
    """Answer the prompts, `batch_size` at once."""
    before, answers, decoding = llm.core.stats(), [], 0.0
    began, processor_began = time.perf_counter(), time.process_time()
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        outputs = llm.generate(prompt_token_ids=prompts[part], sampling_params=list(params[part]))
        answers += [output.outputs[0].token_ids for output in outputs]
        times = [(output.metrics.first_token_seconds or 0.0, output.metrics.total_seconds or 0.0) for output in outputs]
        decoding += max(total for _, total in times) - max(first for first, _ in times)
    if llm.core.info.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds, processor_seconds = time.perf_counter() - began, time.process_time() - processor_began
    after = llm.core.stats()
    steps = after.num_steps - before.num_steps
    return Run(answers, seconds, decoding, processor_seconds, steps, before.speculation, after.speculation)


def summarise(tree: str, runs: list[Run], plain: list[Run], comparable: bool) -> dict[str, Any]:
    """One cell: medians over the rounds; the counts are those of the last round, and alike in all but adaptive ones."""

    def speedup(measure: Callable[[Run], float]) -> float:
        return round(statistics.median(measure(p) / measure(r) for r, p in zip(runs, plain, strict=True)), 3)

    last = runs[-1]
    before, after = last.before, last.after
    assert before is not None and after is not None
    lengths = [b - a for a, b in zip(before.lengths, after.lengths, strict=True)]
    tried = [b - a for a, b in zip(before.tried, after.tried, strict=True)]
    trees = sum(lengths)
    accepted = sum(length * count for length, count in enumerate(lengths))
    phases = {name: after.seconds[name] - before.seconds.get(name, 0.0) for name in after.seconds}
    share = {name: round(seconds / last.seconds, 3) for name, seconds in phases.items()}
    return {
        "tree": tree,
        "tokens_per_tree": round((trees + accepted) / trees, 3) if trees else None,
        "acceptance": [round(sum(lengths[d + 1 :]) / n, 3) if n else None for d, n in enumerate(tried)],
        "share_of_time": share | {"other": round(1 - sum(share.values()), 3)},
        "ms_per_step": round(1e3 * last.seconds / last.steps, 3),
        "tokens_per_second": round(statistics.median(r.num_tokens / r.seconds for r in runs), 1),
        "plain_tokens_per_second": round(statistics.median(r.num_tokens / r.seconds for r in plain), 1),
        "speedup": speedup(lambda run: run.seconds / run.num_tokens),
        "decode_speedup": speedup(lambda run: run.decode_seconds / run.num_tokens),
        "processor_speedup": speedup(lambda run: run.processor_seconds / run.num_tokens),
        "same_answers": all(r.answers == p.answers for r, p in zip(runs, plain, strict=True)) if comparable else None,
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cells of the grid."""
    engines = {tree: make_engine(tree, args) for tree in (None, *args.tree)}
    plain_engine = engines[None]
    prompts = evaluation_prompts(plain_engine, args.prompts)
    results = []
    for temperature in args.temperature:
        params = [
            SamplingParams(temperature=temperature, max_tokens=args.max_tokens, seed=i) for i in range(len(prompts))
        ]
        for batch_size in args.batch_size:
            runs: dict[str | None, list[Run]] = {tree: [] for tree in engines}
            for _ in range(args.rounds + 1):
                for tree, llm in engines.items():
                    runs[tree].append(run(llm, prompts, batch_size, params))
            for tree in args.tree:
                comparable = temperature == 0 or not tree.endswith(":rejection")
                cell = summarise(tree, runs[tree][1:], runs[None][1:], comparable)
                results.append({"batch_size": batch_size, "temperature": temperature, **cell})
    return results


def print_results(results: list[dict[str, Any]]) -> None:
    columns = ("tree", "batch", "temperature", "tokens per tree", "accepted at depth 1, 2, …", "draft + catch up")
    table = Table(
        *columns, "accept", "ms per step", "tokens/s", "plain", "speedup", "decode alone", "processor", "same answers"
    )
    for cell in results:
        share = cell["share_of_time"]
        table.add_row(
            cell["tree"],
            str(cell["batch_size"]),
            str(cell["temperature"]),
            str(cell["tokens_per_tree"]),
            " ".join("-" if rate is None else f"{rate:.0%}" for rate in cell["acceptance"]),
            f"{share.get('draft', 0) + share.get('catch up', 0):.0%}",
            f"{share.get('accept', 0):.1%}",
            str(cell["ms_per_step"]),
            str(cell["tokens_per_second"]),
            str(cell["plain_tokens_per_second"]),
            f"{cell['speedup']:.2f}",
            f"{cell['decode_speedup']:.2f}",
            f"{cell['processor_speedup']:.2f}",
            {True: "yes", False: "NO", None: "-"}[cell["same_answers"]],
        )
    Console(width=160).print(table)


def roofline(name: str) -> list[dict[str, Any]]:
    """The best tree up to 5/4/16 and its speedup on eight H200s, by acceptance of each depth, batch and context."""
    config = find_model(name).config
    layout = Layout(attn_tp=8, experts="ep") if config.n_routed_experts >= 128 else Layout()
    costs = RooflineCosts(config, GPUS["h200"], 2 * config.latent_dim, layout)
    results = []
    for context in (1024, 32768):
        for requests in (1, 8, 32, 128, 512):
            load = Load(requests, context)
            plain = 1 / step_cost(None, load, costs)
            for rate in (0.5, 0.7, 0.8, 0.9):
                # The others of four candidates are taken to hold half of what the likeliest misses.
                rates = {1: [rate] * 5, 4: [(1 + rate) / 2] * 5}
                speeds = {
                    shape: expected_tokens(rates[shape.topk][: shape.max_depth]) / step_cost(shape, load, costs) / plain
                    for shape in ladder(TreeShape(5, 4, 16))
                }
                best = max(speeds, key=lambda shape: speeds[shape])
                chain = speeds[TreeShape(3, 1, 4)]
                cell = {"context": context, "batch_size": requests, "acceptance": rate, "tree": str(best)}
                results.append({**cell, "speedup": round(speeds[best], 3), "speedup_3_1_4": round(chain, 3)})
    return results


def print_roofline(results: list[dict[str, Any]]) -> None:
    rates = sorted({cell["acceptance"] for cell in results})
    title = "Speedup of the best tree by the roofline (computed, not measured)"
    table = Table("context", "batch", *(f"{rate:.0%} accepted" for rate in rates), title=title)
    for key in sorted({(cell["context"], cell["batch_size"]) for cell in results}):
        cells = [cell for cell in results if (cell["context"], cell["batch_size"]) == key]
        table.add_row(*map(str, key), *(f"{cell['speedup']:.2f} ({cell['tree']})" for cell in cells))
    Console(width=120).print(table)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A heat map of the speedup: trees across, batches and temperatures down."""
    from matplotlib.figure import Figure

    trees = list(dict.fromkeys(cell["tree"] for cell in results))
    rows = list(dict.fromkeys((cell["batch_size"], cell["temperature"]) for cell in results))
    grid = [[math.nan] * len(trees) for _ in rows]
    for cell in results:
        grid[rows.index((cell["batch_size"], cell["temperature"]))][trees.index(cell["tree"])] = cell["speedup"]
    figure = Figure(figsize=(2 + 1.2 * len(trees), 1.5 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="RdYlGn", vmin=0.5, vmax=1.5, aspect="auto")
    axes.set_xticks(range(len(trees)), trees)
    axes.set_yticks(range(len(rows)), [f"batch {batch}, temperature {t:g}" for batch, t in rows])
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center")
    axes.set_title("Speedup over plain decoding (steps/topk/nodes)")
    figure.colorbar(image)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    summary: dict[str, Any] = {"benchmark": "specdec"}
    if args.roofline:
        results = roofline(args.roofline)
        print_roofline(results)
        summary |= {"kind": "computed from the roofline, 8 x H200", "model": args.roofline}
    else:
        results = measure(args)
        print_results(results)
        machine = f"{platform.machine()}, {args.num_threads} threads, torch {torch.__version__}"
        if torch.cuda.is_available():
            machine += f", {torch.cuda.get_device_name()}"
        summary |= {"kind": "measured", "model": args.model or "demo", "machine": machine}
    if args.plot and not args.roofline:
        plot(results, args.plot)
    print(json.dumps({**summary, "results": results}))
    return 0 if args.roofline or all(cell["same_answers"] is not False for cell in results) else 1


if __name__ == "__main__":
    sys.exit(main())
