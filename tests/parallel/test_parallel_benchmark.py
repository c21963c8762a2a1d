"""The plan's figures for several ranks against what ranks count: `benchmarks/parallel.py` on two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from dsengine.model.config import ModelConfig
from dsengine.plan.builtin import DEEPSEEK_V3
from dsengine.plan.layout import Layout
from dsengine.plan.traffic import step_traffic

ROOT = Path(__file__).resolve().parents[2]
SHARED = "DP2 EP2 dense2 head2"
V3 = ModelConfig.from_hub(DEEPSEEK_V3)


def test_ranks_send_and_hold_what_is_planned() -> None:
    command = [sys.executable, "-m", "benchmarks.parallel", "--requests", "3", "--layouts", "DP2 EP2", SHARED]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["wrong"] == []
    for row in found["layouts"]:
        assert row["sent_per_step"] == [row["planned_per_step"]] * 2
        assert row["cache_tokens"] == 2 * row["cache_tokens_per_group"]
    apart, shared = found["layouts"]
    assert shared["layout"] == SHARED
    assert shared["weight_bytes"] < apart["weight_bytes"] and shared["cache_tokens"] > apart["cache_tokens"]


def test_bytes_of_v3() -> None:
    tensor_parallel = step_traffic(V3, Layout(8, 1, "tp"), tokens=32, samples=32)
    assert tensor_parallel.moe_layer == tensor_parallel.dense_layer == 2 * 32 * 7168 * 2
    assert tensor_parallel.step == (1 + 2 * 61) * 32 * 7168 * 2 + 32 * 129280 // 8 * 2
    data_parallel = step_traffic(V3, Layout(1, 8, "ep"), tokens=4, samples=4, is_fp8=True)
    assert data_parallel.dense_layer == 0  # each rank has all of its tokens' dense layers
    # To everybody as FP8 with 56 scales, 8 weights and 8 places; back, summed, in bf16 from a buffer of all tokens.
    assert data_parallel.moe_layer == 4 * (7168 + 4 * 56 + 2 * 32) + 8 * 4 * 7168 * 2
    shared = step_traffic(V3, Layout(1, 8, "ep", 0, True, True), tokens=4, samples=4, is_fp8=True)
    assert shared.moe_layer == data_parallel.moe_layer
    assert shared.dense_layer == shared.moe_layer - 4 * 2 * 32  # without weights and places
    # Hidden states to everybody; back from each rank its part of the vocabulary.
    assert shared.step - data_parallel.step == 3 * shared.dense_layer + 4 * (7168 * 2 + 7 * 129280 // 8 * 2)
    assert step_traffic(V3, Layout(), tokens=4, samples=4).step == 0
