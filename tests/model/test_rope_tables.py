"""YaRN frequencies and rotary tables against published test vectors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hub_configs import KIMI_K2, MOONLIGHT, V3

from dsengine.model.config import ModelConfig, YarnScaling, yarn_mscale
from dsengine.model.rope import rotary_frequencies, rotary_table, yarn_ramp_bounds

INDICES = (0, 1, 10, 11, 16, 20, 23, 31)


@pytest.mark.parametrize(
    ("theta", "factor", "beta_fast", "original", "bounds", "frequencies"),
    [
        (
            1e4, 40, 32, 4096, (10, 23),
            (1, 0.74989421, 0.056234133, 0.039006927, 0.0055, 7.9056942e-4, 3.3338036e-5, 3.3338036e-6),
        ),
        (
            5e4, 32, 1, 4096, (19, 20),
            (1, 0.71311108, 0.034007278, 0.024250967, 0.004472136, 3.6140468e-5, 1.3105854e-5, 8.7644129e-7),
        ),
        (
            5e4, 64, 32, 4096, (8, 20),
            (1, 0.71311108, 0.028427959, 0.018282956, 0.0015372967, 1.8070234e-5, 6.5529271e-6, 4.3822065e-7),
        ),
        (
            1.6e5, 16, 32, 65536, (15, 25),
            (1, 0.68765602, 0.02364354, 0.016258623, 0.002265625, 2.9697778e-4, 4.5444232e-5, 5.680529e-7),
        ),
    ],
)  # fmt: skip
def test_yarn_vectors(
    theta: float,
    factor: float,
    beta_fast: float,
    original: int,
    bounds: tuple[int, int],
    frequencies: tuple[float, ...],
) -> None:
    scaling = YarnScaling(factor, original, beta_fast, 1.0, 1.0, 1.0)
    config = replace(ModelConfig.from_hub(V3), rope_theta=theta, rope_scaling=scaling)
    assert yarn_ramp_bounds(64, theta, scaling) == bounds
    got = rotary_frequencies(config)
    assert got.dtype == torch.float32
    assert got.shape == (32,)
    torch.testing.assert_close(got[list(INDICES)], torch.tensor(frequencies), rtol=1e-6, atol=0)


def test_equal_bounds_do_not_divide_by_zero() -> None:
    scaling = YarnScaling(40.0, 4096, 1.0, 1.0, 1.0, 1.0)
    low, high = yarn_ramp_bounds(64, 1e20, scaling)
    assert high > low
    config = replace(ModelConfig.from_hub(V3), rope_theta=1e20, rope_scaling=scaling)
    assert rotary_frequencies(config).isfinite().all()


def test_without_scaling() -> None:
    got = rotary_frequencies(ModelConfig.from_hub(MOONLIGHT))
    expected = [50000 ** (-2 * i / 64) for i in range(32)]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("factor", "mscale", "expected"), [(40, 1.0, 1.3688879), (40, 0.707, 1.2608038), (1, 1.0, 1.0), (0.5, 1.0, 1.0)]
)
def test_mscale(factor: float, mscale: float, expected: float) -> None:
    assert yarn_mscale(factor, mscale) == pytest.approx(expected, rel=1e-6)


def test_table_holds_cosines_then_sines() -> None:
    config = ModelConfig.from_hub(KIMI_K2)
    table = rotary_table(config, torch.device("cpu"), 1000)
    assert table.shape == (1000, 64)
    assert table.dtype == torch.float32
    angle = 999 * rotary_frequencies(config)[5].item()
    assert table[999, 5].item() == pytest.approx(math.cos(angle), abs=1e-4)
    assert table[999, 32 + 5].item() == pytest.approx(math.sin(angle), abs=1e-4)
    torch.testing.assert_close(table[:, :32] ** 2 + table[:, 32:] ** 2, torch.ones(1000, 32))


def test_table_covers_the_context_by_default() -> None:
    assert rotary_table(ModelConfig.from_hub(MOONLIGHT), torch.device("cpu")).shape == (8192, 64)


def test_amplitude_where_the_two_mscales_differ() -> None:
    scaling = YarnScaling(40.0, 4096, 32.0, 1.0, mscale=1.0, mscale_all_dim=0.5)
    config = replace(ModelConfig.from_hub(V3), rope_scaling=scaling)
    table = rotary_table(config, torch.device("cpu"), 4)
    assert table[0, 0].item() == pytest.approx(yarn_mscale(40, 1.0) / yarn_mscale(40, 0.5), rel=1e-6)
