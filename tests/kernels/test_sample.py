"""Sampling: the filters, the distribution, and that a row's draw is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsengine.kernels.sample import cpu
from dsengine.kernels.sample.api import SAMPLE, sample
from dsengine.kernels.sample.ref import uniform

CPU = torch.device("cpu")
NAMES = [backend.name for backend in SAMPLE.backends if backend.is_available(CPU)[0]]
BACKENDS = pytest.mark.parametrize("backend", [SAMPLE.backend(name).load() for name in NAMES], ids=NAMES)
# 0.999 quantile of chi-square by degrees of freedom
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def draw(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, positions=None, backend):
    rows = logits.shape[0]

    def column(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(rows).contiguous()

    return sample(
        logits,
        column(temperature, torch.float32),
        column(top_k, torch.int64),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        torch.zeros(rows, dtype=torch.int64) if seeds is None else column(seeds, torch.int64),
        torch.arange(rows) if positions is None else column(positions, torch.int64),
        backend=backend,
    )


def filtered(logits, temperature, top_k, top_p, min_p):
    """The distribution of one row by plain Python, as the docstring of `sample` words it."""
    weights = [float(w) for w in (logits.double() / temperature).softmax(0)]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    order = order[:top_k] if top_k > 0 else order
    total, mass = sum(weights[i] for i in order), 0.0
    kept: list[int] = []
    for i in order:
        if kept and mass >= top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


CASES = {
    "plain": {},
    "hot": {"temperature": 2.0},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.15},
}


@BACKENDS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_draws_follow_the_filtered_distribution(backend, case):
    logits = torch.tensor([1.2, -0.5, 2.0, 0.3, 0.31, -1.0, 1.9, -0.2])
    expected = filtered(logits, *({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | case).values())
    rows = 20_000
    counts = draw(logits.expand(rows, -1), seeds=7, backend=backend, **case).bincount(minlength=8)
    assert set(counts.nonzero().flatten().tolist()) == set(expected)
    statistic = sum((counts[i].item() - rows * p) ** 2 / (rows * p) for i, p in expected.items())
    assert statistic < CHI_SQUARE[len(expected) - 1]


@BACKENDS
def test_greedy_takes_the_lowest_of_equals_and_ignores_the_filters(backend):
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, -torch.inf, 5.0, 5.0]])
    assert draw(logits, temperature=0.0, top_k=1, top_p=0.1, min_p=1.0, backend=backend).tolist() == [1, 0]


@BACKENDS
def test_top_k_keeps_exactly_k_of_equals(backend):
    tokens = draw(torch.zeros(3000, 10), top_k=4, backend=backend)
    assert set(tokens.tolist()) == {0, 1, 2, 3}
    assert (draw(torch.zeros(100, 10), top_k=1, backend=backend) == 0).all()


@BACKENDS
def test_top_p_keeps_the_token_that_crosses_and_at_least_one(backend):
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(4000, -1)
    assert set(draw(logits, top_p=0.5, backend=backend).tolist()) == {0}
    assert set(draw(logits, top_p=0.51, backend=backend).tolist()) == {0, 1}
    assert set(draw(logits, top_p=1e-9, backend=backend).tolist()) == {0}
    # 0.25 / (0.5 + 0.25) of what top_k leaves lies beyond 0.6
    assert set(draw(logits, top_k=2, top_p=0.6, backend=backend).tolist()) == {0}
    assert set(draw(logits, top_k=2, top_p=0.7, backend=backend).tolist()) == {0, 1}


@BACKENDS
def test_forbidden_tokens_are_never_drawn(backend):
    logits = torch.zeros(2000, 6)
    logits[:, [0, 3, 5]] = -torch.inf
    assert set(draw(logits, backend=backend).tolist()) == {1, 2, 4}
    assert set(draw(logits, top_k=5, top_p=0.999, backend=backend).tolist()) == {1, 2, 4}


@BACKENDS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_an_answer_give_minus_one_and_disturb_no_other(backend, temperature):
    logits = torch.zeros(6, 5)
    logits[:, 2] = 50.0
    logits[0, 4] = torch.nan
    logits[2] = -torch.inf
    logits[3, 0] = torch.inf
    logits[4] = torch.nan
    tokens = draw(logits, temperature=temperature, top_k=2, top_p=0.9, min_p=0.1, backend=backend)
    assert tokens.tolist() == [-1, 2, -1, -1, -1, 2]


@BACKENDS
def test_extreme_temperatures(backend):
    logits = torch.tensor([[1e30, -1e30, 0.0, 1e30]])
    assert draw(logits, temperature=1e-30, positions=3, backend=backend).item() in (0, 3)
    tokens = draw(torch.randn(3000, 4), temperature=1e6, backend=backend)
    assert set(tokens.tolist()) == {0, 1, 2, 3}


@BACKENDS
def test_a_row_is_independent_of_its_batch(backend):
    generator = torch.Generator().manual_seed(0)
    rows, vocab = 24, 700
    logits = torch.randn(rows, vocab, generator=generator) * 3
    options: dict[str, Any] = {
        "temperature": torch.rand(rows, generator=generator) * 1.5,
        "top_k": torch.randint(-1, 40, (rows,), generator=generator) * (torch.arange(rows) % 2),
        "top_p": 1.2 - torch.rand(rows, generator=generator),
        "min_p": torch.rand(rows, generator=generator) * 0.2 * (torch.arange(rows) % 3 == 0),
        "seeds": torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        "positions": torch.randint(0, 10_000, (rows,), generator=generator),
    }
    options["temperature"][::5] = 0.0
    together = draw(logits, **options, backend=backend)
    order = torch.randperm(rows, generator=generator)
    shuffled = draw(logits[order], **{name: v[order] for name, v in options.items()}, backend=backend)
    assert shuffled.equal(together[order])
    for row in range(rows):
        one = slice(row, row + 1)
        alone = draw(logits[one], **{name: v[one] for name, v in options.items()}, backend=backend)
        assert alone.item() == together[row].item()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(1, 60),
    candidates=st.sampled_from([1, 5, 256]),
    top_k=st.integers(-1, 70),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    levels=st.sampled_from([2, 1000]),
)
def test_cpu_draws_what_the_reference_draws(seed, vocab, candidates, top_k, top_p, min_p, levels):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, levels, (9, vocab), generator=generator) / levels * 6
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seeds": seed}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CANDIDATES", candidates)
        tokens = draw(logits, backend=cpu.sample_cpu, **options)
    assert tokens.equal(draw(logits, backend=SAMPLE.backend("ref").load(), **options))


def test_uniform_is_splitmix64():
    """Against an implementation in Python's own integers."""

    def mix(value):
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    assert mix(0) == 0xE220A8397B1DCDAF  # first output of splitmix64 seeded with 0
    gamma = 0x9E3779B97F4A7C15
    for seed, position in [(0, 0), (1, 0), (0, 1), (-1, 17), (2**63 - 1, 131072), (-(2**63), 5)]:
        bits = mix((mix(seed * gamma % 2**64) + position * gamma) % 2**64)
        actual = uniform(torch.tensor([seed]), torch.tensor([position])).item()
        assert actual == (bits >> 11) / 2**53
        assert 0.0 <= actual < 1.0


def test_uniform_is_even_over_seeds_and_over_positions():
    index = torch.arange(80_000)
    fixed = torch.full_like(index, 3)
    for draws in (uniform(index, fixed), uniform(fixed, index), uniform(index // 283, index % 283)):
        counts = (draws * 8).long().bincount(minlength=8)
        assert ((counts - 10_000).double().square() / 10_000).sum().item() < CHI_SQUARE[7]
        neighbours = torch.corrcoef(torch.stack((draws[:-1], draws[1:])))[0, 1]
        assert abs(neighbours.item()) < 0.015


@BACKENDS
def test_no_rows_and_one_token(backend):
    assert draw(torch.zeros(0, 5), backend=backend).shape == (0,)
    assert draw(torch.zeros(3, 1), top_k=7, top_p=0.5, min_p=0.5, backend=backend).tolist() == [0, 0, 0]


def test_refuses_what_does_not_fit():
    columns: Any = [torch.zeros(2)] + [torch.zeros(2, dtype=torch.int64)] + [torch.zeros(2)] * 2
    keys: Any = [torch.zeros(2, dtype=torch.int64)] * 2
    short: Any = [keys[0], torch.zeros(1, dtype=torch.int64)]
    with pytest.raises(ValueError, match=r"logits has dtype torch\.bfloat16; expected torch\.float32"):
        sample(torch.zeros(2, 3).bfloat16(), *columns, *keys)
    with pytest.raises(ValueError, match=r"positions has shape \[1\]; expected \[2\]"):
        sample(torch.zeros(2, 3), *columns, *short)
    with pytest.raises(ValueError, match="no columns"):
        sample(torch.zeros(2, 0), *columns, *keys)
