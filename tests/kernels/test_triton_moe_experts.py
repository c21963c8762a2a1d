"""The experts' kernels against the reference: both paths, every type, ragged sizes, experts that live elsewhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from dsengine.kernels.moe_experts.api import moe_experts
from dsengine.kernels.moe_experts.triton_configs import (
    MAX_SHARED,
    candidate_configs,
    default_config,
    direct_splits,
    shared_bytes,
)
from dsengine.kernels.quant_fp8_group.api import quant_fp8_group
from dsengine.quant.block_fp8 import quantize_block_fp8

pytest.importorskip("triton")
from dsengine.kernels.moe_experts.triton import Experts, find_config, moe_experts_triton
from dsengine.kernels.moe_experts.triton_align import align_pairs, most_tiles

HOPPER, AMPERE = (9, 0), (8, 0)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch):
    """Scratch and outputs start as NaN and as numbers no pair or expert has."""

    stock = torch.empty

    def empty(*args, **kwargs):
        made = stock(*args, **kwargs)
        if made.dtype == torch.float8_e4m3fn:
            made.view(torch.uint8).fill_(0x7F)
            return made
        return made.fill_(torch.nan if made.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", empty)


def problem(tokens, experts, top_k, hidden, inter, device, *, x=BF16, w=BF16, seed=0) -> dict[str, Any]:
    """Arguments of moe_experts; rows of the weights are of unlike size, so that no scale can pass for another."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(tokens, hidden, generator=generator)
    gate_up = torch.randn(experts, 2 * inter, hidden, generator=generator) * hidden**-0.5
    gate_up *= torch.logspace(-0.5, 0.5, 2 * inter)[:, None]
    down = torch.randn(experts, hidden, inter, generator=generator) * inter**-0.5
    order = torch.rand(tokens, experts, generator=generator).argsort(dim=1)
    made: dict[str, Any] = {
        "topk_weights": torch.rand(tokens, top_k, generator=generator),
        "topk_ids": order[:, :top_k].contiguous(),
    }
    if w == torch.float8_e4m3fn:
        codes, made["w_gate_up_scale"] = quantize_block_fp8(gate_up.view(experts, 2, inter, hidden))
        made["w_gate_up"] = codes.view(experts, 2 * inter, hidden)
        made["w_down"], made["w_down_scale"] = quantize_block_fp8(down)
    else:
        made |= {"w_gate_up": gate_up.to(w), "w_down": down.to(w)}
    if x == torch.float8_e4m3fn:
        made["x"], made["x_scale"] = quant_fp8_group(value)
        made["out_dtype"] = BF16
    else:
        made["x"] = value.to(x)
    return {name: item.to(device) if isinstance(item, torch.Tensor) else item for name, item in made.items()}


w8a8 = partial(problem, x=torch.float8_e4m3fn, w=torch.float8_e4m3fn)
weight_only = partial(problem, w=torch.float8_e4m3fn)
KINDS: list[Any] = [problem, weight_only, w8a8]


def run(arguments, change=None, capability=HOPPER):
    """The kernels with other tiles than the default ones, or as for another GPU."""
    x = arguments["x"]
    names = ("w_gate_up", "w_down", "w_gate_up_scale", "w_down_scale")
    experts = Experts(*(arguments.get(name) for name in names))
    config = {**find_config(x, experts, arguments["topk_ids"].shape[1], capability), **(change or {})}
    return moe_experts(**arguments, backend=partial(moe_experts_triton, config=config, capability=capability))


def compare(out, arguments):
    """Against the reference on the same rounded inputs. Two bfloat16 roundings separate them (silu · up, and the row of
    an expert), and where activations are FP8 a value of silu · up may fall to the neighbouring code."""
    expected = moe_experts(**arguments)
    assert out.dtype == expected.dtype
    assert out.isfinite().all()
    size = expected.float().pow(2).mean().sqrt().item()
    error = (out.float() - expected.float()).pow(2).mean().sqrt().item()
    is_exact = arguments["x"].dtype == torch.float32
    assert error <= (1e-6 if is_exact else 6e-3) * size
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.02, atol=(1e-5 if is_exact else 0.04) * size)


@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "weight-only", "W8A8"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_both_paths_on_whole_blocks(device, kind, tokens):
    arguments = kind(tokens, 4, 2, 256, 128, device)
    compare(moe_experts(**arguments, backend=moe_experts_triton), arguments)


@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "weight-only", "W8A8"])
@pytest.mark.parametrize("tokens,hidden,inter", [(3, 208, 144), (18, 176, 48), (2, 104, 72), (17, 72, 136)])
def test_ragged_sizes(device, kind, tokens, hidden, inter):
    """Widths that fill neither blocks nor, in the last two, rows aligned for TMA."""
    arguments = kind(tokens, 3, 2, hidden, inter, device, seed=tokens)
    arguments["topk_ids"][0, 1] = -1
    compare(moe_experts(**arguments, backend=moe_experts_triton), arguments)


@pytest.mark.parametrize("x", [torch.float32, torch.float16])
@pytest.mark.parametrize("w", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("tokens", [2, 17])
def test_other_float_types(device, x, w, tokens):
    arguments = problem(tokens, 3, 2, 64, 48, device, x=x, w=w or x)
    compare(moe_experts(**arguments, backend=moe_experts_triton), arguments)


def test_float64_is_computed_as_float32(device):
    arguments = problem(3, 3, 2, 32, 32, device, x=torch.float64, w=torch.float64)
    out = moe_experts(**arguments, backend=moe_experts_triton)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, moe_experts(**arguments).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("tokens", [4, 18])
def test_scale_formats_and_float32_results(device, scale_fmt, tokens):
    """With float32 results only the order of summation separates kernel and reference, but for flipped codes."""
    arguments = w8a8(tokens, 4, 2, 128, 256, device) | {"scale_fmt": scale_fmt, "out_dtype": torch.float32}
    compare(moe_experts(**arguments, backend=moe_experts_triton), arguments)


@pytest.mark.parametrize("kind", [weight_only, w8a8], ids=["weight-only", "W8A8"])
@pytest.mark.parametrize("tokens", [3, 17])
def test_without_fp8_instructions(device, kind, tokens):
    """As for an A100: codes go in and out as integers. Exactly what FP8 tensor cores would be given."""
    arguments = kind(tokens, 3, 2, 128, 128, device)
    compare(run(arguments, capability=AMPERE), arguments)


@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "weight-only", "W8A8"])
@pytest.mark.parametrize("swapped,block_m", [(0, 16), (1, 64), (0, 64)])
def test_either_operand_order(device, kind, swapped, block_m):
    arguments = kind(19, 3, 2, 128, 128, device)
    compare(run(arguments, {"swapped": swapped, "block_m": block_m, "group_m": 2}), arguments)


@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "weight-only", "W8A8"])
@pytest.mark.parametrize("splits", [3, 8])
def test_splits_of_gate_and_up(device, kind, splits):
    """Also more parts than there are steps: the last ones add nothing."""
    arguments = kind(2, 3, 2, 512, 96, device)
    compare(run(arguments, {"gate_splits": splits}), arguments)


@pytest.mark.parametrize("tokens", [6, 40])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_experts_elsewhere_add_nothing_and_unused_ones_are_not_touched(device, tokens, dtype):
    arguments = problem(tokens, 6, 3, 64, 64, device)
    ids = arguments["topk_ids"]
    ids[ids == 2] = -1
    ids[ids == 5] = -7
    arguments["w_gate_up"][[2, 5]] = torch.nan
    arguments["topk_ids"] = ids.to(dtype)
    compare(moe_experts(**arguments, backend=moe_experts_triton), arguments)
    arguments["topk_ids"] = torch.full_like(ids, -1)
    nowhere = moe_experts(**arguments, backend=moe_experts_triton)
    assert nowhere.equal(torch.zeros_like(nowhere))


@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "weight-only", "W8A8"])
@pytest.mark.parametrize("tokens", [6, 40])
def test_rows_that_others_weight_later(device, kind, tokens):
    """The same products as with weights of 1; what is in rows without an expert, NaN here, goes nowhere."""
    arguments = kind(tokens, 4, 1, 128, 128, device)
    ids, weights = arguments["topk_ids"], torch.ones_like(arguments["topk_weights"])
    ids[::3] = -1
    expected = moe_experts(**arguments | {"topk_weights": weights}, backend=moe_experts_triton)
    if "x_scale" in arguments:
        arguments["x_scale"][::3] = torch.nan
    else:
        arguments["x"][::3] = torch.nan
    out = moe_experts(**arguments | {"topk_weights": None}, backend=moe_experts_triton)
    used = ids[:, 0] >= 0
    assert out[used].equal(expected[used])


@pytest.mark.parametrize("tokens", [4, 40])
def test_all_tokens_to_one_expert_and_an_expert_named_twice(device, tokens):
    arguments = problem(tokens, 3, 2, 64, 64, device)
    arguments["topk_ids"][:, 0] = 1
    arguments["topk_ids"][:, 1] = -1
    arguments["topk_ids"][1] = 2
    compare(moe_experts(**arguments, backend=moe_experts_triton), arguments)


@pytest.mark.parametrize("kind", KINDS, ids=["bf16", "weight-only", "W8A8"])
@pytest.mark.parametrize("tokens,other", [(1, 7), (18, 29)])
def test_a_token_does_not_depend_on_the_others(device, kind, tokens, other):
    """Bit for bit, within a path: the same rows among more and with neighbours of another kind."""
    few = kind(other, 4, 2, 128, 128, device)
    per_token = ("x", "x_scale", "topk_weights", "topk_ids")
    fewer = {name: item[-tokens:] if name in per_token else item for name, item in few.items()}
    whole, part = (moe_experts(**arguments, backend=moe_experts_triton) for arguments in (few, fewer))
    assert whole[-tokens:].equal(part)


def test_strided_inputs(device):
    arguments = problem(5, 3, 2, 64, 64, device)
    strided = dict(arguments)
    for name in ("x", "topk_ids", "topk_weights"):
        strided[name] = arguments[name].repeat_interleave(2, dim=1)[:, ::2]
    wide = torch.cat((arguments["w_gate_up"], arguments["w_gate_up"]), dim=2)
    strided["w_gate_up"] = wide[..., :64]
    out = moe_experts(**strided, backend=moe_experts_triton)
    assert out.equal(moe_experts(**arguments, backend=moe_experts_triton))


@pytest.mark.parametrize("tokens,experts,block_m", [(1, 3, 16), (50, 7, 16), (130, 4, 32), (3, 200, 16)])
def test_alignment(device, tokens, experts, block_m):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, experts, (tokens, 2), generator=generator).to(device)
    tiles = align_pairs(ids, experts, block_m)
    count = int(tiles.count)
    assert count <= tiles.most == most_tiles(ids.numel(), experts, block_m)
    by_tile = tiles.pairs.view(tiles.most, block_m)[:count].tolist()
    seen = []
    for expert, pairs in zip(tiles.expert[:count].tolist(), by_tile, strict=True):
        real = [pair for pair in pairs if pair != ids.numel()]
        assert real == sorted(real) and pairs[len(real) :] == [ids.numel()] * (block_m - len(real)) and real
        seen += [(expert, pair) for pair in real]
    wanted = [(expert, pair) for pair, expert in enumerate(ids.flatten().tolist()) if expert >= 0]
    assert seen == sorted(wanted)


def test_alignment_takes_more_pairs_than_a_program_looks_at_once(device, monkeypatch):
    monkeypatch.setattr("dsengine.kernels.moe_experts.triton_align.CHUNK", 128)
    test_alignment(device, 130, 4, 32)


def test_splits_depend_on_the_model_alone():
    assert direct_splits(2048, 7168, 8, 64, 128) == 1  # V3 on one GPU: enough programs as it is
    assert direct_splits(256, 7168, 8, 64, 128) == 8  # an eighth of it
    assert direct_splits(64, 256, 1, 64, 128) == 1  # no more parts than half the steps


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("x,fp8", [(torch.float8_e4m3fn, True), (BF16, True), (BF16, False)])
def test_candidates_begin_with_the_default_and_keep_the_splits(tokens, x, fp8):
    candidates = candidate_configs(tokens, 8, 256, 2048, 7168, x=x, fp8_weights=fp8)
    assert len(candidates) > 4
    assert len({candidate["gate_splits"] for candidate in candidates}) == 1
    assert candidates[0] == default_config(tokens, 8, 256, 2048, 7168, x=x, fp8_weights=fp8, capability=HOPPER)


def test_candidates_fit_into_shared_memory_and_exist_for_any_number_of_tokens():
    """Sizes as compiled for compute capability 9.0: see benchmarks.kernel_binaries."""
    few = default_config(16, 8, 256, 2048, 7168, x=torch.float8_e4m3fn, fp8_weights=True, capability=HOPPER)
    assert shared_bytes(few, 1, 1) + 128 >= 90144
    for tokens in (1, 17, 300, 1 << 17):
        candidates = candidate_configs(tokens, 8, 256, 2048, 7168, x=BF16, fp8_weights=True)
        assert len(candidates) > 1
        assert max(shared_bytes(candidate, 2, 1) for candidate in candidates) <= MAX_SHARED


@pytest.mark.parametrize("name", ["block_k", "gate_block_n", "down_block_n"])
def test_tiles_that_cross_a_block_are_refused(device, name):
    with pytest.raises(ValueError, match=f"{name} is 256; it must divide 128"):
        run(w8a8(2, 3, 2, 64, 64, device), {name: 256})
