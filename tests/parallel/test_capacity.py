"""What engines over ranks make of a given memory, beside the plan's ledger for as much."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rank_processes import run_worker
from tiny_checkpoints import TINY_CONFIGS

from dsengine.model.checkpoint import read_checkpoint
from dsengine.model.random_checkpoint import write_random_checkpoint
from dsengine.plan.hardware import GPUS
from dsengine.plan.layout import Layout
from dsengine.plan.memory import (
    CONTEXT_BYTES,
    GRAPH_BYTES,
    RESERVE_BYTES,
    cache_bytes_per_token,
    cache_tokens,
    weigh,
    working_bytes,
)
from dsengine.plan.source import PlannedModel

TP2, TP4 = Layout(2, 1, "tp"), Layout(4, 1, "ep")
DP2, DP2_TP2 = Layout(1, 2, "ep"), Layout(2, 2, "ep")
SHARED = Layout(2, 2, "ep", 0, True, True)
LAYOUTS = (TP2, TP4, DP2, DP2_TP2, SHARED)
RANKS = 4
CHUNK, REQUESTS, BLOCK_SIZE, FRACTION = 64, 8, 16, 0.98
ROOM = 64 * 2**20  # for weights and cache


def options(layout: Layout) -> dict[str, Any]:
    """The flags of a layout."""
    return {
        "device": "cpu",
        "dtype": "bfloat16",
        "context_length": 256,
        "block_size": BLOCK_SIZE,
        "chunked_prefill_size": CHUNK,
        "max_running_requests": REQUESTS,
        "mem_fraction_static": FRACTION,
        "disable_cuda_graph": True,
        "num_threads": 1,
        "tp_size": layout.world,
        "attn_dp_size": layout.attn_dp,
        "ep_size": layout.world if layout.experts == "ep" else 1,
        "dense_parallel": "world" if layout.dense_over_world else "attention",
        "lm_head_parallel": "world" if layout.lm_head_over_world else "attention",
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PlannedModel:
    folder = tmp_path_factory.mktemp("capacity") / "v3"
    config = write_random_checkpoint(folder, TINY_CONFIGS["v3"])
    return PlannedModel(str(folder), "random weights", config, read_checkpoint(folder))


def test_engines_hold_what_is_planned(tmp_path: Path, model: PlannedModel) -> None:
    # The same for all, as `plan` does: what remains is what weights and cache take.
    needed = max(working_bytes(model.config, layout, CHUNK, REQUESTS) for layout in LAYOUTS)
    total = CONTEXT_BYTES + GRAPH_BYTES + RESERVE_BYTES + needed + ROOM
    cases = [
        {
            "name": layout.name,
            "checkpoint": model.name,
            "options": options(layout),
            "total": total,
            "needed": needed,
        }
        for layout in LAYOUTS
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_worker("capacity_worker.py", RANKS, tmp_path, helpers=[], timeout_s=240)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    gpu = dataclasses.replace(GPUS["h200"], memory_bytes=total)
    token_bytes = cache_bytes_per_token(model.config)
    capacity = {}
    for layout in LAYOUTS:
        ranks = [rank[layout.name] for rank in found[: layout.world]]
        weight_bytes = weigh(model, gpu).bytes_per_rank(layout)
        tokens = cache_tokens(gpu, weight_bytes, needed, token_bytes, FRACTION, BLOCK_SIZE)
        for rank in ranks:
            assert rank["weight_bytes"] == pytest.approx(weight_bytes, rel=0.01), layout.name
            assert rank["cache_tokens"] == pytest.approx(tokens, rel=0.01), layout.name
            assert rank["cache_bytes"] == rank["cache_tokens"] * token_bytes
        assert len({rank["cache_tokens"] for rank in ranks}) == 1, "ranks take the size of the smallest cache"
        capacity[layout] = ranks[0]["cache_tokens"] * layout.attn_dp
    assert capacity[DP2] == pytest.approx(2 * capacity[TP2], rel=0.01)
    assert capacity[DP2_TP2] == pytest.approx(2 * capacity[TP4], rel=0.01)
    weights = {layout: found[0][layout.name]["weight_bytes"] for layout in LAYOUTS}
    assert weights[TP4] < weights[SHARED] < weights[DP2_TP2] < weights[DP2]
    assert capacity[DP2_TP2] <= capacity[SHARED]
