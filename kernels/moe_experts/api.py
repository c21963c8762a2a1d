"""The routed experts of a MoE layer: every token through its own few SwiGLU experts."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsengine.kernels.backend import Backend, Operation
from dsengine.kernels.capability import needs_hopper
from dsengine.kernels.checks import FLOATS, FP8, INTS, ceil_div, check_device, check_dtype, check_shape
from dsengine.kernels.gemm_fp8_block.ref import BLOCK
from dsengine.kernels.moe_experts.ref import moe_experts_ref
from dsengine.kernels.native_support import needs_compiler
from dsengine.kernels.quant_fp8_group.api import ScaleFormat


class MoeExperts(Protocol):
    def __call__(
        self,
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
    ) -> Tensor: ...


def moe_experts(
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
    backend: MoeExperts = moe_experts_ref,
) -> Tensor:
    """Σ_k topk_weights[t, k] · down(silu(gate(x)) · up(x)) over the token's experts; no token is ever dropped.

    T tokens, E experts, K experts per token, h hidden size, I moe_intermediate_size.

    Float x is multiplied as it is, whatever the weights are. With FP8 x (and FP8 weights) the activations are FP8 in
    both products: silu(gate) · up is rounded to `out_dtype`, then quantised in groups of 128 as by `quant_fp8_group`.

    Args:
        x: [T, h], float, or float8_e4m3fn with `x_scale`.
        w_gate_up: [E, 2 I, h], the I gate rows, then the I up rows; x's dtype, or float8_e4m3fn with scales.
        w_down: [E, h, I], of the same dtype as w_gate_up.
        topk_weights: float32 [T, K]. None, where K is 1: every token's product as it is, for whoever weights it later;
            rows of negative ids may then hold anything.
        topk_ids: int [T, K] in [0, E). A negative id adds nothing (an expert that lives on another rank).
        w_gate_up_scale: float32 [E, 2, ⌈I/128⌉, ⌈h/128⌉], `weight_scale_inv` of gate and of up. They are kept apart
            because each was cut into blocks from its own first row: where I is no multiple of 128, up's blocks do not
            continue gate's.
        w_down_scale: float32 [E, ⌈h/128⌉, ⌈I/128⌉].
        x_scale: float32 [T, ⌈h/128⌉], as from `quant_fp8_group`; with FP8 x only.
        out_dtype: of the result; default: x's dtype (needed where x is FP8).
        scale_fmt: of the scales of silu(gate) · up, None or "ue8m0"; with FP8 x only.

    Returns:
        [T, h] of `out_dtype`; a token's experts are added up in float32 and in the order of their ids, whatever other
        tokens are in the batch.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_experts(x, w_gate_up, w_down, topk_weights, topk_ids)
    _check_scales(x, w_gate_up, w_down, w_gate_up_scale, w_down_scale, x_scale)
    if x_scale is not None and out_dtype is None:
        raise ValueError("out_dtype is None; it must be given where x is FP8")
    if x_scale is None and scale_fmt is not None:
        raise ValueError(f"scale_fmt is {scale_fmt!r}, but x is {x.dtype}; only FP8 activations have scales")
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt is {scale_fmt!r}; expected None or 'ue8m0'")
    out_dtype = out_dtype or x.dtype
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}; expected {' or '.join(str(dtype) for dtype in FLOATS)}")
    if topk_ids.numel() == 0:
        return torch.zeros(x.shape, dtype=out_dtype, device=x.device)
    return backend(
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


def _check_experts(x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_weights: Tensor | None, topk_ids: Tensor) -> None:
    check_shape("x", x, None, None)
    tokens, hidden = x.shape
    check_shape("w_down", w_down, None, hidden, None)
    experts, _, inter = w_down.shape
    check_shape("w_gate_up", w_gate_up, experts, 2 * inter, hidden)
    check_dtype("w_down", w_down, w_gate_up.dtype)
    if topk_weights is None:
        check_shape("topk_ids without topk_weights", topk_ids, tokens, 1)
    else:
        check_shape("topk_weights", topk_weights, tokens, None)
        check_dtype("topk_weights", topk_weights, torch.float32)
        check_shape("topk_ids", topk_ids, tokens, topk_weights.shape[1])
    check_dtype("topk_ids", topk_ids, *INTS)
    check_device(x.device, w_gate_up=w_gate_up, w_down=w_down, topk_weights=topk_weights, topk_ids=topk_ids)


def _check_scales(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    w_gate_up_scale: Tensor | None,
    w_down_scale: Tensor | None,
    x_scale: Tensor | None,
) -> None:
    blocks_i, blocks_h = ceil_div(w_down.shape[2], BLOCK), ceil_div(x.shape[1], BLOCK)
    if x_scale is None:
        check_dtype("x without x_scale", x, *FLOATS)
    else:
        check_dtype("x with x_scale", x, *FP8)
        check_shape("x_scale", x_scale, x.shape[0], blocks_h)
        check_dtype("x_scale", x_scale, torch.float32)
    if w_gate_up_scale is None or w_down_scale is None:
        if w_gate_up_scale is not w_down_scale:
            raise ValueError("only one of w_gate_up_scale and w_down_scale is given; FP8 experts need both")
        if x_scale is not None:
            raise ValueError("x_scale is given without w_gate_up_scale and w_down_scale; FP8 x needs FP8 experts")
        check_dtype("w_gate_up", w_gate_up, x.dtype)
    else:
        check_dtype("w_gate_up", w_gate_up, *FP8)
        experts = w_down.shape[0]
        check_shape("w_gate_up_scale", w_gate_up_scale, experts, 2, blocks_i, blocks_h)
        check_shape("w_down_scale", w_down_scale, experts, blocks_h, blocks_i)
        check_dtype("w_gate_up_scale", w_gate_up_scale, torch.float32)
        check_dtype("w_down_scale", w_down_scale, torch.float32)
    check_device(x.device, w_gate_up_scale=w_gate_up_scale, w_down_scale=w_down_scale, x_scale=x_scale)


MOE_EXPERTS = Operation(
    "moe_experts",
    moe_experts,
    (
        Backend("triton", "dsengine.kernels.moe_experts.triton:moe_experts_triton", ("cuda",), ("triton",)),
        Backend(
            "vendor",
            "dsengine.kernels.moe_experts.vendor:moe_experts_vendor",
            ("cuda",),
            ("deep_gemm", "triton"),
            probe=needs_hopper,
        ),
        Backend("native", "dsengine.kernels.moe_experts.native:moe_experts_native", ("cpu",), probe=needs_compiler),
        Backend("cpu", "dsengine.kernels.moe_experts.cpu:moe_experts_cpu", ("cpu",)),
        Backend("ref", "dsengine.kernels.moe_experts.ref:moe_experts_ref"),
    ),
)
