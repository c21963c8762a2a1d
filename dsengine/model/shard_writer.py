"""Writing safetensors shards whose tensors are made one after another, so that memory holds one of them at a time.

The safetensors library writes a file from a dictionary of finished tensors, a whole shard in memory. All a file needs
beforehand are names, types and shapes: with these the header is written, every tensor has its place, and its bytes may
come in any order and in pieces.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from dsengine.model.checkpoint import ITEM_BYTES

MAX_SHARD_BYTES = 5 * 10**9
"""As checkpoints on the Hugging Face hub are cut."""

_DTYPES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written; `dtype` is spelled as safetensors does."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> PlannedTensor:
        return cls(name, _DTYPES[dtype], shape, math.prod(shape) * dtype.itemsize)


def cut_into_shards(groups: Iterable[list[PlannedTensor]], max_bytes: int) -> Iterator[list[list[PlannedTensor]]]:
    """Groups of tensors (a weight and its scales) in their order, cut where a shard would become too large.

    A group that is larger than `max_bytes` gets a shard of its own.
    """
    shard: list[list[PlannedTensor]] = []
    size = 0
    for group in groups:
        added = sum(tensor.num_bytes for tensor in group)
        if shard and size + added > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(group)
        size += added
    if shard:
        yield shard


class ShardWriter:
    """One safetensors file: header first, then the bytes of its tensors in any order. A context manager."""

    def __init__(self, file: Path, tensors: list[PlannedTensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        # Wide types first, as the library does: then each tensor starts at a multiple of its item size.
        for tensor in sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype]):
            begin, end = end, end + tensor.num_bytes
            self._places[tensor.name] = (begin, end)
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._start = 8 + len(raw)
        self._size = self._start + end
        self._stream: BinaryIO = file.open("xb")
        self._stream.write(struct.pack("<Q", len(raw)) + raw)
        self._missing = end

    def write(self, name: str, value: Tensor, element: int = 0) -> None:
        """Write consecutive elements of a tensor, the first of them number `element`."""
        data = value.contiguous().view(-1).view(torch.uint8).numpy()
        begin, end = self._places[name]
        begin += element * value.element_size()
        assert begin + data.nbytes <= end, f"{name} has more elements than planned"
        self._stream.seek(self._start + begin)
        self._stream.write(data.data)
        self._missing -= data.nbytes

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        assert error is not None or not self._missing, f"{self._missing} bytes were never written"
