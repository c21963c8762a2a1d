"""The registry: what is chosen, why, and what happens to names nobody knows."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pathlib

import pytest
import torch

from dsengine.kernels import registry
from dsengine.kernels.backend import Backend, Operation
from dsengine.kernels.registry import OPERATIONS, Kernels, select_kernels

CPU = torch.device("cpu")


def test_every_operation_is_served_and_explained():
    kernels = select_kernels(CPU)
    assert set(kernels.table()) == {operation.name for operation in OPERATIONS}
    assert [row[:2] for row in kernels.explain()] == list(kernels.table().items())
    assert all(reason for _, _, reason in kernels.explain())
    assert kernels.table()["mla_prefill"] == "cpu"
    assert kernels.table()["gather_latents"] == "ref"
    normed = kernels.rms_norm(torch.full((2, 4), 3.0), torch.ones(4), 0.0)
    torch.testing.assert_close(normed, torch.ones(2, 4))


def test_cuda_without_gpu_kernels_falls_back_to_the_reference(monkeypatch):
    monkeypatch.setattr("dsengine.kernels.backend.importlib.util.find_spec", lambda package: None)
    table = select_kernels(torch.device("cuda")).table()
    assert set(table.values()) == {"ref", "torch"}
    reason = {row[0]: row[2] for row in select_kernels(torch.device("cuda")).explain()}["rms_norm"]
    assert "triton needs the package triton, which is not installed" in reason
    assert "cpu runs on cpu, not on cuda" in reason


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_backend_can_be_forced_and_has_the_operations_signature(operation):
    public = inspect.signature(operation.function).parameters
    for backend in operation.backends:
        if any(importlib.util.find_spec(package) is None for package in backend.requires):
            continue
        if backend.is_available(CPU)[0]:
            kernels = select_kernels(CPU, {operation.name: backend.name})
            assert kernels.table()[operation.name] == backend.name
            assert getattr(kernels, operation.name).keywords["backend"] is backend.load()
        parameters = list(inspect.signature(backend.load()).parameters.values())
        names = [name for name in public if name != "backend"]
        assert [parameter.name for parameter in parameters[: len(names)]] == names
        # Beyond the operation's own a backend may have settings, for its tuning and its tests.
        assert all(parameter.default is not parameter.empty for parameter in parameters[len(names) :])
    assert operation.backends[-1].name == "ref"
    assert operation.backends[-1].device_types == ()


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no operation is called 'mla_decod'; there are .*mla_decode"):
        select_kernels(CPU, {"mla_decod": "ref"})
    with pytest.raises(ValueError, match=r"mla_decode has no backend 'tritn'; it has .*ref"):
        select_kernels(CPU, {"mla_decode": "tritn"})


def test_a_forced_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr("dsengine.kernels.backend.importlib.util.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"'cpu' of mla_decode was asked for, but it runs on cpu, not on cuda"):
        select_kernels(torch.device("cuda"), {"mla_decode": "cpu"})


def test_availability_names_the_missing_package_and_the_probe_answers_last():
    missing = Backend("vendor", "nowhere:nothing", requires=("no_such_package_here",))
    assert missing.is_available(CPU) == (False, "needs the package no_such_package_here, which is not installed")
    refused = Backend("gluon", "nowhere:nothing", probe=lambda device: f"needs a GPU, not a {device.type}")
    assert refused.is_available(CPU) == (False, "needs a GPU, not a cpu")


def test_kernels_are_frozen_and_listed_once():
    kernels = select_kernels(CPU)
    with pytest.raises(AttributeError):
        kernels.rms_norm = kernels.rope  # type: ignore[misc,assignment]
    names = [operation.name for operation in OPERATIONS]
    assert len(names) == len(set(names))
    assert set(Kernels.__dataclass_fields__) == {*names, "choices"}


def test_every_operation_folder_is_registered():
    root = pathlib.Path(inspect.getfile(registry)).parent
    declared = {operation for folder in root.glob("*/api.py") for operation in _operations(folder.parent.name)}
    assert declared == {operation.name for operation in OPERATIONS}


def _operations(folder: str) -> list[str]:
    module = importlib.import_module(f"dsengine.kernels.{folder}.api")
    return [value.name for value in vars(module).values() if isinstance(value, Operation)]
