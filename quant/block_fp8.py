"""DeepSeek's block-FP8 weights: one float32 scale per 128×128 block, stored beside the weight as `weight_scale_inv`.

Despite its name the stored scale multiplies the weight to dequantise it. Edge blocks of ragged matrices are smaller.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dsengine.kernels.quant_fp8_group.ref import E4M3_MAX, round_up_to_power_of_two

ScaleFormat = Literal["ue8m0"]


def quantize_block_fp8(
    weight: Tensor, block: tuple[int, int] = (128, 128), scale_fmt: ScaleFormat | None = None
) -> tuple[Tensor, Tensor]:
    """scale = amax / 448 per block, code = weight / scale rounded to the nearest float8_e4m3fn.

    Args:
        weight: float [..., N, K]; leading dimensions are separate matrices.
        block: rows and columns of a block.
        scale_fmt: None, or "ue8m0": scales are rounded up to powers of two (V3.1 and later).

    Returns:
        (codes float8_e4m3fn [..., N, K], scale_inv float32 [..., ⌈N/block[0]⌉, ⌈K/block[1]⌉]). An all-zero block has
        scale 1.

    Raises:
        ValueError: weight is no matrix, holds a NaN or an infinity, or `scale_fmt` is unknown.
    """
    if weight.ndim < 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected a matrix")
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt is {scale_fmt!r}; expected None or 'ue8m0'")
    rows, columns = weight.shape[-2:]
    value = F.pad(weight.float(), (0, -columns % block[1], 0, -rows % block[0]))
    blocks = torch.unflatten(torch.unflatten(value, -1, (-1, block[1])), -3, (-1, block[0]))
    amax = blocks.abs().amax(dim=(-3, -1))
    if not amax.isfinite().all():
        raise ValueError("weight holds a NaN or an infinity; it cannot be quantised")
    scale = torch.where(amax > 0, amax / E4M3_MAX, 1.0)
    if scale_fmt == "ue8m0":
        scale = round_up_to_power_of_two(scale)
    codes = (blocks / scale[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = codes.flatten(-2).flatten(-3, -2)[..., :rows, :columns]
    return codes.contiguous(), scale


def dequantize_block_fp8(
    weight: Tensor,
    scale_inv: Tensor,
    block: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """weight · scale of its block, multiplied in float32 and rounded once.

    Args:
        weight: float8_e4m3fn [..., N, K].
        scale_inv: float32 [..., ⌈N/block[0]⌉, ⌈K/block[1]⌉].
        block: rows and columns of a block.
        dtype: of the result.

    Returns:
        [..., N, K] of `dtype`.

    Raises:
        ValueError: the shape of `scale_inv` is not the number of blocks.
    """
    rows, columns = weight.shape[-2:]
    wanted = (*weight.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if scale_inv.shape != wanted:
        raise ValueError(
            f"scale_inv has shape {list(scale_inv.shape)}; a weight of shape {list(weight.shape)} in blocks of "
            f"{block[0]}×{block[1]} needs {list(wanted)}"
        )
    expanded = scale_inv.repeat_interleave(block[1], dim=-1)[..., :columns]
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    # By rows of blocks: the float32 temporary stays small beside the result.
    for index in range(wanted[-2]):
        panel = slice(index * block[0], (index + 1) * block[0])
        out[..., panel, :] = weight[..., panel, :].float() * expanded[..., index : index + 1, :]
    return out


def is_ue8m0(scale: Tensor) -> bool:
    """Whether every scale is a positive power of two (the `ue8m0` scale format, kept in float32)."""
    mantissa, _ = torch.frexp(scale.float())
    return bool((mantissa == 0.5).all())
