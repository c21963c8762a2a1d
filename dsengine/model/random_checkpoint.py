"""Checkpoints with random weights in exactly the hub layout, for tests and for benchmarks of sizes nobody downloads.

Norm weights and the router's bias are random as well: initialised to ones and zeros, as trainers do, they would hide
every mistake in how they are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsengine.model.checkpoint import INDEX_FILE
from dsengine.model.config import ModelConfig
from dsengine.model.tensors import SCALE_SUFFIX, ExpectedTensor, expected_tensors, nextn_tensors
from dsengine.quant.block_fp8 import quantize_block_fp8

WEIGHT_STD = 0.05
BIAS_STD = 0.2
NORM_STD = 0.1


def write_random_checkpoint(
    folder: Path, hub_config: Mapping[str, Any], seed: int = 0, num_shards: int = 1
) -> ModelConfig:
    """Write config.json and shards of random weights.

    Weights are stored in the config's dtype, and as block FP8 where its `quantization_config` says so; with two or more
    shards every scale lies in another shard than its weight. A tensor's values depend on `seed` and its name alone.

    Args:
        folder: created if need be.
        hub_config: as in a config.json.
        num_shards: with more than one, an index file is written as well.

    Returns:
        the config, read back.

    Raises:
        ValueError: `hub_config` is not of a supported model, or `num_shards` is below 1.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards is {num_shards}; it must be at least 1")
    config = ModelConfig.from_hub(hub_config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(hub_config), indent=2), encoding="utf-8")
    tensors = expected_tensors(config)
    if config.num_nextn_predict_layers:
        tensors |= nextn_tensors(config)
    shards: list[dict[str, Tensor]] = [{} for _ in range(num_shards)]
    for position, tensor in enumerate(tensors.values()):
        for offset, (name, value) in enumerate(_stored(config, tensor, seed)):
            shards[(position + offset) % num_shards][name] = value
    write_shards(folder, shards)
    return config


def write_shards(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    """Write the tensors of each shard to its file, named as on the hub, and the index if there are several."""
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    total_size = sum(value.nbytes for shard in shards for value in shard.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _stored(config: ModelConfig, tensor: ExpectedTensor, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The tensor's random value as stored, followed by its scales where it is FP8."""
    value = _random_value(tensor, seed)
    if config.quantization is not None and tensor.may_be_fp8:
        codes, scale = quantize_block_fp8(value, config.quantization.weight_block_size, config.quantization.scale_fmt)
        yield tensor.name, codes
        yield tensor.name + SCALE_SUFFIX, scale
    elif tensor.name.endswith("e_score_correction_bias"):
        yield tensor.name, value
    else:
        stored_dtype: torch.dtype = getattr(torch, config.dtype)
        yield tensor.name, value.to(stored_dtype)


def _random_value(tensor: ExpectedTensor, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {tensor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.name.endswith("e_score_correction_bias"):
        return noise * BIAS_STD
    return 1 + noise * NORM_STD if len(tensor.shape) == 1 else noise * WEIGHT_STD
