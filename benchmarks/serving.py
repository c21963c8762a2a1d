"""How does a server behave under load? An OpenAI-API load generator.

Requests arrive as a Poisson process (--request-rate) or keep a fixed number in flight (--max-concurrency); prompts are
random or share prefixes. Reported are time to first token (TTFT), time per output token (TPOT), inter-token latency
(ITL), end-to-end latency, throughput, prefix-cache hits and goodput under a target. Without --base-url it starts
`dsengine serve` itself; flags after `--` go to that server.

    python benchmarks/serving.py --max-concurrency 16 --num-prompts 64 -- --chunked-prefill-size 512
    python benchmarks/serving.py --base-url http://localhost:30000 --request-rate 4 --slo-ttft-ms 500 --plot run.png

The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serving_client import Call, Record, Target, send
from benchmarks.serving_prompts import PromptMaker, calibrate, find_vocab_size, make_calls
from benchmarks.serving_report import plot, print_tables, summarize

_DEFAULT_CONCURRENCY = 8


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base-url", help="the server, as in http://localhost:30000; none: start `dsengine serve` on a free port")
    add("--model", help="name of the model (default: the server's first), or the checkpoint to start a server with")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="bearer token [the variable OPENAI_API_KEY]")
    add("--endpoint", choices=("completions", "chat"), default="completions", help="route to load [completions]")
    add("--num-prompts", type=int, default=64, metavar="N", help="requests in all [64]")
    add("--num-warmups", type=int, default=4, metavar="N", help="requests before the clock starts [4]")
    add("--request-rate", type=float, metavar="X", help="requests per second, as a Poisson process")
    add("--max-concurrency", type=int, metavar="N", help=f"requests in flight [{_DEFAULT_CONCURRENCY} without a rate]")
    add("--input-len", type=int, default=128, metavar="N", help="tokens of each prompt [128]")
    add("--output-len", type=int, default=32, metavar="N", help="tokens of each output [32]")
    add("--shared-prefix-len", type=int, default=0, metavar="N", help="leading tokens that prompts have in common [0]")
    add("--num-groups", type=int, default=1, metavar="N", help="number of different shared prefixes [1]")
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="send token ids below 9/10 of this [from a dsengine server; else text]",
    )
    add("--temperature", type=float, default=0.0, metavar="X", help="[0]")
    add("--stop-at-eos", action="store_true", help="let outputs end early; otherwise the extension ignore_eos is sent")
    add("--slo-ttft-ms", type=float, metavar="X", help="goodput: longest time to the first token")
    add("--slo-itl-ms", type=float, metavar="X", help="goodput: longest mean time between tokens of a request")
    add("--seed", type=int, default=0, help="of the prompts and the arrivals [0]")
    add("--plot", type=Path, metavar="FILE", help="draw the distributions into this file (needs matplotlib)")
    args = parser.parse_args(words[:split])
    args.server_flags = words[split + 1 :]
    if args.base_url and args.server_flags:
        parser.error("flags after -- are for a server that this program starts; drop --base-url")
    for name in ("num_prompts", "input_len", "output_len", "num_groups"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.request_rate is not None and not args.request_rate > 0:
        parser.error(f"--request-rate is {args.request_rate}; it must be positive")
    if args.max_concurrency is None and args.request_rate is None:
        args.max_concurrency = _DEFAULT_CONCURRENCY
    return args


@contextlib.contextmanager
def own_server(args: argparse.Namespace) -> Iterator[str]:
    """Run `dsengine serve` on a free port for the length of the block; yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dsengine", "serve", *([args.model] if args.model else [])]
    command += ["--port", str(port), "--log-level", "warning", *args.server_flags]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH")))),
    }
    process = subprocess.Popen(command, stdout=sys.stderr, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(url, process)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], timeout: float = 1800.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"dsengine serve ended with status {process.returncode} before it was ready")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url + "/health", timeout=5.0).status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"the server at {url} was not ready within {timeout:.0f} s")


async def run_load(target: Target, calls: Sequence[Call], max_concurrency: int | None) -> list[Record]:
    """Send all calls when they are due and collect their records, in order."""
    slots = asyncio.Semaphore(max_concurrency or len(calls))
    async with target.http() as http:
        epoch = time.perf_counter()

        async def one(call: Call) -> Record:
            await asyncio.sleep(max(0.0, call.arrival - (time.perf_counter() - epoch)))
            async with slots:
                return await send(http, target, call, epoch)

        return list(await asyncio.gather(*(one(call) for call in calls)))


def measure(args: argparse.Namespace, base_url: str) -> tuple[list[Record], dict[str, Any]]:
    """Warm up, run the load, and return the records with the settings they were taken under."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    models = httpx.get(base_url + "/v1/models", headers=headers, timeout=30.0).raise_for_status().json()
    model = args.model if args.base_url and args.model else models["data"][0]["id"]
    options = {"temperature": args.temperature}
    target = Target(
        base_url, model, args.endpoint, args.output_len, not args.stop_at_eos, options, api_key=args.api_key
    )
    vocab_size = tokens_per_word = None
    if args.endpoint == "completions":
        vocab_size = args.vocab_size or find_vocab_size(base_url, args.api_key)
    if vocab_size is None:
        tokens_per_word = calibrate(target, args.seed)
    shape = (args.input_len, args.shared_prefix_len, args.num_groups, vocab_size, tokens_per_word or 1.0)
    if args.num_warmups:
        warmups = make_calls(PromptMaker(*shape, seed=args.seed + 1), args.num_warmups, None, args.seed)
        asyncio.run(run_load(target, warmups, args.max_concurrency))
    calls = make_calls(PromptMaker(*shape, seed=args.seed), args.num_prompts, args.request_rate, args.seed)
    records = asyncio.run(run_load(target, calls, args.max_concurrency))
    settings = {
        "benchmark": "serving",
        "model": model,
        "endpoint": args.endpoint,
        "prompts": "text" if vocab_size is None else "token ids",
        "num_prompts": args.num_prompts,
        "request_rate": args.request_rate,
        "max_concurrency": args.max_concurrency,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "shared_prefix_len": args.shared_prefix_len,
        "num_groups": args.num_groups,
        "seed": args.seed,
        "server_flags": args.server_flags,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }
    return records, settings


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    base_url = (args.base_url or "").rstrip("/").removesuffix("/v1")
    with contextlib.nullcontext(base_url) if base_url else own_server(args) as url:
        records, settings = measure(args, url)
    figures = summarize(records, args.slo_ttft_ms, args.slo_itl_ms)
    pace = f"{args.request_rate}/s" if args.request_rate else f"{args.max_concurrency} at a time"
    title = f"{args.num_prompts} requests, {pace}, {args.input_len} + {args.output_len} tokens"
    print_tables(title, figures)
    if args.plot:
        plot(records, title, args.plot)
        print(f"plot: {args.plot}")
    print(json.dumps({**settings, **figures}))
    return 0 if figures["completed"] == args.num_prompts else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (httpx.HTTPError, ValueError) as error:
        sys.exit(f"serving.py: {error or type(error).__name__}")
