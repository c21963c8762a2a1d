"""Tokens to their experts and back over DeepEP, DeepSeek's own dispatch and combine (package `deep_ep`).

One buffer serves two sets of kernels. The normal ones are for many tokens: the host waits to learn how many arrive. The
low-latency ones are for few: every expert gets room for the most that could arrive, so that nobody waits and CUDA
graphs can hold them. They quantise on the way and weight the sums themselves.

DeepEP's `Buffer(group)` introduces the ranks to each other with pickled objects. Since 1.2.1 it takes a communicator of
mpi4py's form instead, of which it calls three methods; `TensorCommunicator` has these, and sends integers and bytes as
tensors. Names, limits and layouts as read in DeepEP 1.2.1 to 2.1.0. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from dsengine.parallel.collectives import Group
from dsengine.parallel.exchange import Combine, RoutedTokens

LOW_LATENCY_TOKENS = 128
"""Most tokens that a rank may bring to the low-latency kernels; V3's buffer for them takes 1.9 GB on every GPU."""

NUM_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)  # that the normal kernels are compiled for
LOW_LATENCY_HIDDEN_SIZES = (2048, 2560, 4096, 5120, 6144, 7168, 8192)
LOW_LATENCY_TOP_K = 11
RANKS_PER_NODE = 8
MOST_BYTES_BETWEEN_NODES = 2**31 - 1  # of the buffer that the normal kernels share with the low-latency ones
_ADVICE = "install it from github.com/deepseek-ai/DeepEP, or use --moe-exchange all_to_all"


def load_deep_ep() -> Any:
    """The package.

    Raises:
        ValueError: it cannot be imported, or would exchange pickled objects.
    """
    try:
        library = importlib.import_module("deep_ep")
    except Exception as error:  # it looks for nvcc and compares libraries while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"moe_exchange needs the package deep_ep, which does not import ({reason}); {_ADVICE}"
        ) from error
    if "comm" not in inspect.signature(library.Buffer.__init__).parameters:
        raise ValueError(
            f"deep_ep {_version()} is too old: its Buffer takes no communicator, and would exchange pickled objects; "
            f"it must be 1.2.1 or later: {_ADVICE}"
        )
    return library


def _version() -> str:
    try:
        return metadata.version("deep_ep")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def check_usable(device: torch.device, dtype: torch.dtype) -> None:
    """Prove that tokens of this kind can be moved, before any rank is started.

    Raises:
        ValueError: they cannot.
    """
    if device.type != "cuda":
        raise ValueError(
            f"moe_exchange is DeepEP's, which moves tokens between CUDA devices, but the device is {device.type}; use "
            "--moe-exchange all_to_all"
        )
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"dtype is {name}, but DeepEP adds up bfloat16 only; use --dtype bfloat16")
    load_deep_ep()


def find_problems(hidden_size: int, top_k: int, ranks: int, *, low_latency: bool) -> Iterator[str]:
    """What DeepEP's kernels are not compiled for, in words."""
    if ranks not in NUM_RANKS:
        yield f"DeepEP is compiled for {', '.join(map(str, NUM_RANKS))} ranks, not for {ranks}"
    if not low_latency:
        return
    instead = "(moe_exchange deepep_normal does without these kernels)"
    if hidden_size not in LOW_LATENCY_HIDDEN_SIZES:
        sizes = ", ".join(map(str, LOW_LATENCY_HIDDEN_SIZES))
        yield f"hidden_size is {hidden_size}, and DeepEP's low-latency kernels know {sizes} only {instead}"
    if top_k > LOW_LATENCY_TOP_K:
        most = LOW_LATENCY_TOP_K
        yield f"num_experts_per_tok is {top_k}, and DeepEP's low-latency kernels take up to {most} {instead}"


class TensorCommunicator:
    """What DeepEP calls of an mpi4py communicator. Nothing is pickled: what is sent is numbers and plain bytes.

    Args:
        device: where tensors must lie that the group sends.
    """

    _NOTHING, _NUMBER, _BYTES = range(3)

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group, self._device = group, device

    def Get_rank(self) -> int:
        return self._group.rank

    def Get_size(self) -> int:
        return self._group.size

    def allgather(self, item: int | bytes | bytearray | None) -> list[int | bytearray | None]:
        """The items of all ranks, in their order; bytes come back as bytearrays, which is what DeepEP's C++ takes.

        Raises:
            TypeError: it is of another type.
        """
        data = b""
        if item is None:
            head = [self._NOTHING, 0]
        elif isinstance(item, int):
            head = [self._NUMBER, item]
        elif isinstance(item, bytes | bytearray):
            data = bytes(item)
            head = [self._BYTES, len(data)]
        else:
            raise TypeError(f"an item of type {type(item).__name__} would have to be pickled; send an int or bytes")
        heads: list[list[int]] = self._gather(torch.tensor([head])).tolist()
        longest = max((value for kind, value in heads if kind == self._BYTES), default=0)
        payload = torch.zeros((1, longest), dtype=torch.uint8)
        payload[0, : len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        rows = self._gather(payload)
        return [
            bytearray(row[:value].tolist()) if kind == self._BYTES else value if kind == self._NUMBER else None
            for (kind, value), row in zip(heads, rows, strict=True)
        ]

    def _gather(self, row: Tensor) -> Tensor:
        return self._group.all_gather_rows(row.to(self._device)).cpu()


class DeepEp:
    """The buffer that all MoE layers of a model share; every rank calls the same methods in the same order.

    Args:
        world: all ranks.
        low_latency: also use the low-latency kernels.

    Raises:
        ValueError: the package cannot be used.
    """

    def __init__(self, world: Group, *, low_latency: bool) -> None:
        self._library = load_deep_ep()
        self._world = world
        self._wants_low_latency = low_latency
        self._sizes: tuple[int, int] | None = None
        self._buffer: Any = None
        self._needs_cleaning = False
        self.low_latency_tokens = 0

    def open(self, hidden_size: int, num_places: int, device: torch.device) -> None:
        """Take the memory and meet the other ranks, at the first call; all must be for the same sizes.

        Args:
            num_places: of experts, on all ranks.

        Raises:
            ValueError: the kernels or the network do not allow it.
        """
        if self._sizes is not None:
            assert self._sizes == (hidden_size, num_places), f"open for {self._sizes}, not {hidden_size}, {num_places}"
            return
        self._sizes = hidden_size, num_places
        buffer, size = self._library.Buffer, self._world.size
        try:
            configs = buffer.get_dispatch_config(size), buffer.get_combine_config(size)
            within = max(config.get_nvl_buffer_size_hint(2 * hidden_size, size) for config in configs)
            between = max(config.get_rdma_buffer_size_hint(2 * hidden_size, size) for config in configs)
            if self._wants_low_latency:
                self.low_latency_tokens, needed = self._room_for_low_latency()
                between = max(between, needed)
            self._buffer = buffer(
                None,
                within,
                between,
                low_latency_mode=self._wants_low_latency,
                # A queue for each local expert, or for each multiprocessor that the normal kernels use.
                num_qps_per_rank=max(buffer.num_sms, num_places // size),
                explicitly_destroy=True,  # a destructor would wait for ranks that may be gone; it goes with the process
                comm=TensorCommunicator(self._world, device),
            )
        except (RuntimeError, AssertionError, AttributeError) as error:
            # What its C++ and its Python raise; on PCIe cards it looks for links between the members of no group.
            raise ValueError(f"DeepEP cannot connect {size} ranks: {error}") from error

    def _room_for_low_latency(self) -> tuple[int, int]:
        """(tokens of each rank, bytes for them): fewer where the normal kernels could not address the buffer."""
        assert self._sizes is not None
        hidden_size, num_places = self._sizes
        tokens, size = LOW_LATENCY_TOKENS, self._world.size
        while True:
            needed: int = self._library.Buffer.get_low_latency_rdma_size_hint(tokens, hidden_size, size, num_places)
            if size <= RANKS_PER_NODE or needed < MOST_BYTES_BETWEEN_NODES:
                return tokens, needed
            tokens //= 2

    def dispatch(
        self, value: Tensor, quantised: tuple[Tensor, Tensor] | None, weights: Tensor, places: Tensor
    ) -> tuple[RoutedTokens, Combine]:
        """Bring tokens to experts by the normal kernels.

        Args:
            value: bfloat16 [n, h], this rank's share.
            quantised: FP8 codes [n, h] and float32 scales [n, ⌈h/128⌉] to send in its place.
            weights: float32 [n, K].
            places: int64 [n, K], counted over all ranks.

        Returns:
            (tokens that have experts here, with the numbers of this rank's places, -1 for others; what makes of this
            rank's results, bfloat16 [m, h], the sums over all ranks [n, h]).
        """
        assert self._sizes is not None
        _, num_places = self._sizes
        ids = self._ids(places)
        per_rank, per_node, per_place, is_in_rank, _ = self._buffer.get_dispatch_layout(ids, num_places)
        x, here, weights_here, _, handle, _ = self._buffer.dispatch(
            value.contiguous() if quantised is None else tuple(part.contiguous() for part in quantised),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_place,
            topk_idx=ids,
            topk_weights=weights.contiguous(),
        )
        self._needs_cleaning = self.low_latency_tokens > 0
        x, scale = x if isinstance(x, tuple) else (x, None)

        def combine(results: Tensor) -> Tensor:
            total: Tensor = self._buffer.combine(results.contiguous(), handle)[0]
            return total

        return RoutedTokens(x, scale, weights_here, here), combine

    def dispatch_low_latency(
        self, value: Tensor, weights: Tensor, places: Tensor, *, quantises: bool, rounds_scale: bool = False
    ) -> tuple[RoutedTokens, Combine]:
        """The same by the low-latency kernels, for up to `low_latency_tokens` of each rank.

        Every row that comes has one place, or none, and no weight: `combine` weights them. The rows of a place stand
        together, as many as could be, and those after the last that came hold anything.

        Args:
            quantises: what travels is FP8, quantised by DeepEP in groups of 128 from bfloat16.
            rounds_scale: to powers of two.
        """
        assert self._sizes is not None
        hidden_size, num_places = self._sizes
        self.clean()
        ids, weights = self._ids(places), weights.contiguous()
        x, counts, handle, _, _ = self._buffer.low_latency_dispatch(
            value.contiguous(),
            ids,
            self.low_latency_tokens,
            num_places,
            use_fp8=quantises,
            round_scale=quantises and rounds_scale,
        )
        x, scale = x if isinstance(x, tuple) else (x, None)
        room = x.shape[:2]
        row = torch.arange(room[1], device=x.device)
        place = torch.arange(room[0], device=x.device)
        here = torch.where(row < counts.unsqueeze(1), place.unsqueeze(1), -1)

        def combine(results: Tensor) -> Tensor:
            rows = results.view(*room, hidden_size)
            total: Tensor = self._buffer.low_latency_combine(rows, ids, weights, handle)[0]
            return total

        tokens = RoutedTokens(x.flatten(0, 1), None if scale is None else scale.flatten(0, 1), None, here.view(-1, 1))
        return tokens, combine

    def clean(self) -> None:
        """Leave nothing of the normal kernels where the low-latency ones count; before these run, replayed or not."""
        if self._needs_cleaning:
            assert self._sizes is not None
            self._buffer.clean_low_latency_buffer(self.low_latency_tokens, *self._sizes)
        self._needs_cleaning = False

    def _ids(self, places: Tensor) -> Tensor:
        return places.to(getattr(self._library, "topk_idx_t", torch.int64)).contiguous()
