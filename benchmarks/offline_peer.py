"""Hugging Face transformers on the same checkpoint, measured as our engine is: prefill, then greedy decode.

transformers cannot run block-FP8 weights on a CPU, so it gets the checkpoint dequantised; the arithmetic it does is the
one our engine does in float32, and the tokens must agree.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsengine.cli_bench import Speed
from dsengine.quant.block_fp8 import dequantize_block_fp8

_SCALE = "_scale_inv"


def write_dequantized(source: Path, target: Path) -> None:
    """Write a float32 copy of a checkpoint without quantisation and without NextN layers, which transformers lacks.

    Shards are read one at a time, weights and scales are looked up across shards.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    block = tuple((config.pop("quantization_config", None) or {}).get("weight_block_size", (128, 128)))
    num_layers = config["num_hidden_layers"]
    config["num_nextn_predict_layers"] = 0
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    place: dict[str, Path] = {}
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            place |= dict.fromkeys(file.keys(), shard)
    for index, shard in enumerate(sorted(set(place.values()))):
        tensors: dict[str, torch.Tensor] = {}
        for name in (name for name, holder in place.items() if holder == shard):
            if name.endswith(_SCALE) or _layer_of(name) >= num_layers:
                continue
            tensor = _read(place, name)
            if name + _SCALE in place:
                tensor = dequantize_block_fp8(tensor, _read(place, name + _SCALE).float(), block, torch.float32)
            tensors[name] = tensor.float().contiguous()
        if tensors:
            save_file(tensors, target / f"model-{index:05d}.safetensors", metadata={"format": "pt"})
    _write_index(target)


def _read(place: dict[str, Path], name: str) -> torch.Tensor:
    with safe_open(place[name], framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _layer_of(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if name.startswith("model.layers.") else -1


def _write_index(folder: Path) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), shard.name)
        total += shard.stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


class TransformersModel:
    """The peer.

    Args:
        folder: a checkpoint that transformers can load.
        attention: "sdpa" or "eager".
    """

    def __init__(self, folder: Path, attention: str) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.version = transformers.__version__
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        ).eval()

    @torch.inference_mode()
    def measure(self, prompts: list[list[int]], output_len: int) -> tuple[Speed, list[list[int]]]:
        """Time the prefill of a batch of prompts of one length and its greedy decode; returns the token ids too."""
        started = time.perf_counter()
        output = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        tokens = [token]
        for _ in range(output_len - 1):
            output = self._model(token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token)
        ended = time.perf_counter()
        speed = Speed(len(prompts) * len(prompts[0]), first - started, len(prompts) * (output_len - 1), ended - first)
        return speed, torch.cat(tokens, dim=1).tolist()
