"""Ranks sleep, wake and take other weights together: what fails on one of them changes nothing on any."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rank_processes import run_worker
from tiny_checkpoints import FP8_QUANTIZATION
from tiny_engine import CONFIG, TOKENIZER_SIZE, random_prompts

from dsengine.config import EngineConfig
from dsengine.engine.build import build_engine
from dsengine.engine.messages import AddRequest
from dsengine.engine.sampling_params import SamplingParams
from dsengine.model.random_checkpoint import write_random_checkpoint

TIMEOUT_S = 240
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "block_size": 8,
    "max_total_tokens": 1024,
    "context_length": 96,
    "chunked_prefill_size": 32,
    "num_threads": 1,
    "self_test": "off",  # its probes are larger than these experts
}
TREES: dict[str, Any] = {"speculative_algorithm": "NEXTN", "speculative_eagle_topk": 2, "speculative_num_steps": 2}
MOVING = {"ep_size": 2, "enable_eplb": True, "ep_num_redundant_experts": 2, "eplb_rebalance_num_iterations": 3}
FP8 = {"weight_format": "fp8", "activation_format": "fp8"}
LENGTH = 8
PROMPTS = random_prompts(4, longest=20)


def answers(checkpoint: Path, options: dict[str, Any]) -> list[list[int]]:
    """What a new engine of one process says to each prompt."""
    config = EngineConfig(**OPTIONS, **options)
    core = build_engine(config, checkpoint, eos_token_ids=frozenset(), num_valid_tokens=TOKENIZER_SIZE)
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    for i, prompt in enumerate(PROMPTS):
        core.add_request(AddRequest(str(i), prompt, params), 0.0)
    while core.has_work:
        for update in core.step(0.0).updates:
            tokens[update.request_id] += update.new_token_ids
    return list(tokens.values())


def lay_out(folder: Path, hub: dict[str, Any]) -> None:
    """Every rank's checkpoints; of some, rank 1 has another idea than rank 0."""
    for name, seed in (("old", 1), ("new", 2)):
        write_random_checkpoint(folder / "rank0" / name, hub, seed=seed, num_shards=2)
    for name in ("missing", "malformed", "torn", "torn twice"):
        shutil.copytree(folder / "rank0" / "old", folder / "rank0" / name)
    shutil.copytree(folder / "rank0", folder / "rank1")
    shutil.rmtree(folder / "rank1" / "missing")
    for file in (folder / "rank1" / "malformed").glob("*.safetensors"):
        file.write_bytes(file.read_bytes().replace(b"model.norm.weight", b"model.nurm.weight"))


@pytest.mark.parametrize(
    ("layout", "quantized", "formats"),
    [
        pytest.param({"tp_size": 2} | TREES, False, {}, id="TP2", marks=pytest.mark.slow),
        pytest.param({"tp_size": 2, "attn_dp_size": 2} | MOVING | TREES, True, FP8, id="DP2, FP8, experts move"),
    ],
)
def test_all_ranks_or_none(tmp_path: Path, layout: dict[str, Any], quantized: bool, formats: dict[str, str]) -> None:
    hub = CONFIG | {"vocab_size": TOKENIZER_SIZE + 8} | ({"quantization_config": FP8_QUANTIZATION} if quantized else {})
    lay_out(tmp_path, hub)
    groups = layout.get("attn_dp_size", 1)
    mine = [list(range(group, len(PROMPTS), groups)) for group in range(groups)]
    old, new = (answers(tmp_path / "rank0" / name, formats) for name in ("old", "new"))
    case = {
        "options": OPTIONS | layout | formats,
        "num_valid_tokens": TOKENIZER_SIZE,
        "schedule": [[[(PROMPTS[i], LENGTH) for i in numbers] for numbers in mine]],
    }
    (tmp_path / "case.json").write_text(json.dumps(case))
    run_worker("residency_worker.py", 2, tmp_path, helpers=["engine"], timeout_s=TIMEOUT_S)
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert all(rank["experts_moved"] == ("enable_eplb" in layout) for rank in told)
    for rank, each in enumerate(told):
        group = rank if groups == 2 else 0
        for name, tokens in each["tokens"].items():
            expected = old if name == "old" or name.startswith("slept") else new
            assert tokens == {f"0-{place}": expected[i] for place, i in enumerate(mine[group])}, name
    check_errors([each["errors"] for each in told], groups)


def check_errors(told: list[dict[str, str]], groups: int) -> None:
    assert told[0] == told[1], "all ranks say the same"
    errors = told[0]
    assert errors["missing"].startswith("rank 1: ") and "config.json" in errors["missing"]
    assert errors["malformed"].startswith("rank 1: ") and "model.norm.weight" in errors["malformed"]
    assert errors["torn"].startswith("rank 1: model-00002-of-000002.safetensors can no longer be read")
    assert errors["torn"].endswith("; the weights of before are loaded again")
    assert "asleep at level 2" in errors["torn twice"]
    assert errors["wake_up"].startswith("rank 1: ") and "config.json" in errors["wake_up"]
    busy = "requests are running or waiting"
    assert errors["busy"] == (busy if groups == 1 else f"rank 1: {busy}")
