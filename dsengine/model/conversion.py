"""A checkpoint written anew in another number format: block-FP8 weights as bfloat16, or unquantised ones as block FP8.

Tensor by tensor and in panels of rows, so that a 700 GB checkpoint passes through a small machine; into a folder that
gets its name only when everything is in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from dsengine.model.checkpoint import INDEX_FILE, CheckpointError, StoredTensor, read_checkpoint
from dsengine.model.config import ModelConfig, read_config_file
from dsengine.model.loader import check_scale, checked_tensors
from dsengine.model.manifest import MANIFEST_FILE, write_manifest
from dsengine.model.shard_writer import MAX_SHARD_BYTES, PlannedTensor, ShardWriter, cut_into_shards
from dsengine.model.tensors import FP8_DTYPE, SCALE_SUFFIX, expected_tensors, nextn_tensors, scale_shape
from dsengine.model.weights import FP8_BLOCK
from dsengine.quant.block_fp8 import ScaleFormat, dequantize_block_fp8, quantize_block_fp8

TargetFormat = Literal["fp8", "bf16"]
ProgressCallback = Callable[[int, int], None]

_PANEL_ROWS = 8 * FP8_BLOCK[0]
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "encoding/*.py")


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` wrote."""

    tensors: int
    converted: int
    shards: int
    bytes_read: int
    bytes_written: int


def convert_checkpoint(
    source: Path,
    target: Path,
    to: TargetFormat,
    scale_fmt: ScaleFormat | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressCallback | None = None,
) -> Conversion:
    """Write `source` in another format into the new folder `target`, with index, tokenizer files and manifest.

    Weights that DeepSeek's block-FP8 checkpoints quantise are converted (blocks of 128×128, float32 scales); every
    other tensor is copied as it is stored.

    Args:
        scale_fmt: of FP8 weights: "ue8m0" rounds scales up to powers of two.
        max_shard_bytes: a file holds no more tensors than fit, but at least one.
        progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: `source` cannot be loaded, or is in that format already.
        ValueError: `target` exists, or the options contradict each other.
    """
    config = ModelConfig.from_hub(source)
    _check_request(source, target, config, to, scale_fmt)
    checked_tensors(source, config)  # refuses what could not be loaded
    work = target.with_name(f"{target.name}.incomplete")
    try:
        work.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"{work} is left from a conversion that did not end; remove it first") from None
    try:
        conversion = _Writing(source, work, config, to, scale_fmt, progress).run(max_shard_bytes)
        _copy_others(source, work)
        _write_json(work / "config.json", _converted_config(read_config_file(source), to, scale_fmt))
        write_manifest(work)
        os.rename(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return conversion


def _check_request(
    source: Path, target: Path, config: ModelConfig, to: TargetFormat, scale_fmt: ScaleFormat | None
) -> None:
    if target.exists():
        raise ValueError(f"{target} exists; the converted checkpoint needs a folder of its own")
    if scale_fmt is not None and to != "fp8":
        raise ValueError(f"scale_fmt is {scale_fmt!r}; only FP8 weights have scales")
    if to == "bf16" and config.quantization is None:
        raise CheckpointError(f"{source} is not quantised; there is nothing to convert to bf16")
    if to == "fp8" and config.quantization is not None:
        raise CheckpointError(f"{source} is quantised already; to quantise it in another way, convert it to bf16 first")


class _Writing:
    """One pass over the tensors of a checkpoint, shard by shard of the result."""

    def __init__(
        self,
        source: Path,
        work: Path,
        config: ModelConfig,
        to: TargetFormat,
        scale_fmt: ScaleFormat | None,
        progress: ProgressCallback | None,
    ) -> None:
        self._stored = read_checkpoint(source)
        self._work = work
        self._to = to
        self._scale_fmt = scale_fmt
        source_quantization = config.quantization
        self._source_is_ue8m0 = source_quantization is not None and source_quantization.scale_fmt == "ue8m0"
        self._progress = progress
        table = expected_tensors(config)
        if config.num_nextn_predict_layers:
            table |= nextn_tensors(config)
        self._quantizable = {name for name, tensor in table.items() if tensor.may_be_fp8}
        self._total = sum(tensor.num_bytes for tensor in self._stored.values())
        self._done = 0

    def run(self, max_shard_bytes: int) -> Conversion:
        sources = [tensor for tensor in self._stored.values() if not self._is_scale_of_fp8(tensor)]
        shards = list(cut_into_shards((self._planned(tensor) for tensor in sources), max_shard_bytes))
        weight_map: dict[str, str] = {}
        for number, groups in enumerate(shards, start=1):
            single = len(shards) == 1
            name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):06d}.safetensors"
            self._write_shard(self._work / name, groups)
            weight_map |= {tensor.name: name for group in groups for tensor in group}
        written = sum(tensor.num_bytes for groups in shards for group in groups for tensor in group)
        if len(shards) > 1:
            _write_json(self._work / INDEX_FILE, {"metadata": {"total_size": written}, "weight_map": weight_map})
        return Conversion(
            tensors=len(sources),
            converted=sum(self._is_converted(tensor) for tensor in sources),
            shards=len(shards),
            bytes_read=self._total,
            bytes_written=written,
        )

    def _is_scale_of_fp8(self, tensor: StoredTensor) -> bool:
        weight = self._stored.get(tensor.name.removesuffix(SCALE_SUFFIX))
        return tensor.name.endswith(SCALE_SUFFIX) and weight is not None and weight.dtype == FP8_DTYPE

    def _is_converted(self, tensor: StoredTensor) -> bool:
        return tensor.dtype == FP8_DTYPE if self._to == "bf16" else tensor.name in self._quantizable

    def _planned(self, tensor: StoredTensor) -> list[PlannedTensor]:
        """What a stored tensor becomes; a weight in FP8 has its scales beside it."""
        if not self._is_converted(tensor):
            return [PlannedTensor(tensor.name, tensor.dtype, tensor.shape, tensor.num_bytes)]
        if self._to == "bf16":
            return [PlannedTensor.of(tensor.name, torch.bfloat16, tensor.shape)]
        scales = scale_shape(tensor.shape, FP8_BLOCK)
        return [
            PlannedTensor.of(tensor.name, torch.float8_e4m3fn, tensor.shape),
            PlannedTensor.of(tensor.name + SCALE_SUFFIX, torch.float32, scales),
        ]

    def _write_shard(self, file: Path, groups: list[list[PlannedTensor]]) -> None:
        with ExitStack() as stack:
            writer = stack.enter_context(ShardWriter(file, [tensor for group in groups for tensor in group]))
            # Reading a mapped file again and again is cheap, opening it parses its header: each is opened once a shard.
            files: dict[Path, Any] = {}
            for group in groups:
                tensor = self._stored[group[0].name]
                for path in {tensor.file, *self._scale_files(tensor)}:
                    if path not in files:
                        files[path] = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                self._write_tensor(writer, tensor, files)

    def _scale_files(self, tensor: StoredTensor) -> list[Path]:
        return [self._stored[tensor.name + SCALE_SUFFIX].file] if tensor.dtype == FP8_DTYPE else []

    def _write_tensor(self, writer: ShardWriter, tensor: StoredTensor, files: dict[Path, Any]) -> None:
        if not self._is_converted(tensor):
            writer.write(tensor.name, files[tensor.file].get_tensor(tensor.name))
        elif self._to == "bf16":
            self._write_dequantized(writer, tensor, files)
        else:
            self._write_quantized(writer, tensor, files)
        self._advance(tensor.num_bytes)

    def _write_dequantized(self, writer: ShardWriter, tensor: StoredTensor, files: dict[Path, Any]) -> None:
        stored_scale = self._stored[tensor.name + SCALE_SUFFIX]
        scale = files[stored_scale.file].get_tensor(stored_scale.name)
        check_scale(stored_scale, scale, powers_of_two=self._source_is_ue8m0)
        for rows, blocks, panel in _panels(tensor, files[tensor.file]):
            writer.write(tensor.name, dequantize_block_fp8(panel, scale[blocks]), rows.start * tensor.shape[1])
        self._advance(stored_scale.num_bytes)

    def _write_quantized(self, writer: ShardWriter, tensor: StoredTensor, files: dict[Path, Any]) -> None:
        scale_columns = scale_shape(tensor.shape, FP8_BLOCK)[1]
        for rows, blocks, panel in _panels(tensor, files[tensor.file]):
            try:
                codes, scale = quantize_block_fp8(panel, FP8_BLOCK, self._scale_fmt)
            except ValueError as error:
                raise CheckpointError(f"{tensor.file.name}: tensor {tensor.name!r}: {error}") from None
            writer.write(tensor.name, codes, rows.start * tensor.shape[1])
            writer.write(tensor.name + SCALE_SUFFIX, scale, blocks.start * scale_columns)

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _panels(tensor: StoredTensor, file: Any) -> Iterator[tuple[slice, slice, Tensor]]:
    """Whole rows of blocks of a stored matrix: their rows, their rows of scales, their values."""
    data = file.get_slice(tensor.name)
    for start in range(0, tensor.shape[0], _PANEL_ROWS):
        rows = slice(start, min(start + _PANEL_ROWS, tensor.shape[0]))
        yield rows, slice(start // FP8_BLOCK[0], -(-rows.stop // FP8_BLOCK[0])), data[rows]


def _converted_config(hub: dict[str, Any], to: TargetFormat, scale_fmt: ScaleFormat | None) -> dict[str, Any]:
    hub = {name: value for name, value in hub.items() if name != "quantization_config"}
    if to == "fp8":
        hub["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(FP8_BLOCK),
        } | ({} if scale_fmt is None else {"scale_fmt": scale_fmt})
    return hub


def _copy_others(source: Path, work: Path) -> None:
    """Tokenizer, generation config and the like; links are followed, as the hub's cache is made of links."""
    written_here = {"config.json", INDEX_FILE, MANIFEST_FILE}
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern)}):
        if path.is_file() and path.name not in written_here:
            place = work / path.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
