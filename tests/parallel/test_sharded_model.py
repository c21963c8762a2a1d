"""Models cut over 2 and 4 processes answer as the whole model does, and each process holds its part only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import ROOT, run_worker
from safetensors.torch import load_file
from step_answers import STEPS, answers
from tiny_checkpoints import FP8_QUANTIZATION, TINY_CONFIGS, load_tiny

from benchmarks.parallel import held_bytes
from dsengine.model.random_checkpoint import write_random_checkpoint

DEMO = ROOT / "dsengine" / "demo" / "checkpoint"
WORLD_TIMEOUT_S = 120

# Cut between blocks of 128 on 2 and on 4 ranks, with a ragged kv_a_proj (48 rows) that every rank holds whole.
_BLOCKS = {"qk_nope_head_dim": 112, "v_head_dim": 128, "intermediate_size": 512, "moe_intermediate_size": 512}
_FP8 = {"quantization_config": FP8_QUANTIZATION, "vocab_size": 323}
HUB_CONFIGS: dict[str, dict[str, Any]] = {
    "v2_lite": TINY_CONFIGS["v2_lite"],
    "v3": TINY_CONFIGS["v3"],
    # Nothing here ends at a block's edge, and the vocabulary is no multiple of the ranks.
    "v3_dequantized": TINY_CONFIGS["v3"] | _FP8,
    "v3_fp8": TINY_CONFIGS["v3"] | _FP8 | _BLOCKS,
    "v2_lite_fp8": TINY_CONFIGS["v2_lite"] | _FP8 | _BLOCKS,
}
OPTIONS: dict[str, dict[str, str]] = {
    "v3_fp8": {"weight_format": "fp8", "activation_format": "float"},
    "v2_lite_fp8": {"weight_format": "fp8", "activation_format": "float"},
}


def run_world(folder: Path, size: int, cases: list[dict[str, Any]]) -> None:
    """Run the cases on `size` ranks; none of them outlives this call."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    run_worker("rank_worker.py", size, size, folder, helpers=["model"], timeout_s=WORLD_TIMEOUT_S)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_answer_as_the_whole_model(tmp_path: Path, size: int) -> None:
    checkpoints = {name: tmp_path / name for name in HUB_CONFIGS} | {"demo": DEMO}
    for name, hub in HUB_CONFIGS.items():
        write_random_checkpoint(checkpoints[name], hub, seed=4, num_shards=2)
    cases: list[dict[str, Any]] = [
        {
            "name": f"{name} {'EP' if experts_whole else 'TP'}{size}",
            "checkpoint": str(checkpoints[name]),
            "options": OPTIONS.get(name, {}),
            "experts_whole": experts_whole,
        }
        for name in checkpoints
        for experts_whole in (False, True)
    ]
    run_world(tmp_path / "world", size, cases)
    results = [load_file(tmp_path / "world" / f"rank{rank}.safetensors") for rank in range(size)]
    held = [json.loads((tmp_path / "world" / f"rank{rank}.json").read_text()) for rank in range(size)]
    for case in cases:
        whole = load_tiny(Path(case["checkpoint"]), **case["options"])
        for key, expected in answers(whole).items():
            for rank in range(size):
                found = results[rank][f"{case['name']}/{key}"]
                worst = float((found - expected).abs().max())
                assert worst < 1e-4, f"{case['name']}, rank {rank}, {key}: off by {worst}"
                assert torch.equal(found, results[0][f"{case['name']}/{key}"]), "ranks must draw the same tokens"
        parts = [held[rank][case["name"]]["bytes"] for rank in range(size)]
        assert len(set(parts)) == 1, f"{case['name']}: ranks hold {parts} bytes"
        replicated = (size * parts[0] - held_bytes(whole)) / (size - 1)
        assert 0 < replicated < 0.4 * held_bytes(whole), f"{case['name']}: {replicated} bytes are held by every rank"
        assert parts[0] < held_bytes(whole)

    # Summed per token (v2_lite has no NextN layer): the embedding; attention and feed-forward part of each layer.
    tokens, hub = sum(len(ids) for step in STEPS for _, ids in step), HUB_CONFIGS["v2_lite"]
    sums = 1 + 2 * hub["num_hidden_layers"]
    assert held[0][f"v2_lite TP{size}"]["sent"] == tokens * sums * hub["hidden_size"] * 4
