"""How fast does our engine prefill and decode, beside Hugging Face transformers on the same checkpoint?

Both run in this process, in float32, on the same threads, and take turns within every round, so that a machine that
slows down slows both; the ratio is the median of the rounds' own ratios. The greedy tokens of both are compared.

    python benchmarks/offline.py                               the demo checkpoint
    python benchmarks/offline.py --random-v3                   a larger one with random weights, made on the spot
    python benchmarks/offline.py --model FOLDER --input-len 512 --batch-size 1 8

The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.offline_peer import TransformersModel, write_dequantized
from dsengine import LLM
from dsengine.cli_bench import Speed, measure_engine, random_prompts


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder of a checkpoint [the demo checkpoint]")
    add("--random-v3", action="store_true", help="make a DeepSeek-V3 of 0.4 B random weights and measure that")
    add("--batch-size", type=int, nargs="+", default=[1, 8], metavar="B", help="[1 8]")
    add("--input-len", type=int, default=256, metavar="N", help="tokens of each prompt [256]")
    add("--output-len", type=int, default=32, metavar="N", help="tokens of each output [32]")
    add("--rounds", type=int, default=3, metavar="N", help="rounds of both [3]")
    add("--peer-attention", choices=("sdpa", "eager"), default="sdpa", help="attention of transformers [sdpa]")
    add("--num-threads", type=int, default=os.cpu_count(), metavar="N", help="threads of both [all cores]")
    args = parser.parse_args(argv)
    if args.model and args.random_v3:
        parser.error("--random-v3 makes its own checkpoint; drop --model")
    if min(*args.batch_size, args.input_len, args.rounds) < 1 or args.output_len < 2:
        parser.error("batch size, input length and rounds must be at least 1, the output length at least 2")
    return args


def compare(engine: LLM, peer: TransformersModel, batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure both in alternating order; the first round warms up and is dropped."""
    ours: list[Speed] = []
    theirs: list[Speed] = []
    agreeing = total = 0
    for round_number in range(args.rounds + 1):
        prompts = random_prompts(
            batch_size, args.input_len, engine.tokenizer.vocab_size, seed=round_number * 97 + batch_size
        )
        engine_first = round_number % 2 == 0
        if engine_first:
            our_speed, our_tokens = measure_engine(engine, prompts, args.output_len)
        their_speed, their_tokens = peer.measure(prompts, args.output_len)
        if not engine_first:
            our_speed, our_tokens = measure_engine(engine, prompts, args.output_len)
        agreeing += sum(a == b for a, b in zip(our_tokens, their_tokens, strict=True))
        total += batch_size
        if round_number:
            ours.append(our_speed)
            theirs.append(their_speed)
    return {
        "batch_size": batch_size,
        "prefill": _figures([s.prefill_rate for s in ours], [s.prefill_rate for s in theirs]),
        "decode": _figures([s.decode_rate for s in ours], [s.decode_rate for s in theirs]),
        "same_outputs": f"{agreeing}/{total}",
    }


def _figures(ours: list[float], theirs: list[float]) -> dict[str, float]:
    return {
        "tokens_per_s": round(statistics.median(ours), 2),
        "transformers_tokens_per_s": round(statistics.median(theirs), 2),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3),
    }


def print_table(results: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for heading in ("phase", "batch", "dsengine tok/s", "transformers tok/s", "ratio", "same outputs"):
        table.add_column(heading, justify="right")
    for phase in ("prefill", "decode"):
        for row in results:
            figures = row[phase]
            cells = (figures["tokens_per_s"], figures["transformers_tokens_per_s"], figures["ratio"])
            table.add_row(phase, str(row["batch_size"]), *map(str, cells), row["same_outputs"])
    Console(width=110).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.num_threads)
    with tempfile.TemporaryDirectory(prefix="dsengine-offline-") as scratch:
        if args.random_v3:
            from benchmarks.offline_checkpoint import write_random_v3

            args.model = str(write_random_v3(Path(scratch) / "random-v3"))
        # The prompts are fresh each time, so a prefix cache would only cost us.
        engine = LLM(args.model, dtype="float32", device="cpu", num_threads=args.num_threads)
        dequantized = Path(scratch) / "dequantized"
        dequantized.mkdir()
        write_dequantized(Path(engine.core.info.model), dequantized)
        peer = TransformersModel(dequantized, args.peer_attention)
        results = [compare(engine, peer, batch_size, args) for batch_size in args.batch_size]
    name = "random-v3" if args.random_v3 else args.model or "demo"
    print_table(results, f"{name}: prompts of {args.input_len} tokens, outputs of {args.output_len}")
    summary = {
        "benchmark": "offline",
        "model": name,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "rounds": args.rounds,
        "threads": args.num_threads,
        "kernels": engine.core.info.kernels,
        "peer": f"transformers {peer.version}, {args.peer_attention}, float32",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}",
        "results": results,
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
