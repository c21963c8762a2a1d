"""C kernels: products of few rows, absorption, and how they are built and refused."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch

from dsengine.kernels import native_support
from dsengine.kernels.linear.api import LINEAR, linear
from dsengine.kernels.mla_absorb.api import ABSORB_QUERIES, RELEASE_VALUES, absorb_queries, release_values
from dsengine.kernels.moe_experts.api import MOE_EXPERTS, moe_experts
from dsengine.kernels.native_support import BuildError, c_function, needs_compiler
from dsengine.kernels.registry import OPERATIONS, select_kernels

CPU = torch.device("cpu")
compiled = pytest.mark.skipif(needs_compiler(CPU) is not None, reason=f"the C kernels: {needs_compiler(CPU)}")


def on_cpu(operation):
    names = [backend.name for backend in operation.backends if backend.is_available(CPU)[0]]
    return pytest.mark.parametrize("backend", [operation.backend(name).load() for name in names], ids=names)


@pytest.fixture(autouse=True)
def outputs_start_as_nan(monkeypatch):
    empty = torch.empty

    def spoilt(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", spoilt)


@on_cpu(LINEAR)
@pytest.mark.parametrize("width", [1, 15, 16, 130, 256])
@pytest.mark.parametrize("outputs", [1, 3, 4, 7, 96])
def test_linear(backend, width, outputs):
    weight = torch.randn(outputs, width)
    for rows in (0, 1, 2, 3, 4, 5, 7, 16, 17, 70):
        x = torch.randn(rows, width + 3)[:, 1 : width + 1]
        expected = (x.double() @ weight.double().T).float()
        torch.testing.assert_close(linear(x, weight, backend=backend), expected, atol=3e-5, rtol=1e-5)


@on_cpu(LINEAR)
def test_linear_in_other_dtypes_and_layouts(backend):
    x, weight = torch.randn(3, 32), torch.randn(8, 32)
    for dtype in (torch.bfloat16, torch.float64):
        actual = linear(x.to(dtype), weight.to(dtype), backend=backend)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), x @ weight.T, atol=0.1, rtol=0.02)
    strided = torch.randn(32, 8).T
    torch.testing.assert_close(linear(x, strided, backend=backend), x @ strided.T, atol=1e-5, rtol=1e-5)
    spread = torch.randn(32, 3).T
    torch.testing.assert_close(linear(spread, weight, backend=backend), spread @ weight.T, atol=1e-5, rtol=1e-5)


@on_cpu(LINEAR)
def test_what_is_not_a_number_stays_in_its_row_and_column(backend):
    x, weight = torch.randn(3, 40), torch.randn(6, 40)
    x[1, 7], weight[2, 3] = torch.nan, torch.inf
    out = linear(x, weight, backend=backend)
    assert out[1].isnan().all() and not out[[0, 2]][:, [0, 1, 3, 4, 5]].isnan().any()
    assert out[[0, 2], 2].isinf().all()


@compiled
def test_a_rows_product_does_not_depend_on_the_others_to_the_last_bit():
    native = LINEAR.backend("native").load()
    x, weight = torch.randn(16, 200), torch.randn(50, 200)
    whole = linear(x, weight, backend=native)
    for rows in range(1, 16):
        assert linear(x[:rows], weight, backend=native).equal(whole[:rows])
        assert linear(x[-rows:], weight, backend=native).equal(whole[-rows:])


@compiled
def test_several_threads_give_the_bits_of_one():
    native = LINEAR.backend("native").load()
    x, weight = torch.randn(5, 1024), torch.randn(1000, 1024)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(linear(x, weight, backend=native))
    finally:
        torch.set_num_threads(threads)
    assert all(result.equal(results[0]) for result in results)


def test_linear_names_what_does_not_fit():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight has shape \[4, 9\]; expected \[any, 8\]"):
        linear(x, torch.zeros(4, 9))
    with pytest.raises(ValueError, match=r"weight has dtype torch\.bfloat16; expected torch\.float32"):
        linear(x, torch.zeros(4, 8, dtype=torch.bfloat16))


def absorption(tokens, heads, nope, rank, value, dtype=torch.float32):
    """Queries [T, H, nope], attended latents [T, H, R] and the two views of one kv_b_proj, as the model has them."""
    kv_b = (torch.randn(heads * (nope + value), rank) * rank**-0.5).to(dtype).view(heads, -1, rank)
    query = torch.randn(tokens, heads, nope + 6).to(dtype)[..., :nope]
    return query, torch.randn(tokens, heads, rank).to(dtype), *kv_b.split([nope, value], dim=1)


SHAPES = [
    (0, 2, 8, 16, 8),
    (1, 4, 128, 512, 128),
    (3, 1, 5, 37, 11),
    (6, 3, 16, 70, 9),
    (16, 2, 32, 64, 33),
    (70, 2, 8, 16, 4),
]


@on_cpu(ABSORB_QUERIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_absorb_queries(backend, shape):
    query, _, w_uk, _ = absorption(*shape)
    expected = torch.einsum("thn,hnr->thr", query.double(), w_uk.double()).float()
    torch.testing.assert_close(absorb_queries(query, w_uk, backend=backend), expected, atol=1e-5, rtol=1e-5)


@on_cpu(RELEASE_VALUES)
@pytest.mark.parametrize("shape", SHAPES)
def test_release_values(backend, shape):
    _, attended, _, w_uv = absorption(*shape)
    expected = torch.einsum("thr,hvr->thv", attended.double(), w_uv.double()).float()
    torch.testing.assert_close(release_values(attended, w_uv, backend=backend), expected, atol=1e-5, rtol=1e-5)


@on_cpu(ABSORB_QUERIES)
def test_absorption_in_bfloat16(backend):
    query, _, w_uk, _ = absorption(3, 2, 32, 64, 8, torch.bfloat16)
    actual = absorb_queries(query, w_uk, backend=backend)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), absorb_queries(query.float(), w_uk.float()), atol=0.05, rtol=0.02)


def test_absorption_names_what_does_not_fit():
    query, attended, _, w_uv = absorption(2, 2, 8, 16, 4)
    with pytest.raises(ValueError, match=r"w_uk has shape \[2, 4, 16\]; expected \[2, 8, any\]"):
        absorb_queries(query, w_uv)
    with pytest.raises(ValueError, match=r"w_uv has shape \[1, 4, 16\]; expected \[2, any, 16\]"):
        release_values(attended, w_uv[:1])


@compiled
def test_an_expert_with_more_tokens_than_are_computed_at_a_time():
    native = MOE_EXPERTS.backend("native").load()
    x, w_gate_up, w_down = torch.randn(150, 32), torch.randn(4, 24, 32), torch.randn(4, 32, 12)
    ids = torch.tensor([2, 0, -1]).repeat(50).sort().values[:, None]
    ids[60:] = 2
    weights = torch.rand(150, 1)
    actual = moe_experts(x, w_gate_up, w_down, weights, ids, backend=native)
    torch.testing.assert_close(actual, moe_experts(x, w_gate_up, w_down, weights, ids), atol=1e-4, rtol=1e-4)


# How they are built.


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Builds go to a folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_support.loaded_kernels.cache_clear()
    yield tmp_path / "dsengine" / "native"
    native_support.loaded_kernels.cache_clear()


@compiled
def test_the_library_is_built_once_and_kept_where_only_its_owner_writes(fresh, monkeypatch):
    native_support.loaded_kernels()
    [built] = fresh.iterdir()
    assert built.suffix == ".so" and fresh.stat().st_mode & 0o022 == 0
    native_support.loaded_kernels.cache_clear()
    monkeypatch.setattr(native_support, "_run", lambda *args: pytest.fail("it was built already"))
    function = c_function("linear", *itertools.repeat(native_support.Pointer, 7))
    assert callable(function)


@compiled
def test_a_folder_that_others_can_write_to_is_not_trusted(fresh):
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    native_support.loaded_kernels()
    assert list(fresh.iterdir()) == []


@compiled
def test_other_flags_or_sources_are_other_libraries():
    sources = sorted(Path(native_support.__file__).parent.glob("*/native.c"))
    assert len(sources) > 5
    compiler = os.path.realpath("/bin/sh")
    names = {native_support._fingerprint([compiler, *flags], sources[:n]) for flags in ((), ("-O1",)) for n in (1, 2)}
    assert len(names) == 4


def test_without_a_compiler_torch_serves_and_the_reason_is_told(fresh, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    kernels = select_kernels(CPU)
    assert "native" not in kernels.table().values()
    assert kernels.table()["linear"] == "torch" and kernels.table()["mla_decode"] == "cpu"
    reasons = {operation: reason for operation, _, reason in kernels.explain()}
    assert "native needs a C compiler, and there is neither cc nor gcc" in reasons["linear"]


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'kernels.c:1: error: out of ideas' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(BuildError, match="out of ideas"):
        native_support.loaded_kernels()
    assert "out of ideas" in (needs_compiler(CPU) or "")
    assert list(fresh.iterdir()) == []


@compiled
def test_every_operation_with_a_c_kernel_prefers_it_on_a_cpu():
    table = select_kernels(CPU).table()
    for operation in OPERATIONS:
        if "native" in [backend.name for backend in operation.backends]:
            assert table[operation.name] == "native"
