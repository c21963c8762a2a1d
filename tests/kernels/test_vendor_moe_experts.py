"""The experts through DeepGEMM: what it is asked, by a stand-in that checks as DeepGEMM does and computes in torch."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from dsengine.kernels.moe_experts.api import moe_experts
from dsengine.kernels.quant_fp8_group.api import quant_fp8_group
from dsengine.quant.block_fp8 import quantize_block_fp8

pytest.importorskip("triton")
VENDOR = "dsengine.kernels.moe_experts.vendor"
FP8 = torch.float8_e4m3fn


class DeepGemm(types.ModuleType):
    """Host checks as in DeepGEMM 2.6.1 (csrc/apis/gemm.hpp, csrc/utils/layout.hpp), for compute capability 9.0."""

    def __init__(self, alignment):
        super().__init__("deep_gemm")
        self.alignment = alignment
        self.calls = []

    def get_mk_alignment_for_contiguous_layout(self):
        return self.alignment

    def m_grouped_fp8_gemm_nt_contiguous(self, a, b, d, grouped_layout):
        self.calls.append(("contiguous", tuple(d.shape)))
        rows, inner = a[0].shape
        assert grouped_layout.shape == (rows,) and grouped_layout.dtype == torch.int32
        assert a[1].shape == (rows, inner // 128) and a[1].stride() == (1, rows)
        assert d.shape == (rows, b[0].shape[1])
        owners = grouped_layout.view(-1, self.alignment)
        assert ((owners == -1) | (owners == owners[:, :1])).all(), "an aligned part has more than one expert"
        for row, expert in enumerate(grouped_layout.tolist()):
            if expert >= 0:
                d[row] = self.product(a[0][row], a[1][row], b, expert)

    def m_grouped_fp8_gemm_nt_masked(self, a, b, d, masked_m, expected_m):
        self.calls.append(("masked", tuple(d.shape)))
        experts, rows, inner = a[0].shape
        assert masked_m.shape == (experts,) and masked_m.dtype == torch.int32 and expected_m > 0
        assert a[1].shape == (experts, rows, inner // 128)
        assert a[1].stride() == (inner // 128 * rows, 1, rows) and rows * 4 % 16 == 0
        assert d.shape == (experts, rows, b[0].shape[1]) and b[0].shape[0] == experts
        for expert, count in enumerate(masked_m.tolist()):
            for row in range(count):
                d[expert, row] = self.product(a[0][expert, row], a[1][expert, row], b, expert)

    def product(self, codes, scales, b, expert):
        weight, weight_scale = b[0][expert], b[1][expert]
        assert weight_scale.shape == (weight.shape[0] // 128, weight.shape[1] // 128) and weight_scale.is_contiguous()
        value = codes.float() * scales.repeat_interleave(128)
        dense = weight.float() * weight_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return (dense @ value).to(torch.bfloat16)


@pytest.fixture
def deep_gemm(monkeypatch):
    fake = DeepGemm(alignment=16)  # 128 in earnest; the interpreter takes time for every row
    monkeypatch.setitem(sys.modules, "deep_gemm", fake)
    monkeypatch.delitem(sys.modules, VENDOR, raising=False)
    yield fake
    sys.modules.pop(VENDOR, None)


def problem(tokens, experts, device, hidden=256, inter=128):
    generator = torch.Generator().manual_seed(tokens)
    codes, x_scale = quant_fp8_group(torch.randn(tokens, hidden, generator=generator))
    gate_up = torch.randn(experts, 2, inter, hidden, generator=generator) * hidden**-0.5
    gate_up *= torch.tensor([0.5, 2.0]).view(2, 1, 1)
    gate_up_codes, gate_up_scale = quantize_block_fp8(gate_up)
    down_codes, down_scale = quantize_block_fp8(torch.randn(experts, hidden, inter, generator=generator))
    ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :2].contiguous()
    ids[3, 1] = -1
    made = {
        "x": codes,
        "w_gate_up": gate_up_codes.flatten(1, 2),
        "w_down": down_codes,
        "topk_weights": torch.rand(tokens, 2, generator=generator),
        "topk_ids": ids,
        "w_gate_up_scale": gate_up_scale,
        "w_down_scale": down_scale,
        "x_scale": x_scale,
    }
    return {name: tensor.to(device) for name, tensor in made.items()} | {"out_dtype": torch.bfloat16}


@pytest.mark.parametrize("layout", ["masked", "contiguous"])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_both_layouts_against_the_reference(device, deep_gemm, monkeypatch, layout, scale_fmt):
    vendor = importlib.import_module(VENDOR)
    rows = 32 if layout == "masked" else None
    monkeypatch.setattr(vendor, "rows_if_masked", lambda *sizes: rows)
    arguments = problem(20, 4, device) | {"scale_fmt": scale_fmt}
    out = moe_experts(**arguments, backend=vendor.moe_experts_vendor)
    expected = moe_experts(**arguments)
    assert [name for name, _ in deep_gemm.calls] == [layout, layout]
    # Gate and up are rounded to bfloat16 on the way, which moves some values to the neighbouring code.
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    assert out.isfinite().all() and error < 0.02


def test_rows_that_others_weight_later(device, deep_gemm):
    vendor = importlib.import_module(VENDOR)
    arguments = problem(40, 4, device)
    ids = arguments["topk_ids"] = arguments["topk_ids"][:, 1:].contiguous()
    arguments["topk_weights"] = None
    out = moe_experts(**arguments, backend=vendor.moe_experts_vendor)
    used = ids[:, 0] >= 0
    assert deep_gemm.calls and not used.all()
    error = (out - moe_experts(**arguments)).float()[used].norm() / out.float()[used].norm()
    assert error < 0.02


def test_what_deep_gemm_does_not_compute_goes_to_triton(device, deep_gemm):
    vendor = importlib.import_module(VENDOR)
    arguments = problem(4, 4, device)
    out = moe_experts(**arguments, backend=vendor.moe_experts_vendor)
    torch.testing.assert_close(out, moe_experts(**arguments), rtol=0.02, atol=0.02)
    assert deep_gemm.calls == []
    names = ("w_gate_up", "w_down", "w_gate_up_scale", "w_down_scale")
    weights = [arguments[name] for name in names]
    assert vendor.accepts(17, torch.bfloat16, *weights)
    assert not vendor.accepts(16, torch.bfloat16, *weights)
    assert not vendor.accepts(17, torch.float16, *weights)
    assert not vendor.accepts(17, torch.bfloat16, weights[0], weights[1][..., :96], *weights[2:])
    assert not vendor.accepts(17, torch.bfloat16, *weights[:2], None, None)


def test_the_layout_that_takes_less_room_is_chosen(deep_gemm):
    rows_if_masked = importlib.import_module(VENDOR).rows_if_masked
    # V3's 256 experts: up to 128 tokens the masked layout is no larger than the contiguous one's worst case.
    assert [rows_if_masked(tokens, 8, 256, 128) for tokens in (17, 64, 128)] == [64, 64, 128]
    assert [rows_if_masked(tokens, 8, 256, 128) for tokens in (129, 4096)] == [None, None]
    # A rank of 8 under expert parallelism sees its 32 experts only.
    assert rows_if_masked(128, 8, 32, 128) == 128
    assert rows_if_masked(512, 8, 32, 128) is None


def test_a_package_without_grouped_products_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", types.ModuleType("deep_gemm"))
    monkeypatch.delitem(sys.modules, VENDOR, raising=False)
    with pytest.raises(ImportError, match=r"has no m_grouped_fp8_gemm_nt_contiguous; install version 2\.0"):
        importlib.import_module(VENDOR)
