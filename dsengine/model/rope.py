"""Rotary tables with YaRN frequencies (reference: the remote code of DeepSeek-V3, `precompute_freqs_cis`).

DeepSeek's MLA rotates interleaved pairs (x0, x1), (x2, x3) …; the tables hold one angle per pair and the operations
rotate in place, so that queries and cached keys always agree. The tables are float32: bfloat16 positions are ruinous
past a few hundred tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsengine.model.config import ModelConfig, YarnScaling


def yarn_ramp_bounds(dim: int, theta: float, scaling: YarnScaling) -> tuple[float, float]:
    """Pair indices between which YaRN goes over from unchanged to fully stretched frequencies (paper 2309.00071)."""

    def pair_of(rotations: float) -> float:
        original = scaling.original_max_position_embeddings
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), dim - 1)
    return float(low), high + 0.001 if low == high else float(high)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each rotated pair: float32 [qk_rope_head_dim / 2]."""
    dim, theta, scaling = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None:
        return frequencies
    low, high = yarn_ramp_bounds(dim, theta, scaling)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (1.0 - ramp) + frequencies / scaling.factor * ramp


def rotary_table(config: ModelConfig, device: torch.device, num_positions: int | None = None) -> Tensor:
    """Rotations of positions 0 … num_positions - 1; by default as many as the checkpoint was made for.

    Returns:
        float32 [num_positions, qk_rope_head_dim]: the cosines of all pairs, then their sines.
    """
    count = config.max_position_embeddings if num_positions is None else num_positions
    positions = torch.arange(count, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rotary_frequencies(config).to(device))
    factor = config.rope_scaling.attention_factor if config.rope_scaling is not None else 1.0
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
