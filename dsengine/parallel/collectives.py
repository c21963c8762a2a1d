"""The collectives that a model's layers need, and how many bytes went into each.

A model always gets groups. `SingleProcess` hands every tensor back as it is, so that nothing above has to ask how many
ranks there are; `DistributedGroup` speaks over torch.distributed: gloo on CPU, NCCL on CUDA. Only tensors are sent,
never pickled objects. Rows are tokens: a collective that moves them works on the first dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames these two and warns of the old names.
_gather_rows = cast(Callable[..., Any], getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)
_reduce_scatter = cast(Callable[..., Any], getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)


@dataclass
class Traffic:
    """Bytes that a rank put into collectives since it was made: the size of its own contribution, whatever way the
    backend then takes to spread it. Of an all-to-all, only what goes to other ranks counts."""

    all_reduce_bytes: int = 0
    all_gather_bytes: int = 0
    reduce_scatter_bytes: int = 0
    all_to_all_bytes: int = 0
    broadcast_bytes: int = 0

    def copy(self) -> Traffic:
        """The counts of this moment."""
        return Traffic(**asdict(self))

    def since(self, earlier: Traffic) -> Traffic:
        """What was added since a `copy`."""
        before = asdict(earlier)
        return Traffic(**{name: count - before[name] for name, count in asdict(self).items()})


class Group(Protocol):
    """`size` ranks; this one is number `rank`. Every rank must call the same collectives in the same order."""

    rank: int
    size: int
    traffic: Traffic

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks; x, contiguous, may be overwritten. Shapes and dtypes are the same everywhere."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[N, C] of each rank, the same shape everywhere → [N, size · C], in the order of the ranks."""

    def all_gather_rows(self, x: Tensor) -> Tensor:
        """[N, ...] of each rank, the same shape everywhere → [size · N, ...], in the order of the ranks."""

    def reduce_scatter_rows(self, x: Tensor) -> Tensor:
        """[size · N, ...], the same shape everywhere → [N, ...], this rank's rows of the sum over the ranks."""

    def all_to_all_rows(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Rows to each rank from each rank; entered even where this rank has none.

        Args:
            x: [sum of `sent`, ...], ordered by the rank they go to.
            sent, received: rows by rank.

        Returns:
            [sum of `received`, ...], ordered by the rank they came from.
        """

    def broadcast(self, x: Tensor) -> Tensor:
        """The first rank's x for all, in place; x is contiguous and of the same shape and dtype everywhere."""


class SingleProcess:
    """The group of a process that runs the whole model."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.traffic = Traffic()

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def all_gather_rows(self, x: Tensor) -> Tensor:
        return x

    def reduce_scatter_rows(self, x: Tensor) -> Tensor:
        return x

    def all_to_all_rows(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        return x


class DistributedGroup:
    """The ranks of a process group of torch.distributed.

    Args:
        handle: None: all ranks of the process.
    """

    def __init__(self, handle: dist.ProcessGroup | None = None) -> None:
        self._handle = handle
        self.rank, self.size = dist.get_rank(handle), dist.get_world_size(handle)
        self.traffic = Traffic()

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.numel() > 0:
            self.traffic.all_reduce_bytes += x.nbytes
            dist.all_reduce(x, group=self._handle)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_empty((x.shape[0], self.size * x.shape[1]))
        rows = self.all_gather_rows(x.contiguous())
        return rows.view(self.size, *x.shape).transpose(0, 1).reshape(x.shape[0], -1)

    def all_gather_rows(self, x: Tensor) -> Tensor:
        gathered = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        if x.numel() > 0:
            self.traffic.all_gather_bytes += x.nbytes
            _gather_rows(gathered, x.contiguous(), group=self._handle)
        return gathered

    def reduce_scatter_rows(self, x: Tensor) -> Tensor:
        assert x.shape[0] % self.size == 0, f"{x.shape[0]} rows cannot be dealt to {self.size} ranks"
        own = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        if x.numel() > 0:
            self.traffic.reduce_scatter_bytes += x.nbytes
            _reduce_scatter(own, x.contiguous(), group=self._handle)
        return own

    def all_to_all_rows(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        arrived = x.new_empty((sum(received), *x.shape[1:]))
        if x.shape[0]:
            self.traffic.all_to_all_bytes += x.nbytes // x.shape[0] * (x.shape[0] - sent[self.rank])
        dist.all_to_all_single(arrived, x.contiguous(), list(received), list(sent), group=self._handle)
        return arrived

    def broadcast(self, x: Tensor) -> Tensor:
        if x.numel() > 0:
            if self.rank == 0:
                self.traffic.broadcast_bytes += x.nbytes
            dist.broadcast(x, group_src=0, group=self._handle)
        return x


def new_group(ranks: Sequence[int], backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """A process group of some ranks; all ranks make all groups, in the same order."""
    group = dist.new_group(list(ranks), timeout, backend)
    return cast(dist.ProcessGroup, group)


class ControlGroup:
    """What all ranks say to each other on the host, in small messages over gloo whatever the device is.

    Args:
        handle: of all ranks.
    """

    MAX_BYTES = 1 << 30
    _HEAD = 4096  # bytes of the first packet of a broadcast: mostly the only one
    _LENGTH = 8

    def __init__(self, handle: dist.ProcessGroup) -> None:
        self._handle = handle
        self._rank, self._size = dist.get_rank(handle), dist.get_world_size(handle)

    def broadcast_bytes(self, data: bytes | None, src: int = 0) -> bytes:
        """`data` of rank `src` (ignored on others) for all.

        Raises:
            ValueError: it is longer than `MAX_BYTES`.
        """
        room = self._HEAD - self._LENGTH
        head = bytearray(self._HEAD)
        if self._rank == src:
            assert data is not None, "the rank that tells has something to tell"
            self._check_length(len(data))
            head[: self._LENGTH] = len(data).to_bytes(self._LENGTH, "little")
            head[self._LENGTH : self._LENGTH + min(len(data), room)] = data[:room]
        dist.broadcast(_as_tensor(head), group_src=src, group=self._handle)
        length = int.from_bytes(head[: self._LENGTH], "little")
        self._check_length(length)
        rest = bytearray(data[room:] if self._rank == src and data is not None else max(0, length - room))
        if rest:
            dist.broadcast(_as_tensor(rest), group_src=src, group=self._handle)
        return bytes(head[self._LENGTH : self._LENGTH + min(length, room)] + rest)

    def gather_bytes(self, data: bytes, dst: int = 0) -> list[bytes] | None:
        """What every rank has to say to rank `dst`, in the order of the ranks; None on all others.

        Raises:
            ValueError: it is longer than `MAX_BYTES`.
        """
        self._check_length(len(data))
        lengths = [length for [length] in self.all_gather_ints([len(data)])]
        if self._rank != dst:
            if data:
                dist.send(_as_tensor(bytearray(data)), group_dst=dst, group=self._handle)
            return None
        gathered = []
        for rank, length in enumerate(lengths):
            self._check_length(length)
            message = bytearray(data if rank == dst else length)
            if rank != dst and length:
                dist.recv(_as_tensor(message), group_src=rank, group=self._handle)
            gathered.append(bytes(message))
        return gathered

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """The same number of integers of every rank (64 bits), in the order of the ranks."""
        own = torch.tensor(list(values), dtype=torch.int64)
        gathered = torch.empty(self._size * len(own), dtype=torch.int64)
        if len(own):
            _gather_rows(gathered, own, group=self._handle)
        rows: list[list[int]] = gathered.view(self._size, len(own)).tolist()
        return rows

    def _check_length(self, length: int) -> None:
        if not 0 <= length <= self.MAX_BYTES:
            raise ValueError(f"a message between ranks has {length} bytes; at most {self.MAX_BYTES} are sent")


def _as_tensor(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)
