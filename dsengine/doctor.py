"""`dsengine doctor`: what this machine offers, and which backend serves each operation and why.

Most reports of a slow or failing server are explained by this page: a torch built without CUDA, a vendor package that
does not import, a checkpoint that was cut off while it was copied.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsengine import __version__
from dsengine.cli_flags import build_config
from dsengine.config import EngineConfig
from dsengine.engine.build import resolve_device, resolve_dtype
from dsengine.kernels.registry import select_kernels
from dsengine.model.checkpoint import CheckpointError, read_checkpoint, resolve_checkpoint
from dsengine.model.config import ModelConfig
from dsengine.progress import table_console
from dsengine.tokenizer.tokenizer import Tokenizer

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "huggingface_hub", "msgspec", "pyzmq", "fastapi")
_OPTIONAL = {
    "flashinfer": "attention and sampling on NVIDIA GPUs; pip install 'dsengine[cuda]'",
    "deep_gemm": "FP8 matrix products on Hopper and later; install from github.com/deepseek-ai/DeepGEMM",
    "deep_ep": "exchange of tokens between ranks (--moe-exchange deepep); install from github.com/deepseek-ai/DeepEP",
    "flash_attn": "prefill on NVIDIA GPUs (--kernel mla_prefill=flash_attn); pip install flash-attn",
    "flash_mla": "MLA attention on Hopper and later; install from github.com/deepseek-ai/FlashMLA",
}
_GIB = 2**30


def run_doctor(args: argparse.Namespace) -> int:
    """The `doctor` sub-command; returns 0, or 2 when the checkpoint cannot be served."""
    report = examine(build_config(args, EngineConfig))
    if args.json:
        print(json.dumps(report))
    else:
        _print_report(report)
    return 2 if "error" in report["checkpoint"] else 0


def examine(config: EngineConfig) -> dict[str, Any]:
    """Everything `doctor` knows, as plain data.

    Raises:
        ValueError: the device or a forced backend does not exist here.
    """
    device = resolve_device(config.device)
    kernels = select_kernels(device, config.forced_kernels)
    return {
        "machine": describe_machine(),
        "versions": {"dsengine": __version__, "python": platform.python_version(), **_versions()},
        "devices": describe_devices(),
        "engine": {"device": str(device), "dtype": str(resolve_dtype(config.dtype, device)).removeprefix("torch.")},
        "operations": [
            {"operation": operation, "backend": backend, "reason": reason}
            for operation, backend, reason in kernels.explain()
        ],
        "optional_packages": {name: _try_import(name) | {"use": use} for name, use in _OPTIONAL.items()},
        "checkpoint": describe_checkpoint(config),
    }


def describe_machine() -> dict[str, Any]:
    page = os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * page / _GIB, 1),
        "memory_free_gib": round(os.sysconf("SC_AVPHYS_PAGES") * page / _GIB, 1),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found | {"cuda_of_torch": torch.version.cuda}


def describe_devices() -> list[dict[str, Any]]:
    """The CUDA devices torch sees, with their compute capability and memory."""
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": round(total / _GIB, 1),
                "memory_free_gib": round(free / _GIB, 1),
            }
        )
    return devices


def _try_import(name: str) -> dict[str, Any]:
    if importlib.util.find_spec(name) is None:
        return {"importable": False, "detail": "not installed"}
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a vendor package may fail in any way; that is what the user wants to read
        return {"importable": False, "detail": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    version = getattr(module, "__version__", None)
    if version is None:
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)
    return {"importable": True, "detail": str(version or "installed")}


def describe_checkpoint(config: EngineConfig) -> dict[str, Any]:
    """What a checkpoint is and whether it is whole: headers, sizes, configuration and tokenizer; no weight is read."""
    try:
        folder = resolve_checkpoint(config.model_or_demo, config.revision)
        model = ModelConfig.from_hub(folder)
        tensors = read_checkpoint(folder)
        tokenizer = Tokenizer.from_checkpoint(folder)
    except (CheckpointError, ValueError, OSError) as error:
        return {"model": config.model, "error": str(error)}
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.num_bytes
    return {
        "model": config.model,
        "folder": str(folder),
        "model_type": model.model_type,
        "layers": model.num_hidden_layers,
        "nextn_layers": model.num_nextn_predict_layers,
        "routed_experts": model.n_routed_experts,
        "context_length": model.max_position_embeddings,
        "vocab_size": model.vocab_size,
        "tokenizer_size": tokenizer.vocab_size,
        "block_fp8": model.quantization is not None,
        "tensors": len(tensors),
        "bytes_by_dtype": dict(sizes),
        "bytes": sum(sizes.values()),
    }


def _print_report(report: dict[str, Any]) -> None:
    console = table_console()
    _print_pairs(console, "machine", report["machine"])
    _print_pairs(console, "versions", report["versions"])
    for device in report["devices"]:
        _print_pairs(console, device["device"], device)
    if not report["devices"]:
        console.print("no CUDA device; the engine runs on the CPU\n")
    engine = report["engine"]
    table = Table(title=f"operations on {engine['device']} in {engine['dtype']}", title_justify="left")
    for heading in ("operation", "backend", "why"):
        table.add_column(heading, overflow="fold")
    for row in report["operations"]:
        table.add_row(row["operation"], row["backend"], escape(row["reason"]))
    console.print(table)
    packages = {name: f"{found['detail']} ({found['use']})" for name, found in report["optional_packages"].items()}
    _print_pairs(console, "optional packages", packages)
    _print_pairs(console, "checkpoint", report["checkpoint"])


def _print_pairs(console: Console, title: str, pairs: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name.replace("_", " "), "-" if value is None else escape(str(value)))
    console.print(table)
