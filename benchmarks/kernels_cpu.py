"""How near the CPU backends come to what this machine can do, and how far ahead of torch and the reference they are.

Of every operation the backend that is chosen on this machine is measured, the one of torch's own functions ("cpu" or
"torch") and the reference, which compute the same on the same data.

The roofline is measured in the same run: GFLOP/s of a plain float32 product and GB/s of a plain copy. An operation's
bound is the larger of its arithmetic at that rate and its bytes at that bandwidth. Both rates are measured again before
each operation and the best so far counts, since other programs may slow any one of them. With --busy all times are
processor time of a single thread, which other programs disturb less than the clock on the wall. Ends with one line of
JSON.

    python benchmarks/kernels_cpu.py [--threads N] [--seconds S] [--dtype float32|bfloat16] [--busy]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from dsengine.kernels.backend import Operation
from dsengine.kernels.linear.api import LINEAR, linear
from dsengine.kernels.mla_absorb.api import ABSORB_QUERIES, RELEASE_VALUES, absorb_queries, release_values
from dsengine.kernels.mla_decode.api import MLA_DECODE, mla_decode
from dsengine.kernels.mla_prefill.api import MLA_PREFILL, mla_prefill
from dsengine.kernels.moe_experts.api import MOE_EXPERTS, moe_experts

Clock = Callable[[], float]
RANK, ROPE, NOPE, VALUE, BLOCK_SIZE = 512, 64, 128, 128, 16


@dataclass(frozen=True)
class Case:
    """One call of an operation's public function, lacking only the backend, and the work it cannot do without."""

    name: str
    operation: Operation
    call: Callable[..., object]
    flops: float
    bytes: float


@dataclass(frozen=True)
class Result:
    name: str
    backend: str
    ms: float
    torch_ms: float
    ref_ms: float
    bound_ms: float
    speedup_over_torch: float
    speedup_over_ref: float
    fraction_of_roofline: float


def best_seconds(call: Callable[[], object], seconds: float, clock: Clock) -> float:
    """Shortest of the calls that fit into `seconds` (two at least, the first of which only warms up)."""
    call()
    best, end = float("inf"), clock() + seconds
    while True:
        start = clock()
        call()
        now = clock()
        best = min(best, now - start)
        if now > end:
            return best


def machine(seconds: float, clock: Clock) -> tuple[float, float]:
    """(GFLOP/s of a float32 product, GB/s of a copy, reads and writes counted)."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    product = torch.empty(1024, 1024)
    gflops = 2 * 1024**3 / best_seconds(lambda: torch.mm(left, right, out=product), seconds, clock) / 1e9
    source = torch.randn(32 << 20)
    target = torch.empty_like(source)
    return gflops, 2 * source.nbytes / best_seconds(lambda: target.copy_(source), seconds, clock) / 1e9


def decode_cases(dtype: torch.dtype) -> Iterator[Case]:
    for requests, context, heads in (
        *((1, 512, 4), (1, 512, 16), (1, 16384, 16), (8, 1024, 16)),
        *((64, 128, 16), (64, 512, 16)),
    ):
        blocks = requests * context // BLOCK_SIZE
        cache = torch.randn(blocks, BLOCK_SIZE, RANK + ROPE, dtype=dtype)
        args = (
            torch.randn(requests, heads, RANK, dtype=dtype),
            torch.randn(requests, heads, ROPE, dtype=dtype),
            cache,
            torch.randperm(blocks).int().view(requests, -1),
            torch.full((requests,), context, dtype=torch.int32),
            torch.arange(requests + 1, dtype=torch.int32),
            0.135,
        )
        yield Case(
            f"mla_decode requests={requests} context={context} heads={heads}",
            MLA_DECODE,
            partial(mla_decode, *args),
            2.0 * requests * context * heads * (2 * RANK + ROPE),
            cache.nbytes,
        )


def prefill_cases(dtype: torch.dtype) -> Iterator[Case]:
    for lengths, heads in (((512,), 16), ((2048,), 16), ((128,) * 8, 16)):
        total = sum(lengths)
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        q, k = (torch.randn(total, heads, NOPE + ROPE, dtype=dtype) for _ in "qk")
        v = torch.randn(total, heads, VALUE, dtype=dtype)
        args = (q, k, v, cu, cu, 0.135)
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        yield Case(
            f"mla_prefill lengths={lengths[0]}x{len(lengths)} heads={heads}",
            MLA_PREFILL,
            partial(mla_prefill, *args, causal=True),
            2.0 * pairs * heads * (NOPE + ROPE + VALUE),
            q.nbytes + k.nbytes + 2 * v.nbytes,
        )


def expert_cases(dtype: torch.dtype) -> Iterator[Case]:
    for experts, top_k, hidden, inter, counts in (
        (16, 4, 256, 128, (1, 4, 16, 64, 512)),
        (64, 6, 2048, 352, (1, 16, 64, 2000)),
    ):
        w_gate_up = torch.randn(experts, 2 * inter, hidden, dtype=dtype) * hidden**-0.5
        w_down = torch.randn(experts, hidden, inter, dtype=dtype) * inter**-0.5
        for tokens in counts:
            ids = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k].contiguous()
            x = torch.randn(tokens, hidden, dtype=dtype)
            args = (x, w_gate_up, w_down, torch.rand(tokens, top_k), ids)
            touched = ids.unique().numel() * (w_gate_up[0].nbytes + w_down[0].nbytes)
            yield Case(
                f"moe_experts tokens={tokens} experts={experts} top_k={top_k} hidden={hidden} inter={inter}",
                MOE_EXPERTS,
                partial(moe_experts, *args),
                6.0 * tokens * top_k * hidden * inter,
                touched + 2 * x.nbytes,
            )


def linear_cases(dtype: torch.dtype) -> Iterator[Case]:
    for width, outputs in ((256, 768), (2048, 2048)):
        weight = torch.randn(outputs, width, dtype=dtype)
        for tokens in (1, 2, 4, 8, 16, 32):
            x = torch.randn(tokens, width, dtype=dtype)
            yield Case(
                f"linear tokens={tokens} in={width} out={outputs}",
                LINEAR,
                partial(linear, x, weight),
                2.0 * tokens * weight.numel(),
                weight.nbytes,
            )


def absorb_cases(dtype: torch.dtype) -> Iterator[Case]:
    heads = 16
    weight = torch.randn(heads, NOPE, RANK, dtype=dtype)
    for tokens in (1, 4, 16, 32):
        query, attended = (torch.randn(tokens, heads, width, dtype=dtype) for width in (NOPE, RANK))
        work = 2.0 * tokens * weight.numel(), weight.nbytes
        name = f"tokens={tokens} heads={heads}"
        yield Case(f"absorb_queries {name}", ABSORB_QUERIES, partial(absorb_queries, query, weight), *work)
        yield Case(f"release_values {name}", RELEASE_VALUES, partial(release_values, attended, weight), *work)


def measure(case: Case, gflops: float, bandwidth: float, seconds: float, clock: Clock) -> Result:
    names = [backend.name for backend in case.operation.backends if backend.is_available(torch.device("cpu"))[0]]
    of_torch = next(name for name in names if name in ("cpu", "torch"))
    loaded = {name: case.operation.backend(name).load() for name in (names[0], of_torch, "ref")}
    times = {
        name: best_seconds(partial(case.call, backend=backend), seconds, clock) for name, backend in loaded.items()
    }
    bound, best = max(case.flops / (gflops * 1e9), case.bytes / (bandwidth * 1e9)), times[names[0]]
    return Result(
        case.name,
        names[0],
        round(best * 1e3, 4),
        round(times[of_torch] * 1e3, 4),
        round(times["ref"] * 1e3, 4),
        round(bound * 1e3, 4),
        round(times[of_torch] / best, 2),
        round(times["ref"] / best, 2),
        round(bound / best, 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each measurement")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time instead of wall time")
    arguments = parser.parse_args()
    threads = 1 if arguments.busy else arguments.threads
    clock = time.process_time if arguments.busy else time.perf_counter
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    gflops = bandwidth = 0.0
    print(
        f"{'operation':72} {'backend':>8} {'ms':>9} {'torch ms':>9} {'ref ms':>9} {'bound ms':>9} "
        f"{'x torch':>8} {'x ref':>8} {'of bound':>9}"
    )
    results = []
    for cases in (linear_cases, absorb_cases, decode_cases, prefill_cases, expert_cases):
        rates = machine(arguments.seconds, clock)
        gflops, bandwidth = max(gflops, rates[0]), max(bandwidth, rates[1])
        for case in cases(dtype):
            row = measure(case, gflops, bandwidth, arguments.seconds, clock)
            results.append(row)
            print(
                f"{row.name:72} {row.backend:>8} {row.ms:9.4f} {row.torch_ms:9.4f} {row.ref_ms:9.3f} "
                f"{row.bound_ms:9.4f} {row.speedup_over_torch:8.2f} {row.speedup_over_ref:8.2f} "
                f"{row.fraction_of_roofline:9.0%}"
            )
    print(f"\nfloat32 product {gflops:.0f} GFLOP/s, copy {bandwidth:.1f} GB/s, {threads} threads")
    report = {
        "benchmark": "kernels_cpu",
        "threads": threads,
        "clock": clock.__name__,
        "dtype": arguments.dtype,
        "gflops": round(gflops, 1),
        "copy_gb_per_s": round(bandwidth, 1),
        "results": [asdict(row) for row in results],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
