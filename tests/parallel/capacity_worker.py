"""One rank of engines that are given so much memory, started by test_capacity.py; writes down what they made of it.

Usage: capacity_worker.py RANK FOLDER, where FOLDER holds cases.json: [{name, checkpoint, options, total, needed}]. The
engine is set up as on a GPU of `total` bytes, of which a context and graphs take what the plan reckons with and tensors
what they really take. A case of two ranks runs on ranks 0 and 1.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parallel import held_bytes
from dsengine.config import EngineConfig
from dsengine.engine.build import build_engine
from dsengine.engine.cuda_graphs import CudaGraphs
from dsengine.engine.device_setup import DeviceSetup
from dsengine.engine.memory_ledger import MemoryLedger
from dsengine.engine.model_runner import ModelRunner
from dsengine.parallel.groups import join_world
from dsengine.plan.memory import CONTEXT_BYTES, GRAPH_BYTES

CPU = torch.device("cpu")


@dataclass(frozen=True)
class GivenMemory:
    """A device of `size` bytes.

    Attributes:
        before: bytes of tensors that were there before the engine.
        needed: that the largest step is said to take; it is run all the same.
    """

    size: int
    before: int
    needed: int

    def total(self) -> int:
        return self.size

    def free(self) -> int:
        return self.size - CONTEXT_BYTES - GRAPH_BYTES - (live_bytes() - self.before)

    def extra_needed(self, work: Callable[[], object]) -> int:
        work()
        return self.needed


def live_bytes() -> int:
    """Of all tensors of this process, each storage once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def run(rank: int, folder: Path, case: dict[str, Any]) -> dict[str, int]:
    """Start an engine; what it holds."""
    config = EngineConfig(**case["options"])
    world = join_world(
        rank,
        config.tp_size,
        attn_dp_size=config.attn_dp_size,
        device=CPU,
        rendezvous=folder / case["name"],
        timeout_s=60,
    )
    memory = GivenMemory(case["total"], live_bytes(), case["needed"])

    def as_on_cuda(setup: DeviceSetup) -> tuple[ModelRunner, MemoryLedger]:
        return setup.on_cuda(memory, lambda: CudaGraphs(CPU))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceSetup, "on_cpu", as_on_cuda)
        core = build_engine(
            config, Path(case["checkpoint"]), eos_token_ids=frozenset(), num_valid_tokens=64, world=world
        )
    ledger = core.info.memory
    assert ledger is not None
    held, table = held_bytes(core.model), core.model.cos_sin.nbytes
    assert ledger.weights + ledger.nextn == held + table, "the ledger counts what is held, and the rotary table"
    others = live_bytes() - memory.before - held - table - ledger.kv_cache
    assert 0 <= others < 2**17, f"{others} bytes are no weights and no cache"
    world.close()
    return {
        "weight_bytes": held,
        "cache_tokens": core.info.num_blocks * core.info.block_size,
        "cache_bytes": ledger.kv_cache,
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    cases = json.loads((folder / "cases.json").read_text())
    found = {case["name"]: run(rank, folder, case) for case in cases if rank < case["options"]["tp_size"]}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
