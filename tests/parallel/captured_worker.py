"""One rank of an engine whose decode steps are captured, started by test_captured_groups.py; writes what it has done.

Usage: captured_worker.py RANK FOLDER, where FOLDER holds case.json: {checkpoint, num_valid_tokens, options, overlap,
refusing, schedules, sleeps}. Device and graphs are simulated: the engine is set up as on a GPU that has room for all,
and replaying a graph calls its function. What is in `refusing` are ranks with kernels that cannot be captured; what is
in `sleeps` are levels of sleep, one behind each schedule, or 0 for none.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from replayed_graphs import ReplayedGraphs
from simulated_device import SimulatedDevice

from dsengine.config import EngineConfig
from dsengine.engine import device_setup
from dsengine.engine.build import build_engine
from dsengine.engine.core import EngineCore
from dsengine.engine.device_setup import DeviceSetup
from dsengine.engine.memory_ledger import MemoryLedger
from dsengine.engine.messages import AddRequest
from dsengine.engine.model_runner import ModelRunner
from dsengine.engine.sampling_params import SamplingParams
from dsengine.engine.step_outputs import StepOutputs
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.moe import MixtureOfExperts
from dsengine.parallel.groups import World, join_world

MOST_STEPS = 200
Schedule = list[list[list[tuple[list[int], int]]]]
"""[step][group]: the requests that come before it, each a prompt and the number of tokens wanted."""


class Plenty:
    """Memory of a device that is never short of it."""

    def total(self) -> int:
        return 2**36

    def free(self) -> int:
        return 2**35

    def extra_needed(self, work: Callable[[], object]) -> int:
        work()
        return 2**20


class RecordingRunner:
    """Writes down, for each step of a runner, the number of the graph that was replayed, in the order of their capture;
    -1: none was. It does so where the step runs, which may be behind the host."""

    def __init__(self, runner: ModelRunner, backends: list[ReplayedGraphs]) -> None:
        self.replayed: list[int] = []
        self._forward, self._backends = runner.forward, backends
        pytest.MonkeyPatch().setattr(runner, "forward", self.forward)

    def forward(self, *args: Any) -> StepOutputs:
        before = self._counts()
        outputs = self._forward(*args)
        changed = [graph for graph, (a, b) in enumerate(zip(before, self._counts(), strict=True)) if a != b]
        assert len(changed) <= 1
        self.replayed.append(changed[0] if changed else -1)
        return outputs

    def _counts(self) -> list[int]:
        return [graph.num_replays for graph in self._backends[-1].captured]


def build(
    case: dict[str, Any], rank: int, world: World, device: SimulatedDevice
) -> tuple[EngineCore, list[ReplayedGraphs]]:
    backends = [ReplayedGraphs()]

    def new_backend() -> ReplayedGraphs:
        backends.append(ReplayedGraphs())
        return backends[-1]

    def as_on_cuda(setup: DeviceSetup) -> tuple[ModelRunner, MemoryLedger]:
        return setup.on_cuda(Plenty(), new_backend)

    obstacles = ["moe_experts=cpu"] if rank in case["refusing"] else []
    patch = pytest.MonkeyPatch()
    patch.setattr(device_setup, "operations_against_capture", lambda *_: obstacles)
    patch.setattr(DeviceSetup, "on_cpu", as_on_cuda)
    core = build_engine(
        EngineConfig(**case["options"]),
        Path(case["checkpoint"]),
        eos_token_ids=frozenset(),
        num_valid_tokens=case["num_valid_tokens"],
        queue=device if case["overlap"] else None,
        world=world,
    )
    return core, backends


def run(core: EngineCore, world: World, schedule: Schedule) -> dict[str, list[int]]:
    """The tokens of this rank's requests. The number of the step is the time, which all ranks must have alike."""
    tokens: dict[str, list[int]] = {}
    for number in range(MOST_STEPS):
        arriving = schedule[number][world.dp_rank] if number < len(schedule) else []
        for place, (prompt, count) in enumerate(arriving):
            request_id = f"{number}-{place}"
            tokens[request_id] = []
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            core.add_request(AddRequest(request_id, prompt, params), float(number))
        is_over = number >= len(schedule) and not core.has_work
        if all(answer for [answer] in world.all_gather_ints([int(is_over)])):
            break
        for update in core.step(float(number)).updates:
            assert update.error is None
            tokens[update.request_id] += update.new_token_ids
    assert not core.has_work, "it does not come to an end"
    core.check_integrity()
    return tokens


def experts_moved(model: DeepseekModel) -> bool:
    """Whether experts of any layer lie elsewhere than at the start."""
    beginning = tuple(model.slots.layout.expert_placement(model.config.n_routed_experts))
    layers = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]
    return any(mlp.places is not None and mlp.places.placement != beginning for mlp in layers)


def drafts(core: EngineCore) -> dict[str, int]:
    """How often each captured draft was replayed."""
    speculator = core._launcher.runner.speculator
    if speculator is None or speculator.graphs is None:
        return {}
    graphs: dict[Any, Any] = speculator.graphs.drafts._graphs
    return {f"{shape} {size}": graph.num_replays for (shape, _, size), graph in graphs.items()}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    case = json.loads((folder / "case.json").read_text())
    options = case["options"]
    world = join_world(
        rank,
        options["tp_size"],
        attn_dp_size=options["attn_dp_size"],
        device=torch.device("cpu"),
        rendezvous=folder / "rendezvous",
        timeout_s=60,
    )
    with contextlib.closing(SimulatedDevice()) as device:
        core, backends = build(case, rank, world, device)
        recorder = RecordingRunner(core._launcher.runner, backends)
        num_backends = len(backends)
        tokens, steps = [], []
        for schedule, level in zip(case["schedules"], case["sleeps"], strict=True):
            tokens.append(run(core, world, schedule))
            steps.append(core.num_steps)
            if level:
                core.maintain("sleep", str(level))
                assert core._launcher.runner.graphs is None
                core.maintain("wake_up", "")
    told = {
        "sizes": core.info.cuda_graph_bs,
        "captured": [len(backend.captured) for backend in backends[num_backends - 1 :]],
        "experts_moved": experts_moved(core.model),
        "tokens": tokens,
        "drafts": drafts(core),
        "replayed": [recorder.replayed[a:b] for a, b in pairwise([0, *steps])],
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
    world.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
