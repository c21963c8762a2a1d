"""Block-FP8 weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsengine.quant.block_fp8 import dequantize_block_fp8, is_ue8m0, quantize_block_fp8


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    block=st.sampled_from([(128, 128), (32, 32), (16, 64)]),
    scale_fmt=st.sampled_from([None, "ue8m0"]),
)
def test_round_trip(rows, columns, block, scale_fmt):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    codes, scale = quantize_block_fp8(weight, block, scale_fmt)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == weight.shape and codes.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (-(-rows // block[0]), -(-columns // block[1]))
    restored = dequantize_block_fp8(codes, scale, block, torch.float32)
    expanded = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    assert ((restored - weight).abs() <= torch.maximum(weight.abs() * 2.0**-4, expanded * 2.0**-10) * 1.001).all()
    again_codes, again_scale = quantize_block_fp8(restored, block, scale_fmt)
    assert dequantize_block_fp8(again_codes, again_scale, block, torch.float32).allclose(restored)


def test_each_block_has_its_own_scale():
    """kv_a_proj of V3: 576 rows make five blocks, the last of 64 rows."""
    weight = torch.ones(576, 256)
    weight[512:, 128:] = 7.0
    codes, scale = quantize_block_fp8(weight)
    assert scale.shape == (5, 2)
    torch.testing.assert_close(scale[4, 1].item(), 7 / 448)
    torch.testing.assert_close(scale[4, 0].item(), 1 / 448)
    assert (codes.float() == 448).all()
    torch.testing.assert_close(dequantize_block_fp8(codes, scale, dtype=torch.float32), weight)


def test_leading_dimensions_are_separate_matrices():
    weight = torch.randn(3, 2, 130, 200)
    codes, scale = quantize_block_fp8(weight)
    single = quantize_block_fp8(weight[1, 0])
    assert codes[1, 0].float().equal(single[0].float()) and scale[1, 0].equal(single[1])
    whole = dequantize_block_fp8(codes, scale, dtype=torch.float32)
    assert whole[2, 1].equal(dequantize_block_fp8(codes[2, 1], scale[2, 1], dtype=torch.float32))


def test_dequantisation_multiplies_and_rounds_once():
    codes = torch.full((2, 2), 3.0).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.1]])
    assert dequantize_block_fp8(codes, scale).equal(torch.full((2, 2), 3.0 * 0.1).bfloat16())


def test_zeros_stay_zeros():
    codes, scale = quantize_block_fp8(torch.zeros(130, 4))
    assert scale.flatten().tolist() == [1.0, 1.0]
    assert codes.float().count_nonzero() == 0


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_weights(shape):
    codes, scale = quantize_block_fp8(torch.zeros(shape))
    assert codes.shape == shape and scale.shape == tuple(-(-size // 128) for size in shape)
    assert dequantize_block_fp8(codes, scale).shape == shape


def test_ue8m0_is_recognised():
    weight = torch.randn(300, 300)
    assert not is_ue8m0(quantize_block_fp8(weight)[1])
    scale = quantize_block_fp8(weight, scale_fmt="ue8m0")[1]
    assert is_ue8m0(scale)
    assert (scale >= quantize_block_fp8(weight)[1]).all()
    assert is_ue8m0(torch.tensor([2.0**-126, 1.0, 2.0**100]))
    assert not is_ue8m0(torch.tensor([1.0, -2.0]))
    assert not is_ue8m0(torch.tensor([1.0, 0.0]))
    assert not is_ue8m0(torch.tensor([torch.inf]))
    assert not is_ue8m0(torch.tensor([torch.nan]))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"scale_inv has shape \[4, 2\]; .* 128×128 needs \[5, 2\]"):
        dequantize_block_fp8(torch.zeros(576, 256).to(torch.float8_e4m3fn), torch.ones(4, 2))
    with pytest.raises(ValueError, match="holds a NaN or an infinity"):
        quantize_block_fp8(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match="expected a matrix"):
        quantize_block_fp8(torch.zeros(4))
    with pytest.raises(ValueError, match="scale_fmt is 'pow2'"):
        quantize_block_fp8(torch.zeros(4, 4), scale_fmt="pow2")  # type: ignore[arg-type]
