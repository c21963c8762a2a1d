"""Expanded attention and the log-sum-exp merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsengine.kernels.merge_attention.api import MERGE_ATTENTION, merge_attention
from dsengine.kernels.mla_prefill.api import MLA_PREFILL, MlaPrefill, mla_prefill
from dsengine.kernels.mla_prefill.ref import mla_prefill_ref

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def on_cpu(operation):
    names = [backend.name for backend in operation.backends if backend.is_available(CPU)[0]]
    return pytest.mark.parametrize("backend", [operation.backend(name).load() for name in names], ids=names)


def prefix_sum(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(queries, keys, heads, *, dtype=torch.float32, width=192, value=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(queries), heads, width, generator=generator).to(dtype)
    # K and V as the model makes them: slices of one projection, so strided.
    kv = torch.randn(sum(keys), heads, width + value, generator=generator).to(dtype)
    return q, kv[..., :width], kv[..., width:], prefix_sum(queries), prefix_sum(keys), 0.1352


def attend(args: Any, causal: bool, backend: MlaPrefill = mla_prefill_ref) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = mla_prefill(*args, causal=causal, backend=backend)
    assert lse is not None
    return out, lse


def by_definition(args, causal):
    """float64, one query and one head at a time."""
    q, k, v, cu_q, cu_k, scale = args
    cu_q, cu_k = cu_q.tolist(), cu_k.tolist()
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for request in range(len(cu_q) - 1):
        queries, keys = range(cu_q[request], cu_q[request + 1]), range(cu_k[request], cu_k[request + 1])
        for j, t in enumerate(queries):
            seen = len(keys) - len(queries) + j + 1 if causal else len(keys)
            if seen <= 0:
                continue
            span = slice(keys.start, keys.start + seen)
            for head in range(q.shape[1]):
                scores = k[span, head].double() @ q[t, head].double() * scale
                lse[t, head] = scores.logsumexp(0)
                out[t, head] = scores.softmax(0) @ v[span, head].double()
    return out, lse


SHAPES: dict[str, Any] = {
    "one token": ((1,), (1,)),
    "one query, many keys": ((1,), (70,)),
    "square": ((33,), (33,)),
    "several": ((5, 1, 17), (5, 9, 40)),
    "no keys for some": ((4, 3), (0, 3)),
    "more queries than keys": ((9, 2), (4, 2)),
    "no queries for some": ((0, 6), (5, 6)),
}


@on_cpu(MLA_PREFILL)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_the_definition(backend, causal, dtype, shape):
    args = inputs(shape[0], shape[1], 3, dtype=dtype)
    out, lse = attend(args, causal, backend)
    expected, expected_lse = by_definition(args, causal)
    assert out.dtype == dtype and lse.dtype == torch.float32
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    assert out[lse.isneginf()].count_nonzero() == 0


@on_cpu(MLA_PREFILL)
@pytest.mark.parametrize("queries,keys", [((0,), (4,)), ((3,), (0,)), ((), ())])
def test_empty(backend, queries, keys):
    out, lse = attend(inputs(queries, keys, 2), True, backend)
    assert out.shape == (sum(queries), 2, 128) and out.count_nonzero() == 0
    assert lse.shape == (sum(queries), 2) and lse.isneginf().all()


@on_cpu(MLA_PREFILL)
def test_real_head_count_and_a_long_chunk(backend):
    args = inputs((150,), (700,), 16)
    out, lse = attend(args, True, backend)
    ref_out, ref_lse = attend(args, True)
    torch.testing.assert_close(out, ref_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, ref_lse, rtol=1e-4, atol=1e-5)


@on_cpu(MLA_PREFILL)
def test_lse_can_be_left_out_and_host_lengths_change_nothing(backend):
    args = inputs((5, 3), (5, 9), 2)
    out, lse = mla_prefill(*args, causal=True, backend=backend)
    assert lse is not None
    bare, none = mla_prefill(*args, causal=True, need_lse=False, seqlens_q=(5, 3), seqlens_k=(5, 9), backend=backend)
    assert none is None
    torch.testing.assert_close(bare, out)


@on_cpu(MLA_PREFILL)
def test_a_prefix_merged_with_the_chunk_is_the_whole(backend):
    q, k, v, cu, _, scale = inputs((12,), (12,), 2)
    new, split = prefix_sum((7,)), 5
    recent = attend((q[split:], k[split:], v[split:], new, new, scale), True, backend)
    earlier = attend((q[split:], k[:split], v[:split], new, prefix_sum((split,)), scale), False, backend)
    whole = attend((q, k, v, cu, cu, scale), True)
    out, lse = merge_attention(*earlier, *recent)
    torch.testing.assert_close(out, whole[0][split:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, whole[1][split:], rtol=1e-4, atol=1e-5)


def test_refuses_what_does_not_fit():
    q, k, v, cu_q, cu_k, scale = inputs((4,), (6,), 2)
    with pytest.raises(ValueError, match=r"k has shape \[6, 2, 191\]; expected \[any, 2, 192\]"):
        mla_prefill(q, k[..., :191], v, cu_q, cu_k, scale, causal=True)
    with pytest.raises(ValueError, match=r"v has shape \[5, 2, 128\]; expected \[6, 2, any\]"):
        mla_prefill(q, k, v[:5], cu_q, cu_k, scale, causal=True)
    with pytest.raises(ValueError, match=r"seqlens_k is \(5,\); expected 1 lengths that sum to 6"):
        mla_prefill(q, k, v, cu_q, cu_k, scale, causal=True, seqlens_k=(5,))


@on_cpu(MERGE_ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_ignores_parts_without_keys(backend, dtype):
    out = torch.randn(4, 2, 8).to(dtype)
    lse = torch.randn(4, 2)
    nothing = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    for pair in ((out, lse, *nothing), (*nothing, out, lse)):
        merged = merge_attention(*pair, backend=backend)
        assert merged[0].equal(out) and merged[1].equal(lse)
    empty = merge_attention(*nothing, *nothing, backend=backend)
    assert empty[0].count_nonzero() == 0 and empty[1].isneginf().all()


@on_cpu(MERGE_ATTENTION)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), gap=st.sampled_from([0.0, 5.0, 90.0, 500.0]), tokens=st.integers(0, 5))
def test_merge_is_exact_symmetric_and_does_not_overflow(backend, seed, gap, tokens):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(tokens, 3, 7, generator=generator) for _ in "ab")
    lse_a, lse_b = torch.randn(tokens, 3, generator=generator) + gap, torch.randn(tokens, 3, generator=generator)
    out, lse = merge_attention(a, lse_a, b, lse_b, backend=backend)
    share = torch.sigmoid(lse_a.double() - lse_b.double()).unsqueeze(-1)
    torch.testing.assert_close(out.double(), share * a + (1 - share) * b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), torch.logaddexp(lse_a.double(), lse_b.double()))
    mirrored = merge_attention(b, lse_b, a, lse_a, backend=backend)
    torch.testing.assert_close(mirrored[0], out)
