"""One rank of an engine that sleeps, wakes and takes other weights, started by test_residency.py; writes what it saw.

Usage: residency_worker.py RANK FOLDER, where FOLDER holds case.json: {options, num_valid_tokens, schedule}, and a
folder for each rank with the checkpoints that it can see, as if it were on a machine of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_worker import experts_moved, run

from dsengine.config import EngineConfig
from dsengine.engine import residency
from dsengine.engine.build import build_engine
from dsengine.engine.core import EngineCore
from dsengine.engine.messages import AddRequest, CallName
from dsengine.engine.sampling_params import SamplingParams
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.loader import prepare_refill
from dsengine.parallel.groups import World, join_world


def held(core: EngineCore) -> dict[str, int]:
    """Bytes under the cache and the weights."""
    runner = core._launcher.runner
    slots = runner.model.slots.by_name.values()
    weights = [t for slot in slots for t in (slot.weight, slot.scale) if t is not None]
    return {
        "cache": sum(layer.untyped_storage().nbytes() for layer in runner.pool.layers),
        "weights": sum(storage.nbytes() for storage in residency._storages(weights)),
    }


def refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


class Rank:
    def __init__(self, core: EngineCore, world: World, schedule: Any, folder: Path) -> None:
        self._core, self._world, self._schedule, self._folder = core, world, schedule, folder
        pytest.MonkeyPatch().setattr(residency, "prepare_refill", self._prepare_and_spoil)
        self.told: dict[str, Any] = {"tokens": {}, "errors": {}}

    def answer(self, name: str) -> None:
        self.told["tokens"][name] = run(self._core, self._world, self._schedule)

    def maintain(self, name: CallName, argument: str = "") -> None:
        self._core.maintain(name, argument)
        assert self._core.stats().num_blocks_cached == 0

    def update(self, checkpoint: str) -> None:
        self.maintain("update_weights", str(self._folder / checkpoint))

    def sleep_and_wake(self, level: str) -> None:
        awake = held(self._core)
        self.maintain("sleep", level)
        assert self._core.stats().sleep_level == int(level)
        asleep = held(self._core)
        assert asleep == awake | ({"cache": 0} if level == "1" else {"cache": 0, "weights": 0})
        request = AddRequest("x", [5], SamplingParams(max_tokens=1))
        assert "asleep" in refusal(lambda: self._core.add_request(request, 0.0))
        assert "wake it up" in refusal(lambda: self.update("new"))
        self.maintain("wake_up")
        assert held(self._core) == awake and self._core.stats().sleep_level == 0
        self.answer(f"slept at level {level}")

    def fail(self, checkpoint: str, *, level: int = 0) -> None:
        self.told["errors"][checkpoint] = refusal(lambda: self.update(checkpoint))
        assert self._core.stats().sleep_level == level
        if level == 0:
            self.answer(checkpoint)

    def wake_from_failure(self) -> None:
        """The rank whose folder is not what it was keeps the others asleep."""
        self.told["errors"]["wake_up"] = refusal(lambda: self.maintain("wake_up"))
        assert self._core.stats().sleep_level == 2
        self._world.all_gather_ints([])
        if (self._folder / "new.hidden").exists():
            (self._folder / "new.hidden").rename(self._folder / "new")
        self.maintain("wake_up")
        self.answer("recovered")

    def busy(self) -> None:
        """One group has a request: none of them does anything."""
        if self._world.dp_rank == self._world.dp_size - 1:
            self._core.add_request(AddRequest("busy", [5, 6, 7], SamplingParams(max_tokens=1)), 0.0)
        self.told["errors"]["busy"] = refusal(lambda: self.maintain("sleep", "1"))
        self._core.abort(["busy"])
        self.answer("busy")

    def _prepare_and_spoil(self, model: DeepseekModel, checkpoint: Path) -> Callable[[], None]:
        """The files of rank 1 are damaged after they have been looked at and before they are read."""
        fill = prepare_refill(model, checkpoint)
        if self._world.rank == 1 and checkpoint.name in ("torn", "torn twice"):
            last = sorted(checkpoint.glob("*.safetensors"))[-1]
            last.write_bytes(last.read_bytes()[:1000])
            if checkpoint.name == "torn twice":
                (self._folder / "new").rename(self._folder / "new.hidden")
        return fill


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    case = json.loads((folder / "case.json").read_text())
    config = EngineConfig(**case["options"])
    world = join_world(
        rank,
        config.tp_size,
        attn_dp_size=config.attn_dp_size,
        device=torch.device("cpu"),
        rendezvous=folder / "rendezvous",
        timeout_s=60,
    )
    own = folder / f"rank{rank}"
    core = build_engine(
        config, own / "old", eos_token_ids=frozenset(), num_valid_tokens=case["num_valid_tokens"], world=world
    )
    tester = Rank(core, world, case["schedule"], own)
    tester.answer("old")
    for level in ("1", "2"):
        tester.sleep_and_wake(level)
    tester.told["experts_moved"] = experts_moved(core.model)
    tester.update("new")
    tester.answer("new")
    for checkpoint in ("missing", "malformed", "torn"):
        tester.fail(checkpoint)
    tester.fail("torn twice", level=2)
    tester.wake_from_failure()
    tester.busy()
    (folder / f"rank{rank}.json").write_text(json.dumps(tester.told))
    world.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
