"""How long is a speculative step of DeepSeek-V3, drafting to accepted path, in CUDA graphs and kernel by kernel?

    python -m benchmarks.speculative_step                        V3's TP8 share, 3/1/4 and 3/4/8 at batch 1, 8, 64
    python -m benchmarks.speculative_step --layers 8 --batch 1   fewer layers, one of them dense
    python -m benchmarks.speculative_step --device cpu --tiny    a rehearsal: graphs are replayed functions

Whole steps of the engine as the host sees them, from the scheduled batch to the tokens on the host, greedy, beside
plain decode steps of the same requests: the ratio of the two is the number of tokens from which a tree pays. Weights
are random, routing is uniform, and hardly a draft is accepted, which costs the same. As in rank_step, other ranks are
absent and nothing is communicated. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gpu_timing import Budget
from benchmarks.problems.base import tiny_v3
from benchmarks.random_model import SyntheticRouting, build_random_model, share_config
from benchmarks.rank_step import SHARES, TINY_SHARES
from dsengine.config import EngineConfig
from dsengine.engine.batch import ScheduledBatch, ScheduledRequest
from dsengine.engine.cuda_graphs import CudaGraphs
from dsengine.engine.graph_runner import GraphBackend, GraphFunction
from dsengine.engine.launch import DirectQueue, StepLauncher
from dsengine.engine.model_runner import ModelRunner, PreparedStep
from dsengine.engine.request import Request
from dsengine.engine.sampler import Sampler
from dsengine.engine.sampling_params import SamplingParams
from dsengine.engine.speculation_setup import make_speculator
from dsengine.engine.step_graphs import make_step_graphs
from dsengine.kernels.registry import select_kernels
from dsengine.memory.kv_cache import KVCachePool
from dsengine.model.config import ModelConfig
from dsengine.plan.builtin import DEEPSEEK_V3
from dsengine.plan.layout import Layout
from dsengine.specdec.shape import TreeShape

BLOCK_SIZE = 64


@dataclass(frozen=True)
class Steps:
    """Steps of one kind: the median in milliseconds, and of its parts the mean on the device."""

    tree: str
    batch: int
    context: int
    captured: bool
    step_ms: float
    parts_ms: dict[str, float]


@dataclass(frozen=True)
class _Repeated:
    """A captured function of a rehearsal."""

    replay: GraphFunction


class _Rehearsal:
    def capture(self, function: GraphFunction) -> _Repeated:
        function()
        return _Repeated(function)


class Bench:
    """One rank's share of a model, and steps of requests in its cache.

    Args:
        config: of the whole model.
        batch: most requests.
        context: tokens cached of each.
        trees: that are drafted.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        device: torch.device,
        batch: int,
        context: int,
        trees: list[TreeShape],
    ) -> None:
        self.device, self.context, self.trees = device, context, trees
        routing = SyntheticRouting(select_kernels(device), config, layout, device)
        routing.prepare(batch * max(tree.num_slots for tree in trees))
        share = dataclasses.replace(share_config(config, layout), num_nextn_predict_layers=1)
        self.model = build_random_model(share, routing.kernels, device)
        self._blocks_each = -(-(context + max(tree.num_slots for tree in trees)) // BLOCK_SIZE)
        shape = (share.num_hidden_layers + 1, batch * self._blocks_each, BLOCK_SIZE, share.latent_dim)
        self.pool = KVCachePool(*shape, dtype=torch.bfloat16, device=device)
        for layer in self.pool.layers:
            layer.normal_()
        self._sampler = Sampler(routing.kernels, share.vocab_size)
        self._config = EngineConfig(
            speculative_algorithm="NEXTN",
            speculative_num_steps=max(tree.steps for tree in trees),
            speculative_eagle_topk=max(tree.topk for tree in trees),
            max_running_requests=batch,
        )

    def launcher(self, sizes: list[int], *, captured: bool) -> StepLauncher:
        """An engine's lower half, for steps of so many requests."""
        speculator = make_speculator(self._config, self.model, self.pool, self._sampler)
        assert speculator is not None
        backend: GraphBackend = CudaGraphs(self.device) if self.device.type == "cuda" else _Rehearsal()
        graphs = make_step_graphs(
            self.model,
            self.pool,
            backend,
            context_length=self._blocks_each * BLOCK_SIZE,
            sizes=sizes,
            tree_sizes=sizes,
            shapes=self.trees,
            drafter=speculator.nextn,
        )
        if not captured:
            return StepLauncher(ModelRunner(self.model, self.pool, None, speculator), self._sampler, DirectQueue())
        with torch.inference_mode():
            graphs.capture()
        speculator.graphs = graphs.drafter
        runner = ModelRunner(self.model, self.pool, graphs.plain, speculator, graphs.trees)
        return StepLauncher(runner, self._sampler, DirectQueue())

    def batch(self, count: int, tree: TreeShape | None) -> ScheduledBatch:
        """The next step of so many requests; None: plain decode."""
        params = SamplingParams(temperature=0, ignore_eos=True)
        drafts = 0 if tree is None else tree.num_nodes - 1
        scheduled = []
        for number in range(count):
            request = Request(str(number), [1] * self.context, params, output_token_ids=[2])
            first = number * self._blocks_each
            request.block_table = list(range(first, first + self._blocks_each))
            scheduled.append(ScheduledRequest(request, self.context, 1 + drafts, samples=True, num_drafts=drafts))
        return ScheduledBatch(scheduled, tree=tree)

    def time(
        self, launcher: StepLauncher, count: int, tree: TreeShape | None, *, captured: bool, repeats: int
    ) -> Steps:
        """Runs so many steps one after the other, each to the end."""
        batch = self.batch(count, tree)
        speculator = launcher.runner.speculator
        assert speculator is not None
        _run(launcher, batch)
        before, seconds = self._read(speculator.times.read), []
        for _ in range(repeats):
            began = time.perf_counter()
            _run(launcher, batch)
            seconds.append(time.perf_counter() - began)
        after = self._read(speculator.times.read)
        parts = {name: round((after[name] - before.get(name, 0.0)) / repeats * 1e3, 4) for name in after}
        label = "none" if tree is None else str(tree)
        return Steps(label, count, self.context, captured, round(statistics.median(seconds) * 1e3, 4), parts)

    def _read(self, read: Callable[[], dict[str, float]]) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return read()


def _run(launcher: StepLauncher, batch: ScheduledBatch) -> None:
    step: PreparedStep = launcher.runner.prepare(batch, {})
    result = launcher.compute(step, None)
    if result.paths is not None:
        result.paths.fetch()
    if result.drawn is not None:
        result.drawn.fetch()


def measure(bench: Bench, batches: list[int], repeats: int, budget: Budget) -> Iterator[Steps]:
    """Plain decode, then every tree, captured and kernel by kernel; the smallest batch first."""
    captured, eager = bench.launcher(batches, captured=True), bench.launcher(batches, captured=False)
    for count in batches:
        for tree in (None, *bench.trees):
            for launcher in (captured, eager):
                if budget.is_spent:
                    return
                yield bench.time(launcher, count, tree, captured=launcher is captured, repeats=repeats)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", nargs="+", default=["3/1/4", "3/4/8"], metavar="S/K/N", help="[3/1/4 3/4/8]")
    parser.add_argument("--batch", type=int, nargs="+", default=None, help="requests [1 8 64]")
    parser.add_argument("--context", type=int, default=None, help="tokens cached of each [4096]")
    parser.add_argument("--repeats", type=int, default=20, help="steps of one measurement [20]")
    parser.add_argument("--layers", type=int, help="build only so many layers, of which one is dense")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a rehearsal")
    parser.add_argument("--seconds", type=float, default=120, help="budget, the weights included")
    parser.add_argument("--out", type=Path, help="file for the JSON, rewritten after every measurement")
    arguments = parser.parse_args(argv)
    arguments.batch = sorted(arguments.batch or ([1, 3] if arguments.tiny else [1, 8, 64]))
    arguments.context = arguments.context or (40 if arguments.tiny else 4096)
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("on a CPU only --tiny makes sense")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here; --device cpu --tiny rehearses without one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    started, budget, found = time.monotonic(), Budget(arguments.seconds), list[Steps]()
    config = ModelConfig.from_hub(tiny_v3() if arguments.tiny else DEEPSEEK_V3)
    if arguments.layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=arguments.layers, first_k_dense_replace=1)
    trees = [TreeShape(*map(int, tree.split("/"))) for tree in arguments.tree]
    layout = (TINY_SHARES if arguments.tiny else SHARES)["TP8"]

    def summary() -> str:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        seconds = round(time.monotonic() - started, 1)
        head = {"benchmark": "speculative_step", "device": name, "layers": config.num_hidden_layers}
        return json.dumps({**head, "seconds": seconds, "steps": [asdict(steps) for steps in found]})

    bench = Bench(config, layout, device, max(arguments.batch), arguments.context, trees)
    for steps in measure(bench, arguments.batch, arguments.repeats, budget):
        found.append(steps)
        parts = ", ".join(f"{name} {milliseconds:.3f}" for name, milliseconds in steps.parts_ms.items())
        how = "graphs" if steps.captured else "eager"
        print(f"{steps.tree:6} batch {steps.batch:3} {how:6} {steps.step_ms:9.3f} ms  ({parts})", flush=True)
        if arguments.out is not None:
            arguments.out.write_text(summary())
    print(summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
