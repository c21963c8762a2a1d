"""The start-up self-test accepts what is right, and names and replaces what is wrong."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import TINY_CONFIGS

from dsengine.demo import CHECKPOINT_DIR
from dsengine.engine.self_test import Probe, compare, verified_kernels
from dsengine.engine.self_test_probes import ProbeMaker
from dsengine.kernels.registry import OPERATIONS, select_kernels
from dsengine.model.activations import ActivationFormat
from dsengine.model.config import ModelConfig
from dsengine.model.random_checkpoint import write_random_checkpoint

CPU = torch.device("cpu")


def probes_of(folder: Path, **options: Any) -> list[Probe]:
    config = ModelConfig.from_hub(folder)
    settings: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "keep_fp8": False, "fp8_cache": False}
    activations = options.pop("activations", ActivationFormat())
    return list(ProbeMaker(folder, config, activations=activations, **settings | options).probes())


@pytest.fixture(scope="module")
def demo() -> list[Probe]:
    return probes_of(Path(CHECKPOINT_DIR))


def test_every_operation_is_probed() -> None:
    quantised = probes_of(Path(CHECKPOINT_DIR), keep_fp8=True, activations=ActivationFormat(is_fp8=True))
    assert {probe.operation for probe in quantised} == {operation.name for operation in OPERATIONS}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep_fp8": True},
        {"keep_fp8": True, "activations": ActivationFormat(is_fp8=True), "fp8_cache": True},
        {"dtype": torch.bfloat16, "keep_fp8": True, "activations": ActivationFormat(is_fp8=True, scale_fmt="ue8m0")},
    ],
    ids=["float", "fp8 weights", "all fp8", "bfloat16"],
)
def test_cpu_kernels_pass_on_the_demo_model(options: dict[str, Any]) -> None:
    started = time.process_time()
    kernels, failures = verified_kernels(CPU, None, probes_of(Path(CHECKPOINT_DIR), **options))
    assert failures == []
    assert kernels.table()["mla_prefill"] == "cpu"
    assert time.process_time() - started < 20  # seconds of CPU: a runaway probe, not a speed


@pytest.mark.parametrize("name", sorted(TINY_CONFIGS))
def test_cpu_kernels_pass_on_every_architecture(tmp_path: Path, name: str) -> None:
    write_random_checkpoint(tmp_path, TINY_CONFIGS[name], seed=0)
    assert verified_kernels(CPU, None, probes_of(tmp_path))[1] == []


def break_backend(monkeypatch: pytest.MonkeyPatch, module: str, function: str, replacement: Any) -> None:
    monkeypatch.setattr(importlib.import_module(f"dsengine.kernels.{module}"), function, replacement)


def test_a_wrong_backend_is_named_and_replaced(demo: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    break_backend(monkeypatch, "rope.cpu", "rope_cpu", lambda x, cos_sin, positions: x * 1.5)
    kernels, (failure,) = verified_kernels(CPU, None, demo)
    layer = "model.layers.0.self_attn.kv_a_layernorm"
    assert failure.startswith(f"rope: backend cpu is wrong on {layer}: result 0: relative")
    assert kernels.table()["rope"] == "ref"
    assert kernels.table()["mla_prefill"] == "cpu"
    reason = next(reason for operation, _, reason in kernels.explain() if operation == "rope")
    assert "cpu failed the self-test" in reason


def test_a_raising_backend_is_replaced(demo: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise RuntimeError("no kernel image is available for execution on the device\nand more")

    break_backend(monkeypatch, "mla_prefill.cpu", "mla_prefill_cpu", fail)
    kernels, (failure,) = verified_kernels(CPU, None, demo)
    assert "raises RuntimeError on model.layers.0.self_attn.: no kernel image" in failure
    assert "and more" not in failure
    assert kernels.table()["mla_prefill"] == "ref"


def test_a_forced_backend_that_fails_stops_the_start(demo: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    break_backend(monkeypatch, "rope.cpu", "rope_cpu", lambda x, cos_sin, positions: x)
    with pytest.raises(ValueError, match="backend 'cpu' of rope was asked for, but fails the self-test"):
        verified_kernels(CPU, {"rope": "cpu"}, demo)


def test_results_written_in_place_count(demo: list[Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    from dsengine.kernels.mla_prep.ref import mla_prep_ref

    reference: Any = mla_prep_ref

    def store_nothing(*arguments: Any) -> Any:
        *inputs, kv_cache = arguments
        return reference(*inputs, kv_cache.clone())

    backend = select_kernels(CPU).table()["mla_prep"]
    break_backend(monkeypatch, f"mla_prep.{backend}", f"mla_prep_{backend}", store_nothing)
    _, (failure,) = verified_kernels(CPU, None, demo)
    assert failure.startswith(f"mla_prep: backend {backend} is wrong")


def test_comparison() -> None:
    ones = torch.ones(4, 3)
    assert compare([ones + 1e-4], [ones]) is None
    assert "relative error" in str(compare([ones + 1e-1], [ones]))
    assert "finite in one result only" in str(compare([ones / 0], [ones]))
    assert compare([ones / 0], [ones / 0]) is None
    ids, weights = torch.arange(40).view(20, 2), torch.rand(20, 2)
    other_ids, other_weights = ids.clone(), weights.clone()
    other_ids[3], other_weights[3] = -1, 9.0
    assert compare([other_weights, other_ids], [weights, ids], chooses=True) is None
    other_ids[:3] = -1
    assert "20% of the choices differ" in str(compare([other_weights, other_ids], [weights, ids], chooses=True))
