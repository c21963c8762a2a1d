"""What `deep_ep` promises, over any process group: signatures, checks, dtypes and layouts as its sources document them.

Kernels are replaced by gathering everything everywhere. Rows that nobody may read are NaN. Unlike the real ones they
also take float32, so that sums can be compared closely, small hidden sizes, and any number of ranks on a node.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from dsengine.kernels.quant_fp8_group.ref import quant_fp8_group_ref
from dsengine.parallel.collectives import Group

topk_idx_t = torch.int64
ranks_per_node = 8
in_graph = False  # what runs now is replayed
calls: Counter[str] = Counter()
HIDDEN_SIZES = (2048, 2560, 4096, 5120, 6144, 7168, 8192, 32, 64, 128, 192, 256)
HANDLE, UNIQUE_ID = 64, 128  # bytes


def require(condition: bool, what: str) -> None:
    """As EP_HOST_ASSERT."""
    if not condition:
        raise RuntimeError(f"Failed: Assertion error fake_deep_ep.py '{what}'")


class Config:
    def __init__(self, num_sms: int) -> None:
        self.num_sms = num_sms

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 128 * self.num_sms * hidden_bytes * min(num_ranks, ranks_per_node)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0 if num_ranks <= ranks_per_node else 256 * self.num_sms * hidden_bytes


class Buffer:
    num_sms = 20

    def __init__(
        self,
        group: None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        require(group is None and comm is not None, "this group would pickle")
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._low_latency_mode, self._num_rdma_bytes = low_latency_mode, num_rdma_bytes
        require(num_nvl_bytes % 128 == 0 and num_rdma_bytes % 128 == 0 and num_nvl_bytes > 0, "alignment")
        require(num_rdma_bytes == 0 or self._is_internode or low_latency_mode, "num_rdma_bytes")
        require(num_qps_per_rank >= (self.num_sms if self._is_internode else 1), "num_rc_per_pe")
        self._num_qps = num_qps_per_rank
        require(comm.allgather(self.rank) == list(range(self.size)), "device ids")
        handles = comm.allgather(bytearray([self.rank] * HANDLE))
        require(all(type(h) is bytearray and h == bytes([r] * HANDLE) for r, h in enumerate(handles)), "handles")
        if self._is_internode or low_latency_mode:
            ids = comm.allgather(bytearray(range(UNIQUE_ID)) if self.rank == 0 else None)
            require(type(ids[0]) is bytearray and ids == [bytes(range(UNIQUE_ID)), *[None] * (self.size - 1)], "ids")
        self._group: Group = comm._group
        self._is_dirty = False
        self._most_tokens: int | None = None
        self._pending: object = None

    @property
    def _is_internode(self) -> bool:
        return bool(self.size > ranks_per_node)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms)

    get_combine_config = get_dispatch_config

    @staticmethod
    def get_low_latency_rdma_size_hint(tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
        message = hidden // 128 * 4 + 2 * hidden
        return (4 * num_experts * tokens * message + 2 * 4 * num_experts + 128) // 128 * 128

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        require(topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == topk_idx_t, "topk_idx")
        in_rank = self._in_rank(topk_idx, num_experts)
        per_node = None
        if self._is_internode:
            per_node = in_rank.unflatten(1, (-1, ranks_per_node)).any(2).sum(0, dtype=torch.int32)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0].long(), minlength=num_experts).int()
        return in_rank.sum(0, dtype=torch.int32), per_node, per_expert, in_rank, None

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor, list[int], tuple[Any, ...], None]:
        value, scales = x if isinstance(x, tuple) else (x, None)
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None
        require(not in_graph, "the host would wait while a graph is replayed")
        require(value.dim() == 2 and value.is_contiguous(), "x")
        require(value.dtype in ((torch.float8_e4m3fn,) if scales is not None else FLOATS), "x's type")
        require(value.shape[1] * value.element_size() % 16 == 0, "int4")
        require((num_tokens_per_rdma_rank is not None) == self._is_internode, "num_tokens_per_rdma_rank")
        self._check_routing(value, topk_idx, topk_weights)
        num_experts = len(num_tokens_per_expert)
        require(bool((is_token_in_rank == self._in_rank(topk_idx, num_experts)).all()), "is_token_in_rank")
        calls["normal"] += 1
        self._is_dirty = True
        sources, taken = self._gathered((value, scales, topk_idx, topk_weights)), []
        rows: list[tuple[Tensor, ...]] = []
        here = num_experts // self.size
        for source, (their_value, their_scales, ids, weights) in enumerate(sources):
            local = ids - self.rank * here
            local = torch.where((local >= 0) & (local < here), local, -1)
            token = (local >= 0).any(1).nonzero().squeeze(1)
            taken.append((source, token, len(their_value)))
            kept = weights.masked_fill(local < 0, 0.0)
            rows.append((their_value[token], their_scales[token], local[token], kept[token]))
        received, received_scales, local, weights = (torch.cat(part) for part in zip(*rows, strict=True))
        counts = torch.bincount(local[local >= 0].long(), minlength=here).tolist()
        together = received if scales is None else (received, received_scales)
        return together, local, weights, counts, (taken, len(value), value.shape[1]), None

    def combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: None = None,
        bias: None = None,
        config: Config | None = None,
        previous_event: None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, None]:
        taken, own, hidden = handle
        require(x.dim() == 2 and x.is_contiguous() and x.dtype in FLOATS, "x")
        require(len(x) == sum(len(token) for _, token, _ in taken) and x.shape[1] == hidden, "rows")
        longest = max(count for _, _, count in taken)
        sums = torch.zeros((self.size, longest, hidden))
        for (source, token, _), part in zip(taken, x.split([len(token) for _, token, _ in taken]), strict=True):
            sums[source, token] = part.float()
        return self._group.reduce_scatter_rows(sums.flatten(0, 1))[:own].to(x.dtype), None, None

    def clean_low_latency_buffer(self, tokens: int, hidden: int, num_experts: int) -> None:
        require(self._low_latency_mode, "low_latency_mode")
        require(not in_graph, "this was not captured")
        self._check_size(tokens, hidden, num_experts)
        self._group.all_gather_rows(torch.zeros(1))  # a barrier
        calls["clean"] += 1
        self._is_dirty = False

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: None = None,
        dispatch_wait_recv_cost_stats: None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, tuple[Any, ...], None, None]:
        most = num_max_dispatch_tokens_per_rank
        require(self._low_latency_mode, "low_latency_mode")
        require(not self._is_dirty, "the normal kernels have left counts behind")
        require(self._pending is None, "two buffers, and dispatch and combine take turns")
        require(x.dim() == 2 and x.is_contiguous() and x.dtype in FLOATS, "x")
        require(x.shape[1] in HIDDEN_SIZES and topk_idx.shape[1] <= 11 and len(x) <= most, "Unsupported sizes")
        require(num_experts % self.size == 0 and num_experts // self.size <= self._num_qps, "num_experts")
        require(most * self.size % 4 == 0, "TMA requires the number of tokens to be multiple of 4")
        self._check_size(most, x.shape[1], num_experts)
        require(not use_ue8m0 and (use_fp8 or not round_scale), "formats that are not faked")
        self._check_routing(x, topk_idx, None)
        calls["low latency"] += 1
        scales = None
        if use_fp8:
            x, scales = quant_fp8_group_ref(x, scale_fmt="ue8m0" if round_scale else None)
        here, room, hidden = num_experts // self.size, most * self.size, x.shape[1]
        packed = torch.empty((here, room, hidden), dtype=x.dtype)
        packed.view(torch.uint8).fill_(0xFF)  # NaN of every type
        groups = 0 if scales is None else scales.shape[1]
        packed_scales = torch.full((here, groups, room), torch.nan).transpose(1, 2)
        origins: list[list[tuple[int, int]]] = [[] for _ in range(here)]
        sources = list(enumerate(self._gathered((x, scales, topk_idx, None))))
        for place in range(here):
            # Whose tokens come first is chance.
            for source, (value, their_scales, ids, _) in sources[place % self.size :] + sources[: place % self.size]:
                for token in (ids == self.rank * here + place).any(1).nonzero().squeeze(1).tolist():
                    row = len(origins[place])
                    packed[place, row] = value[token]
                    packed_scales[place, row] = their_scales[token]
                    origins[place].append((source, token))
        self._pending = handle = (origins, most, hidden, num_experts)
        counts = torch.tensor([len(rows) for rows in origins], dtype=torch.int32)
        return packed if scales is None else (packed, packed_scales), counts, handle, None, None

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: None = None,
        combine_wait_recv_cost_stats: None = None,
    ) -> tuple[Tensor, None, None]:
        require(handle is self._pending, "the handle is of another dispatch")
        self._pending = None
        origins, most, hidden, num_experts = handle
        here = num_experts // self.size
        require(x.shape == (here, most * self.size, hidden) and x.is_contiguous() and x.dtype in FLOATS, "x")
        self._check_routing(None, topk_idx, topk_weights)
        theirs = torch.full((self.size, most, num_experts, hidden), torch.nan)
        theirs = theirs[:, :, self.rank * here : (self.rank + 1) * here].contiguous()
        for place, rows in enumerate(origins):
            for row, (source, token) in enumerate(rows):
                theirs[source, token, place] = x[place, row].float()
        flat = self._group.all_gather_rows(theirs)  # [rank · source, tokens, places of the rank, h]
        mine = flat.view(self.size, self.size, most, here, hidden)[:, self.rank].transpose(0, 1).flatten(1, 2)
        total = torch.zeros((len(topk_idx), hidden))
        for k in range(topk_idx.shape[1]):
            used = topk_idx[:, k] >= 0
            rows = mine[: len(topk_idx)][used, topk_idx[used, k].long()]
            total[used] += topk_weights[used, k, None] * rows
        return total.to(x.dtype), None, None

    def _in_rank(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        ranks = torch.arange(self.size).view(-1, 1, 1) == topk_idx // (num_experts // self.size)
        found: Tensor = ranks.any(2).t().contiguous()
        return found

    def _check_routing(self, x: Tensor | None, topk_idx: Tensor, topk_weights: Tensor | None) -> None:
        require(topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == topk_idx_t, "topk_idx")
        require(x is None or len(x) == len(topk_idx), "rows of topk_idx")
        if topk_weights is not None:
            require(topk_weights.shape == topk_idx.shape and topk_weights.is_contiguous(), "topk_weights")
            require(topk_weights.dtype == torch.float32, "type of topk_weights")

    def _check_size(self, tokens: int, hidden: int, num_experts: int) -> None:
        needed = self.get_low_latency_rdma_size_hint(tokens, hidden, self.size, num_experts)
        require(needed <= self._num_rdma_bytes, "layout.total_bytes <= num_rdma_bytes")
        require(self._most_tokens in (None, tokens), "the same number every time")
        self._most_tokens = tokens

    def _gathered(self, parts: tuple[Tensor | None, ...]) -> list[tuple[Tensor, ...]]:
        """Each part [n, ...] of every rank, n as long as that rank has it; for None, [n, 0] of nothing."""
        own = len(next(part for part in parts if part is not None))
        lengths = self._group.all_gather_rows(torch.tensor([own])).tolist()
        columns = []
        for part in parts:
            part = torch.empty((own, 0)) if part is None else part
            padded = part.new_zeros((max(lengths), *part.shape[1:])) if part.dtype != torch.float8_e4m3fn else None
            if padded is None:
                padded = torch.zeros((max(lengths), *part.shape[1:]), dtype=torch.uint8).view(part.dtype)
            padded[:own] = part
            as_bytes = padded.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else padded
            rows = self._group.all_gather_rows(as_bytes).view(part.dtype).unflatten(0, (self.size, max(lengths)))
            columns.append([rows[rank, :length] for rank, length in enumerate(lengths)])
        return list(zip(*columns, strict=True))


FLOATS = (torch.bfloat16, torch.float32)
