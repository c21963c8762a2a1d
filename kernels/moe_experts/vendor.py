"""The routed experts through DeepSeek's DeepGEMM (package `deep_gemm` 2.x, built from source), if it is installed.

For block FP8 with quantised activations and a bfloat16 result on Hopper; everything else, and few tokens, goes to the
Triton kernels. DeepGEMM's grouped products take rows gathered by expert in one of two layouts, and both are used:

- masked, `m_grouped_fp8_gemm_nt_masked`: [E, m, ·] with the number of valid rows per expert;
- contiguous, `m_grouped_fp8_gemm_nt_contiguous`: each expert's rows padded to the alignment, with an expert per row.

Gate and up come back rounded to bfloat16 before SwiGLU, one rounding more than `moe_experts` promises. DeepGEMM
compiles a kernel per shape when it first meets it, with nvcc: warm every number of tokens up before capturing graphs.
Names and layouts as read in DeepGEMM 2.6.1. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import triton
from torch import Tensor

from dsengine.kernels.checks import ceil_div
from dsengine.kernels.gemm_fp8_block.ref import BLOCK
from dsengine.kernels.moe_experts.triton import activate_rows, combine, moe_experts_triton
from dsengine.kernels.moe_experts.triton_align import align_pairs, most_tiles, place_rows
from dsengine.kernels.moe_experts.triton_configs import DIRECT_TOKENS
from dsengine.kernels.quant_fp8_group.api import ScaleFormat

CONTIGUOUS, MASKED = "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked"
ALIGNMENTS = ("get_mk_alignment_for_contiguous_layout", "get_m_alignment_for_contiguous_layout")  # newer, older
SMALLEST_MASKED = 64  # rows per expert

deep_gemm: Any = importlib.import_module("deep_gemm")
for name in (CONTIGUOUS, MASKED):
    if not hasattr(deep_gemm, name):  # noticed at start-up, not at the first request
        raise ImportError(
            f"deep_gemm {getattr(deep_gemm, '__version__', 'of unknown version')} has no {name}; install version 2.0 "
            f"or later from its repository (the package of that name on PyPI is another), or force another backend: "
            f"--kernel moe_experts=triton"
        )


def moe_experts_vendor(
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
) -> Tensor:
    """`moe_experts`. Whether DeepGEMM or Triton computes depends on the weights, dtypes and number of tokens only."""
    weights = (w_gate_up, w_down, w_gate_up_scale, w_down_scale)
    if x_scale is None or not accepts(x.shape[0], out_dtype, *weights):
        return moe_experts_triton(
            x,
            w_gate_up,
            w_down,
            topk_weights,
            topk_ids,
            w_gate_up_scale=w_gate_up_scale,
            w_down_scale=w_down_scale,
            x_scale=x_scale,
            out_dtype=out_dtype,
            scale_fmt=scale_fmt,
        )
    assert w_gate_up_scale is not None and w_down_scale is not None
    if topk_weights is None:
        topk_weights = torch.ones(topk_ids.shape, device=x.device)
    x, x_scale, topk_weights, topk_ids = (t.contiguous() for t in (x, x_scale, topk_weights, topk_ids))
    tokens, top_k = topk_ids.shape
    experts = w_down.shape[0]
    masked_rows = rows_if_masked(tokens, top_k, experts, alignment())
    tiles = align_pairs(topk_ids, experts, masked_rows or alignment())
    by_expert = experts if masked_rows else None
    rows = place_rows(x, x_scale, top_k, tiles, by_expert)
    expected = max(1, ceil_div(tokens * top_k, experts)) if masked_rows else None
    gate_up = grouped(rows.codes, rows.scales, w_gate_up, w_gate_up_scale.flatten(1, 2), rows.layout, expected)
    codes, scales = activate_rows(gate_up, tiles, by_expert, topk_ids.numel(), scale_fmt)
    out = grouped(codes, scales, w_down, w_down_scale, rows.layout, expected)
    return combine(out, topk_weights, topk_ids, rows.places)


def accepts(
    tokens: int,
    out_dtype: torch.dtype | None,
    w_gate_up: Tensor,
    w_down: Tensor,
    w_gate_up_scale: Tensor | None,
    w_down_scale: Tensor | None,
) -> bool:
    """Whether DeepGEMM's Hopper kernels compute this problem, and not worse: it writes bfloat16, wants contiguous
    weights and scales and whole groups (gate's blocks then continue in up's), and its tiles of 64 rows and more have
    nothing to offer to a handful of tokens."""
    tensors = (w_gate_up, w_down, w_gate_up_scale, w_down_scale)
    return (
        tokens > DIRECT_TOKENS
        and out_dtype == torch.bfloat16
        and all(size % BLOCK == 0 for size in w_down.shape[1:])
        and all(tensor is not None and tensor.is_contiguous() for tensor in tensors)
    )


def alignment() -> int:
    """Rows an expert's part of the contiguous layout is padded to."""
    for name in ALIGNMENTS:
        if hasattr(deep_gemm, name):
            return int(getattr(deep_gemm, name)())
    raise ImportError(f"deep_gemm has neither {' nor '.join(ALIGNMENTS)}; install version 2.0 or later")


def rows_if_masked(tokens: int, top_k: int, experts: int, aligned: int) -> int | None:
    """Rows per expert of the masked layout where it takes no more room than the contiguous one; else None.

    Room is what the worst routing needs: all tokens may meet in one expert (each once), or spread over as many as there
    are.
    """
    rows = max(SMALLEST_MASKED, int(triton.next_power_of_2(tokens)))
    return rows if experts * rows <= most_tiles(tokens * top_k, experts, aligned) * aligned else None


def grouped(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor, layout: Tensor, expected: int | None
) -> Tensor:
    """bfloat16 [rows, N]: rows · weight[expert of the row]ᵀ.

    Args:
        codes: float8_e4m3fn [rows, K].
        scales: float32 [rows, K / 128], or [E, rows / E, K / 128] for the masked layout; stride 1 over rows.
        weight: float8_e4m3fn [E, N, K].
        weight_scale: float32 [E, N / 128, K / 128].
        layout: as in `Rows`.
        expected: rows per expert to choose tiles for; None: the contiguous layout.
    """
    experts, width, _ = weight.shape
    out = torch.empty((codes.shape[0], width), dtype=torch.bfloat16, device=codes.device)
    if expected is None:
        getattr(deep_gemm, CONTIGUOUS)((codes, scales), (weight, weight_scale), out, layout)
    else:
        left, target = codes.unflatten(0, (experts, -1)), out.unflatten(0, (experts, -1))
        getattr(deep_gemm, MASKED)((left, scales), (weight, weight_scale), target, layout, expected)
    return out
