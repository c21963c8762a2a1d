"""Filling a model from a checkpoint, tensor by tensor, from files that are mapped rather than read.

Everything that headers can tell is checked before the first weight is touched; then every parameter is filled exactly
once, each stored tensor going straight to its place in a stacked or fused parameter. Memory peaks at the weights plus
the pages of one shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsengine.kernels.registry import Kernels
from dsengine.model.activations import ActivationFormat
from dsengine.model.checkpoint import CheckpointError, StoredTensor, raise_problems, read_checkpoint
from dsengine.model.config import ModelConfig
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.sharding import check_layout
from dsengine.model.tensors import (
    FP8_DTYPE,
    SCALE_SUFFIX,
    ExpectedTensor,
    expected_tensors,
    is_recomputed,
    nextn_copies,
    nextn_tensors,
)
from dsengine.model.validation import find_mismatches
from dsengine.model.weights import FP8_BLOCK, WeightSlots
from dsengine.parallel.layout import Layout
from dsengine.quant.block_fp8 import dequantize_block_fp8, is_ue8m0

ProgressCallback = Callable[[int, int], None]
WeightFormat = Literal["auto", "fp8", "dequantized"]
FormatOfActivations = Literal["auto", "fp8", "float"]


def load_model(
    path: Path,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weight_format: WeightFormat = "auto",
    activation_format: FormatOfActivations = "auto",
    kernels: Kernels,
    progress: ProgressCallback | None = None,
    layout: Layout | None = None,
) -> DeepseekModel:
    """Build the model of a checkpoint folder and fill it.

    The NextN layer is loaded if the config announces one and the files hold one (conversions often drop it).

    Args:
        path: local folder, as from `resolve_checkpoint`.
        config: of the same folder.
        dtype: of activations and of weights that are not FP8; bfloat16 or float32 (V3's activations overflow float16).
        weight_format: "fp8" keeps block-FP8 weights and their scales as stored (but kv_b_proj); "dequantized" converts
            them to `dtype`; "auto" keeps them where the device computes in FP8 (compute capability 8.9 and above).
        activation_format: what layers whose weights stay FP8 take as input: "fp8", quantised in groups of 128 channels,
            or "float", in `dtype`; "auto" is FP8 where the device computes in FP8.
        progress: called with (bytes loaded, bytes in all) after each tensor, counted as if each were read whole.
        layout: how the model is spread over ranks, of which each reads its own part only; None: it is not.

    Raises:
        CheckpointError: the files do not hold what the config says; all mismatches are listed, up to ten in full.
        ValueError: `dtype` is not supported, or the model cannot be spread so.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype is {dtype}; it must be torch.bfloat16 or torch.float32")
    used, expected, with_nextn = _checked_tensors(path, config)
    fp8_weights = frozenset(name for name, tensor in used.items() if tensor.dtype == FP8_DTYPE)
    keep_fp8, activations = resolve_formats(weight_format, activation_format, device, config)
    layout = layout or Layout()
    check_layout(
        config,
        tp_size=layout.world.size,
        attn_dp_size=layout.dp_size,
        experts_whole=layout.experts_whole,
        keeps_fp8=keep_fp8,
        moe_exchange=layout.moe_exchange,
        redundant_experts=layout.redundant_experts,
        dense_over_world=layout.dense_over_world,
    )
    slots = WeightSlots(device, dtype, fp8_weights if keep_fp8 else frozenset(), activations, layout)
    model = DeepseekModel(slots, kernels, config, with_nextn)
    assert slots.by_name.keys() | slots.elsewhere == expected.keys(), (
        "the model's parameters and the table of tensors disagree"
    )
    used = {name: tensor for name, tensor in used.items() if name.removesuffix(SCALE_SUFFIX) in slots.by_name}
    _Filling(slots, used, activations.scale_fmt == "ue8m0", progress).run()
    return model


def prepare_refill(model: DeepseekModel, path: Path) -> Callable[[], None]:
    """Prove that another checkpoint can take the place of a model's weights; what is returned then fills them.

    Raises:
        ValueError: it is of another architecture, shape or type, or not in order. The model is as it was.
    """
    config = ModelConfig.from_hub(path)
    for field in dataclasses.fields(config):
        new, old = getattr(config, field.name), getattr(model.config, field.name)
        if new != old:
            raise ValueError(f"{field.name} of the new weights is {new}; the model that is loaded has {old}")
    used, _, with_nextn = _checked_tensors(path, config)
    if with_nextn != (model.nextn is not None):
        has, needs = ("a", "none") if with_nextn else ("no", "one")
        raise ValueError(f"the new weights have {has} NextN layer; the model that is loaded has {needs}")
    slots = model.slots
    for name, slot in slots.by_name.items():
        if slot.scale is not None and used[name].dtype != FP8_DTYPE:
            raise ValueError(f"{name} of the new weights is {used[name].dtype}; the model that is loaded holds FP8")
    used = {name: tensor for name, tensor in used.items() if name.removesuffix(SCALE_SUFFIX) in slots.by_name}
    filling = _Filling(slots, used, slots.activations.scale_fmt == "ue8m0", None)
    filling.check_scales()
    return filling.run


def checked_tensors(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors that `load_model` would read, by name, proven to be what the config says.

    Raises:
        CheckpointError: they are not.
    """
    return _checked_tensors(path, config)[0]


def _checked_tensors(
    path: Path, config: ModelConfig
) -> tuple[dict[str, StoredTensor], dict[str, ExpectedTensor], bool]:
    stored = read_checkpoint(path)
    expected = expected_tensors(config)
    nextn = nextn_tensors(config) if config.num_nextn_predict_layers else {}
    with_nextn = any(name in stored for name in nextn)
    if with_nextn:
        expected |= nextn
    unused = {name for name in stored if is_recomputed(name)} | nextn_copies(config).keys()
    raise_problems(find_mismatches(stored, expected, unused, config.quantization), path)
    return {name: tensor for name, tensor in stored.items() if name not in unused}, expected, with_nextn


def resolve_formats(
    weight_format: WeightFormat, activation_format: FormatOfActivations, device: torch.device, config: ModelConfig
) -> tuple[bool, ActivationFormat]:
    """(whether block-FP8 weights stay FP8 in memory, what their layers take as input), as `load_model` will do it."""
    automatic = _computes_fp8(device)
    keep_fp8 = weight_format == "fp8" or (weight_format == "auto" and automatic)
    fp8_input = activation_format == "fp8" or (activation_format == "auto" and automatic)
    scale_fmt = None if config.quantization is None else config.quantization.scale_fmt
    return keep_fp8, ActivationFormat(is_fp8=keep_fp8 and fp8_input, scale_fmt=scale_fmt)


def _computes_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class _Filling:
    """One pass over the shards of a checkpoint whose headers have been checked."""

    def __init__(
        self,
        slots: WeightSlots,
        stored: dict[str, StoredTensor],
        scales_are_powers_of_two: bool,
        progress: ProgressCallback | None,
    ) -> None:
        self._slots = slots.by_name
        self._stored = stored
        self._scales_are_powers_of_two = scales_are_powers_of_two
        self._progress = progress
        self._scales: dict[str, Tensor] = {}  # of weights that are dequantised: they may lie in a later shard
        self._done_bytes = 0
        self._total_bytes = sum(tensor.num_bytes for tensor in stored.values())
        self._unfilled = set(slots.by_name)

    def run(self) -> None:
        self._read_all(self._fill_scale, scales=True)
        self._read_all(self._fill_weight, scales=False)
        assert not self._unfilled, f"never filled: {sorted(self._unfilled)[:10]}"

    def check_scales(self) -> None:
        """Read all scales of FP8 weights, before anything is written.

        Raises:
            CheckpointError: one cannot be meant.
        """
        self._read_all(partial(check_scale, powers_of_two=self._scales_are_powers_of_two), scales=True)

    def _read_all(self, use: Callable[[StoredTensor, Tensor], None], *, scales: bool) -> None:
        """Read all scales, or all weights, file by file."""
        by_file: dict[Path, list[StoredTensor]] = {}
        for tensor in self._stored.values():
            if tensor.name.endswith(SCALE_SUFFIX) == scales:
                by_file.setdefault(tensor.file, []).append(tensor)
        for file, tensors in by_file.items():
            with _naming(file), safe_open(file, framework="pt", device="cpu") as data:
                for tensor in tensors:
                    cut = self._cut(tensor)
                    use(tensor, data.get_tensor(tensor.name) if cut is None else data.get_slice(tensor.name)[cut])
                    self._advance(tensor)

    def _advance(self, tensor: StoredTensor) -> None:
        self._done_bytes += tensor.num_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)

    def _cut(self, tensor: StoredTensor) -> tuple[slice, ...] | None:
        """What to read of a stored tensor, None for all: FP8 weights in whole blocks, scales of just these blocks."""
        cut = self._slots[tensor.name.removesuffix(SCALE_SUFFIX)].cut
        if cut is None:
            return None
        if tensor.name.endswith(SCALE_SUFFIX):
            return tuple(_blocks(part, size) for part, size in zip(cut, FP8_BLOCK, strict=False))
        if tensor.dtype != FP8_DTYPE:
            return cut
        blocks = [_blocks(part, size) for part, size in zip(cut, FP8_BLOCK, strict=False)]
        ends = [min(b.stop * size, n) for b, size, n in zip(blocks, FP8_BLOCK, tensor.shape, strict=False)]
        return tuple(slice(b.start * size, end) for b, size, end in zip(blocks, FP8_BLOCK, ends, strict=False))

    def _fill_scale(self, tensor: StoredTensor, scale: Tensor) -> None:
        check_scale(tensor, scale, powers_of_two=self._scales_are_powers_of_two)
        weight = tensor.name.removesuffix(SCALE_SUFFIX)
        slot = self._slots[weight]
        if slot.scale is not None:
            slot.scale.copy_(scale)
        else:
            self._scales[weight] = scale.to(slot.weight.device, copy=True)

    def _fill_weight(self, tensor: StoredTensor, weight: Tensor) -> None:
        slot = self._slots[tensor.name]
        self._unfilled.remove(tensor.name)
        if tensor.dtype == FP8_DTYPE and slot.scale is None:
            scale = self._scales.pop(tensor.name)
            weight = dequantize_block_fp8(weight.to(slot.weight.device), scale, dtype=slot.weight.dtype)
            if slot.cut is not None:
                weight = weight[_within_blocks(slot.cut)]
        slot.weight.copy_(weight)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:  # it was in order when its header was checked
        raise CheckpointError(f"{file.name} can no longer be read: {error}") from error


def check_scale(tensor: StoredTensor, scale: Tensor, *, powers_of_two: bool) -> None:
    """Refuse scales of FP8 weights that cannot be meant.

    Raises:
        CheckpointError: a scale is not finite or not above 0, or no power of two where all must be.
    """
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(
            f"{tensor.file.name}: tensor {tensor.name!r} expected finite scales above 0, "
            f"found values from {scale.min().item()} to {scale.max().item()}"
        )
    if powers_of_two and not is_ue8m0(scale):
        raise CheckpointError(
            f"{tensor.file.name}: tensor {tensor.name!r} expected powers of two (scale_fmt is ue8m0), "
            f"found {_not_power_of_two(scale)}"
        )


def _blocks(part: slice, size: int) -> slice:
    """The blocks that hold a part of a dimension."""
    return slice(part.start // size, -(-part.stop // size))


def _within_blocks(cut: tuple[slice, ...]) -> tuple[slice, ...]:
    """The same region, counted from the first element of the first block that holds some of it."""
    firsts = [part.start // size * size for part, size in zip(cut, FP8_BLOCK, strict=False)]
    return tuple(slice(part.start - first, part.stop - first) for part, first in zip(cut, firsts, strict=True))


def _not_power_of_two(scale: Tensor) -> float:
    values: list[float] = scale.flatten().tolist()
    return next(value for value in values if not is_ue8m0(torch.tensor([value])))
