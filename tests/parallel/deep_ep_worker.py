"""One rank of what dp_worker.py or captured_worker.py does, with a stand-in for DeepEP; started by test_deep_ep.py.

Usage: deep_ep_worker.py RANK FOLDER [ADDRESS]; with an address it is dp_worker.py's. FOLDER also holds fake.json:
{tokens, ranks_per_node, int32}, and the calls of the stand-in are written there. Nothing can be pickled by torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import captured_worker
import dp_worker
import fake_deep_ep
import pytest
import torch
import torch.distributed.distributed_c10d as c10d
from replayed_graphs import ReplayedFunction, ReplayedGraphs

from dsengine.engine import exchange_graphs
from dsengine.parallel import deep_ep
from dsengine.parallel.groups import World


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("something would be pickled")


def check_communicator(world: World) -> None:
    """Numbers, bytes of unlike lengths and nothing, also mixed; the stand-in's `Buffer` sends more of these."""
    rank, size = world.rank, world.size
    told = deep_ep.TensorCommunicator(world.everyone, torch.device("cpu"))
    assert (told.Get_rank(), told.Get_size()) == (rank, size)
    assert told.allgather(-rank << 40) == [-r << 40 for r in range(size)]
    assert told.allgather(None) == [None] * size
    wanted: list[Any] = [bytes(range(256)) * r for r in range(size)]
    assert told.allgather(bytes(range(256)) * rank) == wanted
    items: list[Any] = [7, b"\x80\x04.", None, bytearray(b"")]
    mixed = told.allgather(items[rank])
    assert mixed == items and [type(item) for item in mixed] == [int, bytearray, type(None), bytearray]
    for unfit in ({"rank": rank}, "text", 1.5):
        with pytest.raises(TypeError, match=f"type {type(unfit).__name__} would have to be pickled"):
            told.allgather(unfit)  # type: ignore[arg-type]


def in_graph(method: Any) -> Any:
    """The same method, while the stand-in refuses what a graph would not hold."""

    def run(*args: Any) -> Any:
        fake_deep_ep.in_graph = True
        try:
            return method(*args)
        finally:
            fake_deep_ep.in_graph = False

    return run


def main(rank: int, folder: Path, address: str | None) -> None:
    told = json.loads((folder / "fake.json").read_text())
    sys.modules["deep_ep"] = fake_deep_ep
    patch = pytest.MonkeyPatch()
    patch.setattr(c10d, "_pickler", refuse)
    patch.setattr(c10d, "_unpickler", refuse)
    patch.setattr(deep_ep, "LOW_LATENCY_TOKENS", told["tokens"])
    patch.setattr(deep_ep, "LOW_LATENCY_HIDDEN_SIZES", fake_deep_ep.HIDDEN_SIZES)
    patch.setattr(fake_deep_ep, "ranks_per_node", told["ranks_per_node"])
    patch.setattr(fake_deep_ep, "topk_idx_t", torch.int32 if told["int32"] else torch.int64)
    patch.setattr(ReplayedFunction, "replay", in_graph(ReplayedFunction.replay))
    replays = property(lambda cleaned: cleaned._captured.num_replays)
    patch.setattr(exchange_graphs._CleanedFunction, "num_replays", replays, raising=False)
    patch.setattr(ReplayedGraphs, "capture", in_graph(ReplayedGraphs.capture))
    if address is None:
        captured_worker.main(rank, folder)
    else:
        patch.setattr(dp_worker, "check_messages", check_communicator)
        dp_worker.main(rank, folder, address)
    (folder / f"fake{rank}.json").write_text(json.dumps(fake_deep_ep.calls))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
