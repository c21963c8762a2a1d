"""Sampling on a CPU: greedy rows are only searched for their maximum, and only rows with top-k or top-p are sorted.

Of those, just the likeliest tokens are, unless a flat distribution needs more: sorting a whole vocabulary costs many
times what all the rest does. The arithmetic is the specification's, so the tokens are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.sample.ref import invert_cdf, uniform

CANDIDATES = 256


def sample_cpu(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> Tensor:
    highest, tokens = logits.max(dim=-1)
    valid = highest.isfinite()
    drawn = (valid & (temperature > 0)).nonzero().squeeze(1)
    if drawn.numel():
        shifted = (logits[drawn] - highest[drawn, None]).double()
        weights = shifted.div_(temperature[drawn, None]).exp_()
        _filter(weights, top_k[drawn], top_p[drawn], min_p[drawn])
        tokens[drawn] = invert_cdf(weights, uniform(seeds[drawn], positions[drawn]))
    return torch.where(valid, tokens, -1)


def _filter(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    """Sets what the filters drop to 0, in place; the likeliest token of a row has weight 1."""
    vocab = weights.shape[1]
    limited = ((top_k > 0) & (top_k < vocab)) | (top_p < 1)
    rows = limited.nonzero().squeeze(1)
    if rows.numel():
        k = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k)
        candidates = min(vocab, CANDIDATES)
        enough = _keep_likeliest(weights, rows, k[rows], top_p[rows], candidates)
        rest = rows[~enough]
        if rest.numel():
            _keep_likeliest(weights, rest, k[rest], top_p[rest], vocab)
    if (min_p > 0).any():
        weights[weights < min_p.clamp(max=1.0).unsqueeze(1)] = 0.0


def _keep_likeliest(weights: Tensor, rows: Tensor, k: Tensor, top_p: Tensor, candidates: int) -> Tensor:
    """Applies top-k, then top-p to `rows` of `weights`, looking at their `candidates` largest.

    Returns:
        bool [rows]: whether those sufficed; rows where they did not are left alone.
    """
    row_weights = weights[rows]
    values = row_weights.topk(candidates, dim=-1).values
    values = torch.where(torch.arange(candidates) < k.unsqueeze(1), values, 0.0)
    total = torch.where(k <= candidates, values.sum(dim=-1), row_weights.sum(dim=-1)).unsqueeze(1)
    running = values.cumsum(dim=-1)
    within = ((running - values < top_p.unsqueeze(1) * total) | (top_p >= 1).unsqueeze(1)) & (values > 0)
    kept = within.sum(dim=-1).clamp(min=1)
    # Beyond the candidates nothing is known but the sum of all, which is not that of the k largest.
    enough = (k <= candidates) | ((k == weights.shape[1]) & (kept < candidates))
    threshold = values.gather(1, kept.unsqueeze(1) - 1)
    above, equal = row_weights > threshold, row_weights == threshold
    room = kept.unsqueeze(1) - above.sum(dim=-1, keepdim=True)
    keep = above | (equal & (equal.cumsum(dim=-1) <= room)) | ~enough.unsqueeze(1)
    weights[rows] = torch.where(keep, row_weights, 0.0)
    return enough
