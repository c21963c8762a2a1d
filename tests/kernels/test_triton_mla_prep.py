"""Triton kernels that write the latent cache and read it back, against their specifications."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from dsengine.kernels.fp8_kv import dequantize_latents, fp8_kv_bytes, quantize_latents
from dsengine.kernels.gather_latents.api import gather_latents
from dsengine.kernels.gather_latents.triton import gather_latents_triton
from dsengine.kernels.mla_prep.api import mla_prep
from dsengine.kernels.mla_prep.triton import mla_prep_triton
from dsengine.kernels.triton_support import e4m3_code, e4m3_code_to_bf16

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


@triton.jit
def _encode_kernel(x, codes, decoded, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    code = e4m3_code(tl.load(x + place))
    tl.store(codes + place, code)
    tl.store(decoded + place, e4m3_code_to_bf16(code))


def test_codes_are_those_of_the_format(device):
    """Every code, every edge between two and its neighbours, both signs, what saturates and what is not finite."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    edges = (values[1:] + values[:-1]) / 2
    above, below = (edges.nextafter(torch.tensor(end)) for end in (torch.inf, 0.0))
    others = torch.tensor([449.0, 464.0, 1e9, torch.inf, 2**-10, 1e-30, 1e-42, torch.nan])
    x = torch.cat((values, edges, above, below, others, torch.randn(511) * 20))
    x = torch.cat((x, -x))
    x = torch.nn.functional.pad(x, (0, -len(x) % 256)).to(device)
    codes, decoded = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x, dtype=torch.bfloat16)
    _encode_kernel[(len(x) // 256,)](x, codes, decoded, SIZE=256)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    finite = ~x.isnan()
    assert codes[finite].equal(expected.view(torch.uint8)[finite])
    assert decoded[finite].float().equal(expected.float()[finite])
    assert (codes[~finite] & 0x7F).eq(0x7F).all()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def close(actual, expected):
    """Equal up to one rounding in the dtype: both computed in float32, in orders that differ."""
    assert actual.dtype == expected.dtype and actual.is_contiguous()
    unit = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=unit, atol=unit * 2**-6, equal_nan=True)


def inputs(device, dtype, tokens, heads, rank=512, dim=64, index=torch.int64):
    """Queries and latents as the model passes them: slices of wider projections; every third token is not stored."""
    query = torch.randn(tokens, heads, dim + 128, device=device).to(dtype)[..., 128:]
    kv_a = (torch.randn(tokens, rank + dim + 16, device=device) * 3).to(dtype)[:, 16:]
    angles = torch.outer(torch.arange(40).double(), 10000 ** (-torch.arange(0, dim, 2).double() / dim))
    table = torch.cat((angles.cos(), angles.sin()), dim=1).float().to(device)
    positions = torch.randint(0, 40, (tokens,), device=device).to(index)
    slots = torch.randperm(48, device=device)[:tokens].to(index)
    slots[2::3] = -1
    return {
        "q_rope": query,
        "kv_a": kv_a,
        "kv_norm_weight": torch.rand(rank, device=device),
        "eps": EPS,
        "cos_sin": table,
        "positions": positions,
        "slot_mapping": slots,
    }


def check_written(cache, slots, entries):
    """The cache holds `entries` at their slots and what it held before, 0x5A bytes, everywhere else."""
    flat = cache.view(-1, cache.shape[2])
    stored = slots >= 0
    assert flat[slots[stored].long()].equal(entries[stored])
    others = torch.ones(flat.shape[0], dtype=torch.bool, device=cache.device)
    others[slots[stored].long()] = False
    assert flat[others].view(torch.uint8).eq(0x5A).all()


def marked(device, shape, dtype):
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.full(size, 0x5A, dtype=torch.uint8, device=device).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,heads,index", [(1, 128, torch.int64), (4, 3, torch.int32), (3, 0, torch.int64)])
def test_preparation_with_a_float_cache(device, dtype, tokens, heads, index):
    args = inputs(device, dtype, tokens, heads, index=index)
    cache, expected_cache = (marked(device, (6, 8, 576), dtype) for _ in range(2))
    q_out, rows = mla_prep(**args, kv_cache=cache, backend=mla_prep_triton)
    expected_q, expected_rows = mla_prep(**args, kv_cache=expected_cache)
    close(q_out, expected_q)
    close(rows, expected_rows)
    check_written(cache, args["slot_mapping"], rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank,dim", [(512, 64), (384, 6)])
def test_preparation_with_an_fp8_cache(device, dtype, rank, dim):
    """Bit for bit what the specification stores for the same rounded latents; near what it stores for its own."""
    args = inputs(device, dtype, 4, 5, rank, dim)
    cache, expected_cache = (marked(device, (6, 8, fp8_kv_bytes(rank, dim)), torch.uint8) for _ in range(2))
    q_out, rows = mla_prep(**args, kv_cache=cache, backend=mla_prep_triton)
    _, unquantised = mla_prep(**args, kv_cache=marked(device, (6, 8, rank + dim), dtype), backend=mla_prep_triton)
    entries = quantize_latents(unquantised, rank)
    check_written(cache, args["slot_mapping"], entries)
    assert rows.equal(dequantize_latents(entries, rank, dim, dtype))
    expected_q, expected_rows = mla_prep(**args, kv_cache=expected_cache)
    close(q_out, expected_q)
    # A code on the edge may fall to either side: 2^-3 relative. k_rope is rounded twice.
    torch.testing.assert_close(rows.float(), expected_rows.float(), rtol=2**-3, atol=2e-3)


def test_latents_that_are_zero_huge_or_not_finite(device):
    args = inputs(device, torch.float32, 5, 1)
    kv_a = args["kv_a"]
    kv_a[0, :512] = 0
    kv_a[1, :512] *= 1e-20
    kv_a[2, 7], kv_a[3, 515] = torch.nan, torch.inf
    kv_a[4, :128] *= 1e-3  # groups of very different sizes; e4m3's subnormals are reached
    kv_a[4, 128:131] = torch.tensor([1e6, 3e2, -5e3])
    caches = [marked(device, (6, 8, 656), torch.uint8) for _ in range(2)]
    _, rows = mla_prep(**args, kv_cache=caches[0], backend=mla_prep_triton)
    _, expected = mla_prep(**args, kv_cache=caches[1])
    assert rows.isnan().equal(expected.isnan()) and rows.isinf().equal(expected.isinf())
    assert rows.isnan()[2, :128].all()
    torch.testing.assert_close(rows, expected, rtol=2**-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("rank,dim", [(512, 64), (384, 6), (4, 2)])
@pytest.mark.parametrize("stored,dtype", [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)])
def test_gather_from_a_float_cache_is_a_copy(device, stored, dtype, rank, dim, count, index):
    cache = torch.randn(5, 4, rank + dim, device=device).to(stored)
    slots = torch.randint(0, 20, (count,), device=device).to(index)
    rows = gather_latents(cache, slots, rank=rank, dtype=dtype, backend=gather_latents_triton)
    assert rows.dtype == dtype and rows.equal(cache.view(20, -1)[slots.long()].to(dtype))
    assert rows.equal(gather_latents(cache, slots, rank=rank, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank,dim", [(512, 64), (384, 6)])
def test_gather_from_an_fp8_cache_dequantises(device, dtype, rank, dim):
    rows = torch.randn(20, rank + dim, device=device) * torch.logspace(-3, 3, rank + dim, device=device)
    cache = quantize_latents(rows, rank).view(5, 4, -1)
    slots = torch.tensor([19, 0, 3, 3, 11], device=device)
    gathered = gather_latents(cache, slots, rank=rank, dtype=dtype, backend=gather_latents_triton)
    assert gathered.equal(gather_latents(cache, slots, rank=rank, dtype=dtype))
    assert gathered.equal(dequantize_latents(cache.view(20, -1)[slots], rank, dim, dtype))


def test_what_preparation_stores_is_what_the_gather_reads(device):
    args = inputs(device, torch.bfloat16, 4, 2)
    for cache in (marked(device, (6, 8, 656), torch.uint8), marked(device, (6, 8, 576), torch.bfloat16)):
        _, rows = mla_prep(**args, kv_cache=cache, backend=mla_prep_triton)
        stored = args["slot_mapping"] >= 0
        slots = args["slot_mapping"][stored]
        read = gather_latents(cache, slots, rank=512, dtype=torch.bfloat16, backend=gather_latents_triton)
        assert read.equal(rows[stored])
