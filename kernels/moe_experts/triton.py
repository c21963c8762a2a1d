"""The routed experts on a GPU: chooses the path and the tiles, and launches.

FP8 activations multiply on FP8 tensor cores (compute capability 8.9 and later). Float activations, and every product
with FP8 weights on older GPUs, multiply the weights' codes as bfloat16 (which holds each exactly) or as x's own dtype.

Up to `DIRECT_TOKENS` tokens nothing is sorted: an expert's tile is all the tokens that chose it, found from the ids, so
that every expert's weights are read once; K of gate and up is split where that keeps the multiprocessors busy. More
tokens are sorted by expert (`triton_align`). Both end in rows per (token, expert), rounded to the result's dtype, and
their weighted sum in float32 by ascending id. No atomics: a token's result does not depend on the other tokens within
either path (with default configurations, and on the premise that a tensor core's element does not depend on its place
in the tile); between the paths it may differ by the order of summation. Not yet run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsengine.kernels.capability import compute_capability
from dsengine.kernels.checks import ceil_div
from dsengine.kernels.gemm_fp8_block.ref import BLOCK
from dsengine.kernels.moe_experts.triton_align import Tiles, align_pairs, empty_scales
from dsengine.kernels.moe_experts.triton_combine import _activate_kernel, _activate_rows_kernel, _combine_kernel
from dsengine.kernels.moe_experts.triton_configs import DIRECT_TOKENS, check_config, default_config
from dsengine.kernels.moe_experts.triton_gemm import _down_kernel, _gate_up_kernel
from dsengine.kernels.quant_fp8_group.api import ScaleFormat
from dsengine.kernels.quant_fp8_group.ref import AMAX_FLOOR
from dsengine.kernels.tuning import Config, tuned_config

FP8 = torch.float8_e4m3fn
HOPPER = (9, 0)  # what the interpreter and the offline compiler are taken for
COMBINE_BLOCK = 1024
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def moe_experts_triton(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor | None,
    topk_ids: Tensor,
    *,
    w_gate_up_scale: Tensor | None = None,
    w_down_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    scale_fmt: ScaleFormat | None = None,
    config: Config | None = None,
    capability: tuple[int, int] | None = None,
) -> Tensor:
    """`moe_experts`; float64 is computed as float32.

    Args:
        config: tiles to use, as in `triton_configs`; None: the tuned ones, else the default.
        capability: compute capability to write for; None: the device's.

    Raises:
        ValueError: `config` names tiles that the kernels cannot compute.
    """
    out_dtype = out_dtype or x.dtype
    x, w_gate_up, w_down = (t.float() if t.dtype == torch.float64 else t for t in (x, w_gate_up, w_down))
    w_gate_up, w_down = (t if t.stride(2) == 1 else t.contiguous() for t in (w_gate_up, w_down))
    scales = (None if t is None else t.contiguous() for t in (w_gate_up_scale, w_down_scale))
    experts = Experts(w_gate_up, w_down, *scales)
    capability = capability or (compute_capability(x.device) if x.device.type == "cuda" else HOPPER)
    config = config or find_config(x, experts, topk_ids.shape[1], capability)
    check_config(config, fp8_weights=experts.is_fp8)
    x, topk_ids = x.contiguous(), topk_ids.contiguous()
    is_direct = x.shape[0] <= min(DIRECT_TOKENS, config["block_m"])
    tiles = None if is_direct else align_pairs(topk_ids, experts.down.shape[0], config["block_m"])
    single = torch.float32 if out_dtype == torch.float64 else out_dtype
    launch = Launch(experts, topk_ids, tiles, config, capability, single, scale_fmt)
    inter, inter_scale = launch.gate_up(x, None if x_scale is None else x_scale.contiguous())
    rows = launch.down(inter, inter_scale)
    if topk_weights is not None:
        rows = combine(rows, topk_weights.contiguous(), topk_ids)
    return rows.to(out_dtype)


@dataclass(frozen=True)
class Experts:
    """Weights of the experts, as in `moe_experts`."""

    gate_up: Tensor
    down: Tensor
    gate_up_scale: Tensor | None
    down_scale: Tensor | None

    @property
    def is_fp8(self) -> bool:
        return self.gate_up_scale is not None


def shape_key(experts: Experts, x_dtype: torch.dtype) -> str:
    """Key of the tables of tuned configurations, as in "E=256,I=2048,h=7168,x=float8_e4m3fn,w=float8_e4m3fn"."""
    count, hidden, inter = experts.down.shape
    x, w = (str(dtype).removeprefix("torch.") for dtype in (x_dtype, experts.down.dtype))
    return f"E={count},I={inter},h={hidden},x={x},w={w}"


def find_config(x: Tensor, experts: Experts, top_k: int, capability: tuple[int, int]) -> Config:
    """The tuned configuration, else the default one."""
    count, hidden, inter = experts.down.shape
    if x.dtype != torch.float32:
        tuned = tuned_config("moe_experts", shape_key(experts, x.dtype), x.shape[0], x.device)
        if tuned is not None:
            return tuned
    return default_config(
        x.shape[0],
        top_k,
        count,
        inter,
        hidden,
        x=x.dtype,
        fp8_weights=experts.is_fp8,
        capability=capability,
    )


def combine(rows: Tensor, topk_weights: Tensor, topk_ids: Tensor, places: Tensor | None = None) -> Tensor:
    """Weighted sums of the rows of each token's experts.

    Args:
        rows: [any, h], of pairs token · K + k; rows of negative ids are not read.
        topk_weights, topk_ids: [T, K], contiguous.
        places: int32 [T · K], the row of each pair; None: pair p's is row p.

    Returns:
        [T, h] of rows' dtype.
    """
    tokens, top_k = topk_ids.shape
    hidden = rows.shape[1]
    out = torch.empty((tokens, hidden), dtype=rows.dtype, device=rows.device)
    block = min(COMBINE_BLOCK, triton.next_power_of_2(hidden))
    _combine_kernel[(tokens, ceil_div(hidden, block))](
        rows,
        places,
        topk_ids,
        topk_weights,
        out,
        hidden,
        TOP_K=top_k,
        K_BLOCK=triton.next_power_of_2(top_k),
        BLOCK=block,
        num_warps=4,
    )
    return out


def activate_rows(
    gate_up: Tensor, tiles: Tiles, experts: int | None, pairs: int, scale_fmt: ScaleFormat | None
) -> tuple[Tensor, Tensor]:
    """silu(gate) · up of rows laid out as by `place_rows`, rounded to gate_up's dtype, then quantised.

    Args:
        gate_up: [rows, 2 I].
        tiles, experts: as in `place_rows`.
        pairs: T · K.
        scale_fmt: of the scales.

    Returns:
        (codes float8_e4m3fn [rows, I], scales as those of `Rows`); rows without a pair are undefined.
    """
    rows, inter = gate_up.shape[0], gate_up.shape[1] // 2
    block_m = tiles.pairs.numel() // tiles.most
    codes = torch.empty((rows, inter), dtype=torch.float8_e4m3fn, device=gate_up.device)
    scales = empty_scales(experts, rows, inter // BLOCK, gate_up.device)
    _activate_rows_kernel[(tiles.pairs.numel(), inter // BLOCK)](
        gate_up,
        tiles.pairs,
        tiles.expert,
        tiles.count,
        codes,
        scales,
        AMAX_FLOOR,
        pairs,
        inter,
        rows if experts is None else block_m,
        BLOCK_M=block_m,
        BY_EXPERT=experts is not None,
        UE8M0=scale_fmt == "ue8m0",
        num_warps=1,
    )
    return codes, scales


@dataclass(frozen=True)
class Launch:
    """What both products of a call share."""

    experts: Experts
    ids: Tensor
    tiles: Tiles | None
    config: Config
    capability: tuple[int, int]
    out_dtype: torch.dtype
    scale_fmt: ScaleFormat | None

    def gate_up(self, x: Tensor, x_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """([T · K, I], its scales where x is FP8): silu(gate) · up of every pair that has an expert here."""
        config = self.config
        tokens, hidden = x.shape
        pairs, inter = self.ids.numel(), self.experts.down.shape[2]
        is_quantised = x_scale is not None
        is_decoded = self._is_decoded(is_quantised)
        block_n, splits = config["gate_block_n"], config["gate_splits"]
        rounded = TRITON_DTYPES[self.out_dtype if is_quantised else x.dtype]
        out = torch.empty((pairs, inter), dtype=FP8 if is_quantised else x.dtype, device=x.device)
        out_scale = None
        if is_quantised:
            out_scale = torch.empty((pairs, ceil_div(inter, BLOCK)), dtype=torch.float32, device=x.device)
        codes = out.view(torch.uint8) if is_quantised and is_decoded else out
        is_partial = splits > 1 or (is_quantised and block_n != BLOCK)
        target = torch.empty((splits, pairs, 2, inter), dtype=torch.float32, device=x.device) if is_partial else codes
        options = {"ROUNDED": rounded, "DECODED": is_decoded, "UE8M0": self.scale_fmt == "ue8m0"}
        weight, weight_options = self._weight(self.experts.gate_up, block_n, is_decoded)
        _gate_up_kernel[(self._programs(inter, block_n), splits)](
            x.view(torch.uint8) if is_quantised and is_decoded else x,
            x_scale,
            weight,
            self.experts.gate_up_scale,
            *self._tile_arguments(),
            target,
            None if is_partial else out_scale,
            AMAX_FLOOR,
            tokens,
            hidden,
            inter,
            x.stride(0),
            0 if x_scale is None else x_scale.stride(0),
            self.experts.gate_up.stride(0),
            self.experts.gate_up.stride(1),
            **self._tile_options(hidden),
            **weight_options,
            **options,
            BLOCK_N=block_n,
            SPLITS=splits,
            PARTIAL=is_partial,
            num_warps=config["gate_warps"],
            num_stages=config["gate_stages"],
        )
        if is_partial:
            grid = (pairs, ceil_div(inter, BLOCK))
            arguments = (target, self.ids, codes, out_scale, AMAX_FLOOR, pairs, inter)
            _activate_kernel[grid](*arguments, **options, SPLITS=splits, num_warps=1)
        return out, out_scale

    def down(self, inter: Tensor, inter_scale: Tensor | None) -> Tensor:
        """[T · K, h]: the product of every pair that has an expert here; other rows are not written."""
        config = self.config
        hidden = self.experts.down.shape[1]
        is_quantised = inter_scale is not None
        is_decoded = self._is_decoded(is_quantised)
        out = torch.empty((inter.shape[0], hidden), dtype=self.out_dtype, device=inter.device)
        weight, weight_options = self._weight(self.experts.down, config["down_block_n"], is_decoded)
        _down_kernel[(self._programs(hidden, config["down_block_n"]),)](
            inter.view(torch.uint8) if is_quantised and is_decoded else inter,
            inter_scale,
            weight,
            self.experts.down_scale,
            *self._tile_arguments(),
            out,
            self.ids.shape[0],
            inter.shape[1],
            hidden,
            self.experts.down.stride(0),
            self.experts.down.stride(1),
            **self._tile_options(inter.shape[1]),
            **weight_options,
            BLOCK_N=config["down_block_n"],
            DECODED=is_decoded,
            num_warps=config["down_warps"],
            num_stages=config["down_stages"],
        )
        return out

    def _is_decoded(self, is_quantised: bool) -> bool:
        """Whether FP8 tensors go in as uint8: Triton refuses FP8 pointers where the GPU has no FP8 instructions."""
        return self.experts.is_fp8 and not (is_quantised and self.capability >= (8, 9))

    def _weight(
        self, weight: Tensor, block_n: int, is_decoded: bool
    ) -> tuple[Tensor | TensorDescriptor, dict[str, bool]]:
        weight = weight.view(torch.uint8) if is_decoded else weight
        row_bytes = weight.shape[2] * weight.element_size()
        is_aligned = weight.is_contiguous() and weight.data_ptr() % 16 == 0 and row_bytes % 16 == 0
        if not (is_aligned and self.capability >= HOPPER):
            return weight, {"TMA": False}
        return TensorDescriptor.from_tensor(weight.flatten(0, 1), [block_n, self.config["block_k"]]), {"TMA": True}

    def _programs(self, rows: int, block_n: int) -> int:
        tiles = self.ids.numel() if self.tiles is None else self.tiles.most
        return tiles * ceil_div(rows, block_n)

    def _tile_arguments(self) -> tuple[Tensor | None, ...]:
        tiles = self.tiles
        return (self.ids, None, None, None) if tiles is None else (None, tiles.pairs, tiles.expert, tiles.count)

    def _tile_options(self, inner: int) -> dict[str, int]:
        config, top_k = self.config, self.ids.shape[1]
        return {
            "TOP_K": top_k,
            "K_BLOCK": triton.next_power_of_2(top_k),
            "BLOCK_M": config["block_m"],
            "BLOCK_K": config["block_k"],
            "GROUP_M": config["group_m"],
            "SWAPPED": bool(config["swapped"]),
            "WHOLE_STEPS": inner % config["block_k"] == 0,
        }
