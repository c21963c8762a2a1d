"""Routing and the routed experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsengine.kernels.moe_experts import cpu
from dsengine.kernels.moe_experts.api import MOE_EXPERTS, moe_experts
from dsengine.kernels.moe_route.api import MOE_ROUTE, ROUTER_LOGITS, moe_route, router_logits
from dsengine.kernels.quant_fp8_group.api import quant_fp8_group
from dsengine.quant.block_fp8 import dequantize_block_fp8, quantize_block_fp8

CPU = torch.device("cpu")


def on_cpu(operation):
    names = [backend.name for backend in operation.backends if backend.is_available(CPU)[0]]
    return pytest.mark.parametrize("backend", [operation.backend(name).load() for name in names], ids=names)


# The vectors were worked out from DeepSeek's published code, one per method.
LOGITS = torch.tensor([[2, -1, 0.5, 1.5, -0.5, 3, 0, 1]])
BIAS = torch.tensor([0, 0.9, -0.2, 0.1, 0.6, -0.9, 0.3, -0.1])
V2_LITE: dict[str, Any] = {"method": "greedy", "scoring": "softmax", "top_k": 3}
V2: dict[str, Any] = {
    "method": "group_limited_greedy",
    "scoring": "softmax",
    "top_k": 3,
    "n_group": 4,
    "topk_group": 2,
    "scaling": 16.0,
}
V3: dict[str, Any] = {
    "method": "noaux_tc",
    "scoring": "sigmoid",
    "top_k": 3,
    "n_group": 4,
    "topk_group": 2,
    "bias": BIAS,
    "renormalize": True,
    "scaling": 2.5,
}
VECTORS: list[Any] = [
    (V2_LITE, {0: 0.192937, 3: 0.117022, 5: 0.524458}),
    (V2, {0: 3.086998, 4: 0.253396, 5: 8.391330}),
    (V3, {0: 1.334753, 1: 0.407552, 6: 0.757696}),
    ({**V3, "n_group": 1, "topk_group": 1}, {1: 0.459240, 3: 1.396077, 4: 0.644683}),
]


@on_cpu(MOE_ROUTE)
@pytest.mark.parametrize("arguments,expected", VECTORS, ids=["V2-Lite", "V2", "V3", "V3 without groups"])
def test_route_vectors(backend, arguments, expected):
    weights, ids = moe_route(LOGITS.repeat(3, 1), **arguments, backend=backend)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64
    for row in range(3):
        actual = dict(zip(ids[row].tolist(), weights[row].tolist(), strict=True))
        assert actual == pytest.approx(expected, abs=1e-5)


@on_cpu(MOE_ROUTE)
def test_v2_normalises_instead_of_scaling(backend):
    weights, ids = moe_route(LOGITS, **{**V2, "renormalize": True}, backend=backend)
    raw, raw_ids = moe_route(LOGITS, **{**V2, "scaling": 1.0}, backend=backend)
    assert ids.equal(raw_ids)
    torch.testing.assert_close(weights, raw / raw.sum())


@on_cpu(MOE_ROUTE)
def test_excluded_groups_stay_out_although_biased_scores_are_negative(backend):
    """With 0 for -inf, expert 2 or 3 of the excluded group would beat the kept group's negative scores."""
    bias = torch.tensor([-1.5, -1.4, -3.0, -3.0])
    _, ids = moe_route(
        torch.zeros(1, 4),
        method="noaux_tc",
        scoring="sigmoid",
        top_k=2,
        n_group=2,
        topk_group=1,
        bias=bias,
        backend=backend,
    )
    assert ids.tolist() == [[1, 0]]


@on_cpu(MOE_ROUTE)
@pytest.mark.parametrize("arguments", [V2_LITE, V2, {**V3, "bias": None}])
def test_equal_scores_go_to_the_lowest_ids(backend, arguments):
    _, ids = moe_route(torch.zeros(5, 8), **arguments, backend=backend)
    assert ids.tolist() == [[0, 1, 2]] * 5


@on_cpu(MOE_ROUTE)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(0, 5), topk_group=st.integers(1, 4))
def test_route_v3_by_brute_force(backend, seed, tokens, topk_group):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, 16, generator=generator)
    bias = torch.randn(16, generator=generator)
    weights, ids = moe_route(
        logits,
        method="noaux_tc",
        scoring="sigmoid",
        top_k=4,
        n_group=4,
        topk_group=topk_group,
        bias=bias,
        renormalize=True,
        scaling=2.5,
        backend=backend,
    )
    for token in range(tokens):
        score = logits[token].sigmoid().tolist()
        biased = (logits[token].sigmoid() + bias).tolist()
        groups = [sum(sorted(biased[g * 4 : g * 4 + 4])[-2:]) for g in range(4)]
        kept = sorted(range(4), key=lambda g: -groups[g])[:topk_group]
        chosen = sorted((e for e in range(16) if e // 4 in kept), key=lambda e: -biased[e])[:4]
        assert ids[token].tolist() == chosen
        total = sum(score[e] for e in chosen)
        assert weights[token].tolist() == pytest.approx([score[e] / total * 2.5 for e in chosen], rel=1e-5)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"method": "best"}, "method is 'best'; expected one of greedy"),
        ({"scoring": "tanh"}, "scoring is 'tanh'"),
        ({"n_group": 3}, "n_group is 3; it must divide the number of experts, 8"),
        ({"n_group": 8}, "'noaux_tc' sums two scores"),
        ({"topk_group": 5}, r"topk_group is 5; it must lie in \[1, n_group = 4\]"),
        ({"top_k": 5}, "top_k is 5; a token can reach 4 of the 8 experts"),
        ({"method": "greedy"}, "bias is given, but method 'greedy' has none"),
        ({"bias": BIAS.bfloat16()}, "bias has dtype torch.bfloat16; expected torch.float32"),
    ],
)
def test_route_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        moe_route(LOGITS, **{**V3, **change})


@on_cpu(ROUTER_LOGITS)
def test_logits_of_the_router(backend):
    x, weight = torch.randn(3, 20).bfloat16(), torch.randn(6, 20)
    logits = router_logits(x, weight, backend=backend)
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    assert router_logits(x[:0], weight, backend=backend).shape == (0, 6)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.bfloat16; expected torch\.float32"):
        router_logits(x, weight.bfloat16(), backend=backend)
    with pytest.raises(ValueError, match=r"weight has shape \[6, 19\]; expected \[any, 20\]"):
        router_logits(x, weight[:, 1:], backend=backend)


@on_cpu(MOE_ROUTE)
def test_parts_of_logits_are_added_up(backend):
    parts = torch.stack((LOGITS - 5, torch.full_like(LOGITS, 5)))
    weights, ids = moe_route(parts, **V3, backend=backend)
    whole_weights, whole_ids = moe_route(LOGITS, **V3, backend=backend)
    assert ids.equal(whole_ids)
    torch.testing.assert_close(weights, whole_weights)


def experts_input(tokens, experts, top_k, hidden, inter, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    gate_up = (torch.randn(experts, 2 * inter, hidden, generator=generator) * hidden**-0.5).to(dtype)
    down = (torch.randn(experts, hidden, inter, generator=generator) * inter**-0.5).to(dtype)
    order = torch.rand(tokens, experts, generator=generator).argsort(dim=1)
    return x, gate_up, down, torch.rand(tokens, top_k, generator=generator), order[:, :top_k].contiguous()


def by_definition(x, gate_up, down, weights, ids):
    """float64, one token and one expert at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            if expert >= 0:
                gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
                out[token] += weight * (down[expert].double() @ (F.silu(gate) * up))
    return out


SHAPES: list[Any] = [(1, 8, 3, 32, 16), (7, 4, 4, 24, 40), (300, 6, 2, 64, 32), (5, 16, 4, 33, 17), (0, 4, 2, 16, 16)]


@on_cpu(MOE_EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_against_the_definition(backend, dtype, shape):
    x, gate_up, down, *routing = experts_input(*shape)
    args = (x.to(dtype), gate_up.to(dtype), down.to(dtype), *routing)
    out = moe_experts(*args, backend=backend)
    assert out.dtype == dtype
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (3e-2, 3e-2)
    torch.testing.assert_close(out.double(), by_definition(*args), rtol=rtol, atol=atol)


@on_cpu(MOE_EXPERTS)
@pytest.mark.parametrize("tokens", [6, 200])
@pytest.mark.parametrize("int_dtype", [torch.int32, torch.int64])
def test_experts_elsewhere_add_nothing_and_unused_ones_are_not_touched(backend, tokens, int_dtype):
    x, gate_up, down, weights, ids = experts_input(tokens, 6, 3, 32, 16)
    ids[ids == 2] = -1
    ids[ids == 5] = -7
    gate_up[[2, 5]] = torch.nan
    out = moe_experts(x, gate_up, down, weights, ids.to(int_dtype), backend=backend)
    torch.testing.assert_close(out.double(), by_definition(x, gate_up, down, weights, ids), rtol=1e-4, atol=1e-5)
    nowhere = moe_experts(x, gate_up, down, weights, torch.full_like(ids, -1), backend=backend)
    assert nowhere.equal(torch.zeros_like(x))


@on_cpu(MOE_EXPERTS)
@pytest.mark.parametrize("tokens", [6, 200])
def test_rows_that_others_weight_later(backend, tokens):
    """One expert each, or none: such rows may hold anything before and after."""
    x, gate_up, down, _, ids = experts_input(tokens, 4, 1, 32, 16)
    ids[::3] = -1
    x[::3] = torch.nan
    out = moe_experts(x, gate_up, down, None, ids, backend=backend)
    used = ids[:, 0] >= 0
    expected = by_definition(x[used], gate_up, down, torch.ones(int(used.sum()), 1), ids[used])
    torch.testing.assert_close(out[used].double(), expected, rtol=1e-4, atol=1e-5)


@on_cpu(MOE_EXPERTS)
def test_experts_all_tokens_to_one(backend):
    x, gate_up, down, weights, ids = experts_input(400, 5, 1, 32, 16)
    ids.fill_(3)
    out = moe_experts(x, gate_up, down, weights, ids, backend=backend)
    torch.testing.assert_close(out.double(), by_definition(x, gate_up, down, weights, ids), rtol=1e-4, atol=1e-5)
    assert out.equal(moe_experts(x, gate_up, down, weights, ids, backend=backend))


@on_cpu(MOE_EXPERTS)
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("hidden,inter", [(256, 128), (192, 160), (128, 200)])
def test_experts_with_block_fp8_weights(backend, tokens, hidden, inter):
    """Tight against the dequantised weights, loose against the weights before quantisation."""
    x, gate_up, down, weights, ids = experts_input(tokens, 4, 2, hidden, inter)
    # Rows of unlike size: a scale taken from the wrong block cannot go unnoticed.
    gate_up *= torch.logspace(-1, 1, 2 * inter)[:, None]
    halves = gate_up.view(4, 2, inter, hidden)
    gate_up_codes, gate_up_scale = quantize_block_fp8(halves)
    down_codes, down_scale = quantize_block_fp8(down)
    assert gate_up_scale.shape == (4, 2, -(-inter // 128), -(-hidden // 128))
    out = moe_experts(
        x,
        gate_up_codes.view(4, 2 * inter, hidden),
        down_codes,
        weights,
        ids,
        w_gate_up_scale=gate_up_scale,
        w_down_scale=down_scale,
        backend=backend,
    )
    dequantized = dequantize_block_fp8(gate_up_codes, gate_up_scale, dtype=torch.float32).view_as(gate_up)
    down_dequantized = dequantize_block_fp8(down_codes, down_scale, dtype=torch.float32)
    tight = by_definition(x, dequantized, down_dequantized, weights, ids)
    torch.testing.assert_close(out.double(), tight, rtol=1e-4, atol=1e-4 * tight.abs().max().item())
    loose = by_definition(x, gate_up, down, weights, ids)
    assert (out - loose).norm() < 0.06 * loose.norm()


def quantized_experts(x, gate_up, down):
    """Arguments of moe_experts with everything FP8, and the float32 values those FP8 tensors stand for."""
    experts, hidden, inter = down.shape
    codes, x_scale = quant_fp8_group(x)
    # Rows of unlike size: a scale taken from the wrong block cannot go unnoticed.
    halves = (gate_up * torch.logspace(-1, 1, 2 * inter)[:, None]).view(experts, 2, inter, hidden)
    gate_up_codes, gate_up_scale = quantize_block_fp8(halves)
    down_codes, down_scale = quantize_block_fp8(down)
    arguments = {
        "x": codes,
        "w_gate_up": gate_up_codes.view(experts, 2 * inter, hidden),
        "w_down": down_codes,
        "x_scale": x_scale,
        "w_gate_up_scale": gate_up_scale,
        "w_down_scale": down_scale,
    }
    values = (
        codes.float() * x_scale.repeat_interleave(128, dim=1)[:, :hidden],
        dequantize_block_fp8(gate_up_codes, gate_up_scale, dtype=torch.float32).view_as(gate_up),
        dequantize_block_fp8(down_codes, down_scale, dtype=torch.float32),
    )
    return arguments, values


@on_cpu(MOE_EXPERTS)
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden,inter", [(256, 128), (192, 200)])
def test_experts_with_fp8_activations(backend, scale_fmt, out_dtype, hidden, inter):
    """Against products whose second operand is quantised between them, one token and one expert at a time."""
    x, gate_up, down, weights, ids = experts_input(5, 4, 2, hidden, inter)
    ids[1, 0] = -1
    arguments, (value, gate_up, down) = quantized_experts(x, gate_up, down)
    routing = {"topk_weights": weights, "topk_ids": ids, "out_dtype": out_dtype, "scale_fmt": scale_fmt}
    out = moe_experts(**arguments, **routing, backend=backend)
    assert out.dtype == out_dtype
    expected = torch.zeros(5, hidden)
    for token in range(5):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            if expert >= 0:
                gate, up = (gate_up[expert] @ value[token]).chunk(2)
                codes, scale = quant_fp8_group((F.silu(gate) * up).to(out_dtype)[None], scale_fmt=scale_fmt)
                rounded = codes.float() * scale.repeat_interleave(128, dim=1)[:, :inter]
                expected[token] += weight * (down[expert] @ rounded[0])
    # Another order of float32 additions moves a few values of silu · up to the neighbouring code.
    tolerance = 3e-3 if out_dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 20), experts=st.integers(1, 9), hidden=st.sampled_from([8, 12, 15]), limit=st.integers(0, 40)
)
def test_both_ways_of_the_cpu_backend_agree(tokens, experts, hidden, limit):
    args = experts_input(tokens, experts, min(3, experts), hidden, 8, seed=tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "GROUPED_PAIRS", limit)
        out = moe_experts(*args, backend=cpu.moe_experts_cpu)
    torch.testing.assert_close(out, moe_experts(*args), rtol=1e-4, atol=1e-5)


def test_experts_refuse_what_does_not_fit():
    x, gate_up, down, weights, ids = experts_input(2, 4, 2, 16, 8)
    with pytest.raises(ValueError, match=r"w_gate_up has shape \[4, 15, 16\]; expected \[4, 16, 16\]"):
        moe_experts(x, gate_up[:, 1:], down, weights, ids)
    with pytest.raises(ValueError, match=r"w_gate_up has dtype torch\.float32; expected torch\.bfloat16"):
        moe_experts(x.bfloat16(), gate_up, down, weights, ids)
    with pytest.raises(ValueError, match="only one of w_gate_up_scale and w_down_scale"):
        moe_experts(x, gate_up, down, weights, ids, w_down_scale=torch.ones(4, 1, 1))
    with pytest.raises(ValueError, match=r"w_gate_up_scale has shape \[4, 1, 1\]; expected \[4, 2, 1, 1\]"):
        codes = gate_up.to(torch.float8_e4m3fn), down.to(torch.float8_e4m3fn)
        moe_experts(x, *codes, weights, ids, w_gate_up_scale=torch.ones(4, 1, 1), w_down_scale=torch.ones(4, 1, 1))
    with pytest.raises(ValueError, match=r"x without x_scale has dtype torch\.float8_e4m3fn"):
        moe_experts(x.to(torch.float8_e4m3fn), *codes, weights, ids)
    with pytest.raises(ValueError, match=r"topk_ids without topk_weights has shape \[2, 2\]; expected \[2, 1\]"):
        moe_experts(x, gate_up, down, None, ids)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"out_dtype": None}, "out_dtype is None; it must be given where x is FP8"),
        ({"out_dtype": torch.int32}, r"out_dtype is torch\.int32; expected torch\.float32"),
        ({"scale_fmt": "e8"}, "scale_fmt is 'e8'; expected None or 'ue8m0'"),
        ({"x_scale": torch.ones(2, 2)}, r"x_scale has shape \[2, 2\]; expected \[2, 1\]"),
        ({"w_gate_up_scale": None, "w_down_scale": None}, "x_scale is given without w_gate_up_scale"),
        ({"x_scale": None}, "x without x_scale has dtype"),
        ({"x": torch.ones(2, 16)}, r"x with x_scale has dtype torch\.float32"),
    ],
)
def test_experts_with_fp8_activations_refuse_what_does_not_fit(change, message):
    x, gate_up, down, weights, ids = experts_input(2, 4, 2, 16, 8)
    arguments, _ = quantized_experts(x, gate_up, down)
    arguments |= {"topk_weights": weights, "topk_ids": ids, "out_dtype": torch.bfloat16}
    with pytest.raises(ValueError, match=message):
        moe_experts(**arguments | change)


def test_float_x_has_no_scale_format():
    x, gate_up, down, weights, ids = experts_input(2, 4, 2, 16, 8)
    with pytest.raises(ValueError, match=r"scale_fmt is 'ue8m0', but x is torch\.float32"):
        moe_experts(x, gate_up, down, weights, ids, scale_fmt="ue8m0")
    assert moe_experts(x, gate_up, down, weights, ids, out_dtype=torch.bfloat16).dtype == torch.bfloat16
