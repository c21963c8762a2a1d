"""Does a real server keep a latency target while long prompts arrive beside streams, and what does that cost?

Some clients stream answers to short prompts, one after the other, all the time; beside them long prompts arrive as a
Poisson process. Each setting of `--target` gets a server of its own in each round, the settings of a round take turns,
and what is printed are medians over the rounds, with ratios to the first setting.

    python -m benchmarks.latency_targets                              without targets, and with some
    python -m benchmarks.latency_targets --target none 40 40:1500 --rounds 5 -- --num-threads 1
    python -m benchmarks.latency_targets --target none 60 -- --speculative-algorithm NEXTN --no-speculative-adaptive

ITL is the time between two chunks of a stream, TTFT that from a long prompt's arrival to its first token; "beside
prompts" are the ITLs during which such a prompt waited. Flags after `--` go to every server. On a machine that other
programs use too, `--processor-time` measures the engine alone, in this process and on the clock of its own processor
time, which its controller goes by as well. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serving import own_server
from benchmarks.serving_client import Call, Record, Target, send
from benchmarks.serving_prompts import PromptMaker, arrivals, find_vocab_size
from benchmarks.serving_report import percentile
from dsengine import LLM, SamplingParams
from dsengine.cli_flags import Parser, add_config_flags, given_fields
from dsengine.config import EngineConfig
from dsengine.engine.core import EngineCore
from dsengine.engine.messages import AddRequest, RequestUpdate

_NONE = "none"
_FIRST_LEN = 8  # tokens of the answer to a long prompt


@dataclass(frozen=True)
class Setting:
    """Targets in milliseconds, as in "40", "40:1500" or "none"."""

    name: str

    @property
    def is_valid(self) -> bool:
        return self.name == _NONE or re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", self.name) is not None

    @property
    def itl(self) -> float | None:
        return None if self.name == _NONE else float(self.name.partition(":")[0])

    @property
    def flags(self) -> list[str]:
        itl, _, ttft = self.name.partition(":")
        flags = [] if self.name == _NONE else ["--target-itl-ms", itl]
        return flags + (["--target-ttft-ms", ttft] if ttft else [])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    targets = [_NONE, "40", "80", "40:1500"]
    add("--model", help="checkpoint to serve [the demo checkpoint]")
    add(
        "--target",
        nargs="+",
        default=targets,
        metavar="ITL[:TTFT]",
        help=f"targets in milliseconds, or none [{' '.join(targets)}]",
    )
    add("--streams", type=int, default=6, metavar="N", help="clients that stream [6]")
    add("--stream-len", type=int, default=150, metavar="N", help="tokens of each of their answers [150]")
    add("--prompt-len", type=int, default=1500, metavar="N", help="tokens of a long prompt [1500]")
    add("--prompt-rate", type=float, default=0.25, metavar="X", help="long prompts per second [0.25]")
    add("--seconds", type=float, default=30.0, metavar="X", help="length of a run [30]")
    add("--warm-up", type=float, default=6.0, metavar="X", help="seconds of the same load before it [6]")
    add("--rounds", type=int, default=3, metavar="N", help="servers started for each setting [3]")
    add("--processor-time", action="store_true", help="no server: the engine on the clock of its processor time (CPU)")
    add("--seed", type=int, default=0, help="of the prompts and the arrivals [0]")
    args = parser.parse_args(words[:split])
    args.server_flags = words[split + 1 :]
    args.settings = [Setting(name) for name in args.target]
    for setting in args.settings:
        if not setting.is_valid:
            parser.error(
                f"--target is {setting.name}; it must be none, milliseconds, or two of them with a colon between"
            )
    return args


@dataclass(frozen=True)
class Run:
    """What one server did under the load.

    Attributes:
        seconds: from the first request to the end of the last.
        steps: of the engine.
    """

    streams: list[Record]
    prompts: list[Record]
    seconds: float
    steps: int

    @property
    def gaps(self) -> list[float]:
        return [gap for record in self.streams for gap in record.gaps]

    @property
    def disturbed_gaps(self) -> list[float]:
        """Those during which a long prompt waited for its first token."""
        waits = [(record.start, record.start + record.ttft) for record in self.prompts]
        pairs = [pair for record in self.streams for pair in itertools.pairwise(record.chunk_times)]
        return [later - sooner for sooner, later in pairs if any(sooner < b and later > a for a, b in waits)]


class Load:
    """The requests of one run, alike for alike seeds.

    Attributes:
        streams: what makes the prompts of each client that streams.
        prompts: the long ones.
    """

    def __init__(self, args: argparse.Namespace, vocab_size: int | None, seconds: float, seed: int) -> None:
        self.seconds = seconds
        self.streams = [PromptMaker(24, 0, 1, vocab_size, 1.0, seed=seed + 1 + i) for i in range(args.streams)]
        count = max(1, round(args.prompt_rate * seconds))
        maker = PromptMaker(args.prompt_len, 0, 1, vocab_size, 1.0, seed=seed)
        due = arrivals(count, args.prompt_rate, seed)
        # Drawn arrivals are stretched, so that every seed asks for the same work in the same time.
        self.prompts = [Call(maker.make(), at * (seconds - 1) / due[-1]) for at in due]


class ServerUnderLoad:
    """Clients of a server."""

    def __init__(self, args: argparse.Namespace, url: str) -> None:
        model = httpx.get(url + "/v1/models", timeout=30.0).raise_for_status().json()["data"][0]["id"]
        self.vocab_size = find_vocab_size(url, None)
        self._url = url
        self._target = Target(url, model, "completions", args.stream_len, True, {"temperature": 0.0})

    def run(self, load: Load) -> Run:
        steps, began = engine_steps(self._url), time.perf_counter()
        streams, prompts = asyncio.run(self._send_all(load))
        seconds = time.perf_counter() - began
        return Run(streams, prompts, seconds, engine_steps(self._url) - steps)

    async def _send_all(self, load: Load) -> tuple[list[Record], list[Record]]:
        async with self._target.http() as http:
            epoch = time.perf_counter()
            streams = [self._stream(http, maker, load.seconds, epoch) for maker in load.streams]
            prompts = [self._prompt(http, call, epoch) for call in load.prompts]
            *answers, last = await asyncio.gather(*streams, asyncio.gather(*prompts))
        return [record for records in answers for record in records], list(last)

    async def _stream(self, http: httpx.AsyncClient, maker: PromptMaker, seconds: float, epoch: float) -> list[Record]:
        records = []
        while time.perf_counter() - epoch < seconds:
            records.append(await send(http, self._target, Call(maker.make()), epoch))
        return records

    async def _prompt(self, http: httpx.AsyncClient, call: Call, epoch: float) -> Record:
        await asyncio.sleep(max(0.0, call.arrival - (time.perf_counter() - epoch)))
        return await send(http, replace(self._target, output_len=_FIRST_LEN), call, epoch)


class EngineUnderLoad:
    """The engine alone, on a clock that stands still while other programs have the processor."""

    def __init__(self, args: argparse.Namespace, llm: LLM) -> None:
        core = llm.core
        assert isinstance(core, EngineCore)
        self.vocab_size = core.info.vocab_size
        self._core = core
        self._stream_len = args.stream_len
        self._open: dict[str, tuple[Record, PromptMaker | None]] = {}
        self._num_sent = 0

    def run(self, load: Load) -> Run:
        streams: list[Record] = []
        prompts: list[Record] = []
        due = list(load.prompts)
        idle, steps, epoch = list(load.streams), self._core.num_steps, time.thread_time()
        while due or idle or self._open:
            now = time.thread_time() - epoch
            while idle and now < load.seconds:
                maker = idle.pop()
                streams.append(self._send(Call(maker.make(), now), self._stream_len, maker))
            idle = idle if now < load.seconds else []
            while due and (due[0].arrival <= now or not self._open):
                prompts.append(self._send(due.pop(0), _FIRST_LEN, None))
            updates = self._core.step(now).updates
            done = [self._note(update, time.thread_time() - epoch) for update in updates]
            idle += [maker for maker in done if maker is not None]
        return Run(streams, prompts, time.thread_time() - epoch, self._core.num_steps - steps)

    def _send(self, call: Call, output_len: int, maker: PromptMaker | None) -> Record:
        assert isinstance(call.prompt, list)
        self._num_sent += 1
        name, params = str(self._num_sent), SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        self._core.add_request(AddRequest(name, call.prompt, params), call.arrival)
        record = Record(call.arrival, prompt_tokens=len(call.prompt))
        self._open[name] = record, maker
        return record

    def _note(self, update: RequestUpdate, now: float) -> PromptMaker | None:
        """Enters an update; whoever waited for the end of this answer comes back."""
        record, maker = self._open[update.request_id]
        record.error = update.error
        if update.new_token_ids:
            record.chunk_times.append(now)
            record.output_tokens += len(update.new_token_ids)
        if update.finish_reason is None:
            return None
        record.end = now
        del self._open[update.request_id]
        return maker


def run_once(args: argparse.Namespace, setting: Setting, number: int) -> Run:
    """Start a server or an engine, warm it up, load it."""
    flags = [*args.server_flags, *setting.flags]
    under_load: ServerUnderLoad | EngineUnderLoad
    with contextlib.ExitStack() as stack:
        if args.processor_time:
            parser = Parser(prog="latency_targets.py ... --")
            add_config_flags(parser, EngineConfig, "engine", skip={"model"})
            options = given_fields(parser.parse_args(flags), EngineConfig) | {"device": "cpu", "num_threads": 1}
            llm = stack.enter_context(LLM(args.model, progress=False, **options))
            under_load = EngineUnderLoad(args, llm)
        else:
            url = stack.enter_context(own_server(argparse.Namespace(model=args.model, server_flags=flags)))
            under_load = ServerUnderLoad(args, url)
        under_load.run(Load(args, under_load.vocab_size, args.warm_up, args.seed + 7919))
        seed = args.seed + 104_729 * (number + 1)
        run = under_load.run(Load(args, under_load.vocab_size, args.seconds, seed))
    failed = [record.error for record in (*run.streams, *run.prompts) if record.error is not None]
    if failed:
        raise SystemExit(f"latency_targets.py: {len(failed)} requests failed, the first with {failed[0]}")
    return run


def engine_steps(url: str) -> int:
    lines = httpx.get(url + "/metrics", timeout=30.0).raise_for_status().text.splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("dsengine_engine_steps_total "))))


def figures(run: Run, setting: Setting) -> dict[str, float]:
    """Of one run, times in milliseconds."""
    gaps, firsts = run.gaps, [record.ttft for record in run.prompts]
    late = [gap for gap in gaps if setting.itl is not None and gap * 1000 > setting.itl]
    chunks = sum(len(record.chunk_times) for record in run.streams)
    shares = {f"itl_p{p}": 1000 * percentile(gaps, p) for p in (50, 90, 99)}
    shares |= {f"disturbed_itl_p{p}": 1000 * percentile(run.disturbed_gaps, p) for p in (50, 99)}
    shares |= {f"ttft_p{p}": 1000 * percentile(firsts, p) for p in (50, 99)}
    return shares | {
        "itl_max": 1000 * max(gaps),
        "late": len(late) / len(gaps),
        "stream_tokens_per_s": sum(record.output_tokens for record in run.streams) / run.seconds,
        "prompt_tokens_per_s": sum(record.prompt_tokens for record in run.prompts) / run.seconds,
        "tokens_per_chunk": sum(record.output_tokens for record in run.streams) / chunks,
        "ms_per_step": 1000 * run.seconds / run.steps,
    }


def summarize(args: argparse.Namespace, rounds: list[dict[str, Run]]) -> list[dict[str, Any]]:
    """For each setting its medians over the rounds, and the medians of the ratios to the first setting."""
    results = []
    for setting in args.settings:
        own = [figures(runs[setting.name], setting) for runs in rounds]
        first = [figures(runs[args.settings[0].name], setting) for runs in rounds]
        medians = {name: round(statistics.median(row[name] for row in own), 4) for name in own[0]}
        compared = ("itl_p50", "itl_p99", "ttft_p50", "stream_tokens_per_s")
        ratios = {
            name: round(statistics.median(a[name] / b[name] for a, b in zip(own, first, strict=True)), 3)
            for name in compared
        }
        spread = [round(min(row["itl_p99"] for row in own), 1), round(max(row["itl_p99"] for row in own), 1)]
        late = None if setting.itl is None else medians["late"]
        results.append({"target": setting.name, **medians, "late": late, "itl_p99_range": spread, "ratios": ratios})
    return results


def print_results(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    title = (
        f"{args.streams} streams, {args.prompt_rate} prompts/s of {args.prompt_len} tokens; medians of {args.rounds} "
        f"rounds, ratios to {results[0]['target']}"
    )
    columns = (
        "target, ms",
        "ITL p50",
        "p99",
        "max",
        "beside prompts p50",
        "p99",
        "beyond it",
        "TTFT p50",
        "p99",
        "streams' tokens/s",
        "tokens a chunk",
    )
    table = Table(*columns, title=title)
    for row in results:
        ratios = row["ratios"]
        table.add_row(
            row["target"],
            f"{row['itl_p50']:.1f} ({ratios['itl_p50']:.2f})",
            f"{row['itl_p99']:.1f} ({ratios['itl_p99']:.2f})",
            f"{row['itl_max']:.1f}",
            f"{row['disturbed_itl_p50']:.1f}",
            f"{row['disturbed_itl_p99']:.1f}",
            "" if row["late"] is None else f"{row['late']:.1%}",
            f"{row['ttft_p50']:.0f} ({ratios['ttft_p50']:.2f})",
            f"{row['ttft_p99']:.0f}",
            f"{row['stream_tokens_per_s']:.1f} ({ratios['stream_tokens_per_s']:.2f})",
            f"{row['tokens_per_chunk']:.2f}",
        )
    Console(width=140).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    rounds = []
    for number in range(args.rounds):
        rounds.append({setting.name: run_once(args, setting, number) for setting in args.settings})
    results = summarize(args, rounds)
    print_results(args, results)
    names = (
        "streams",
        "stream_len",
        "prompt_len",
        "prompt_rate",
        "seconds",
        "rounds",
        "seed",
        "processor_time",
        "server_flags",
    )
    settings = {name: getattr(args, name) for name in names}
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    print(json.dumps({"benchmark": "latency_targets", **settings, "machine": machine, "results": results}))


if __name__ == "__main__":
    main()
