"""Executable specification of sampling: sorts every row, filters, and inverts the cumulative distribution."""

from __future__ import annotations

import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014), as two's-complement int64 because torch has no unsigned arithmetic.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def sample_ref(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    highest = logits.amax(dim=-1)
    weights = kept_weights(logits, temperature, top_k, top_p, min_p)
    tokens = invert_cdf(weights, uniform(seeds, positions))
    tokens = torch.where(temperature <= 0, logits.argmax(dim=-1), tokens)
    return torch.where(highest.isfinite(), tokens, -1)


def kept_weights(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """float64 [B, V]: each token's chance relative to the likeliest one's, 0 for those that a filter drops.

    Rows with temperature 0 are treated as with 1; rows without an answer hold anything.
    """
    highest = logits.amax(dim=-1, keepdim=True)
    greedy = (temperature <= 0).unsqueeze(1)
    # Shifted first, so that a tiny temperature cannot overflow: the likeliest token is always e⁰.
    weights = torch.exp((logits - highest).double() / torch.where(greedy, 1.0, temperature.unsqueeze(1)))
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    ordered = torch.where((rank < top_k.unsqueeze(1)) | (top_k <= 0).unsqueeze(1), ordered, 0.0)
    mass_before = ordered.cumsum(dim=-1) - ordered
    total = ordered.sum(dim=-1, keepdim=True)
    ordered = torch.where((mass_before < top_p.unsqueeze(1) * total) | (top_p >= 1).unsqueeze(1), ordered, 0.0)
    ordered = torch.where(ordered >= min_p.unsqueeze(1), ordered, 0.0)
    # The likeliest token has weight 1 and rank 0; no filter may leave a row empty.
    ordered[:, 0] = 1.0
    return torch.zeros_like(weights).scatter_(1, ids, ordered)


def invert_cdf(weights: Tensor, draws: Tensor) -> Tensor:
    """First id at which the running sum of float64 `weights` [B, V] exceeds draw [B] × total; its weight is not 0."""
    running = weights.cumsum(dim=-1)
    # The product may round up to the total itself, which nothing exceeds; just below it the last token answers.
    total = running[:, -1:]
    target = torch.minimum(draws.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, target, right=True).squeeze(1)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """float64 in [0, 1) with 53 random bits, a function of (seed, position) alone; int64 [B] each."""
    bits = _mix(_mix(seeds * GAMMA) + positions * GAMMA)
    return _shift_right(bits, 11).double() * 2.0**-53


def _mix(value: Tensor) -> Tensor:
    value = value + GAMMA
    value = (value ^ _shift_right(value, 30)) * MIX_1
    value = (value ^ _shift_right(value, 27)) * MIX_2
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
