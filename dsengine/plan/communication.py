"""What ranks' exchanges cost by published measurements, so that a plan can add them to its rooflines.

All-reduce: 8 H200 in one node, in a CUDA graph (sglang 0.5.14, in NVIDIA's aiconfigurator). Low-latency dispatch and
combine: DeepEP on H200 with CX7 400 Gb/s, FP8 dispatch and bf16 combine, hidden 7168, top 8 (the same source); EP128
and EP256 by the ratios of DeepEP's own table of H800s at 128 tokens. Normal dispatch and combine: the bandwidths of
DeepEP's table of H800s (docs/legacy.md), which count a token once for each node (EP8: for each GPU) that it goes to.

What nobody has published is worked out, and said so: an all-reduce over several nodes is the one within a node and the
exchange of the eighths over 50 GB/s a GPU, without latency; fewer than 8 GPUs are taken to need as long as 8; beyond
EP256 costs stay those of EP256. Other GPUs and networks than Hopper's with 400 Gb/s a GPU have no table here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from math import ceil, comb, log2

from dsengine.model.config import ModelConfig

GPUS_PER_NODE = 8
NETWORK_BYTES_PER_SECOND = 50e9
_HIDDEN, _TOP_K = 7168, 8  # of the measurements

_ALL_REDUCE_BYTES = (16384, 65536, 131072, 524288, 1048576, 2097152, 4194304, 8388608, 16777216)
_ALL_REDUCE_US = (4.2, 6.7, 8.0, 13.1, 19.3, 32.1, 61.7, 107.6, 196.8)

_LOW_LATENCY_TOKENS = (2, 8, 32, 64, 128, 256)
_LOW_LATENCY_US: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {  # ranks: dispatch, combine
    8: ((15.4, 16.1, 20.5, 27.8, 39.8, 67.0), (13.3, 14.4, 24.6, 40.9, 72.4, 136.1)),
    16: ((22.3, 23.8, 40.5, 59.1, 101.8, 180.3), (26.6, 37.0, 60.4, 100.2, 188.3, 334.8)),
    32: ((28.2, 32.2, 55.5, 84.4, 144.2, 261.8), (28.9, 42.6, 86.0, 146.2, 266.1, 500.8)),
    64: ((29.5, 35.9, 62.7, 95.0, 165.5, 302.4), (31.6, 43.6, 96.6, 161.9, 305.7, 583.2)),
}
_LARGER_GROUPS = {128: (192 / 173, 369 / 314), 256: (194 / 173, 360 / 314)}  # over EP64: dispatch, combine

_NORMAL_BANDWIDTH = {8: (153e9, 158e9), 16: (43e9, 43e9), 32: (58e9, 57e9), 64: (51e9, 50e9)}  # dispatch, combine


def all_reduce_seconds(num_bytes: float, ranks: int) -> float:
    """The sum of `num_bytes` on each of `ranks`, eight to a node."""
    if ranks == 1 or num_bytes == 0:
        return 0.0
    within = 1e-6 * _interpolate(_ALL_REDUCE_BYTES, _ALL_REDUCE_US, num_bytes)
    nodes = ceil(ranks / GPUS_PER_NODE)
    across = 2 * (nodes - 1) / nodes * num_bytes / GPUS_PER_NODE / NETWORK_BYTES_PER_SECOND
    return within + across


def exchange_seconds(config: ModelConfig, tokens: int, ranks: int, *, low_latency: bool) -> float:
    """Dispatch and combine of one MoE layer together, when the fullest rank sends `tokens`.

    Args:
        low_latency: DeepEP's mode for decoding, which CUDA graphs can hold; else its mode for many tokens.
    """
    if ranks == 1 or tokens == 0:
        return 0.0
    if low_latency:
        scale = config.hidden_size / _HIDDEN * config.num_experts_per_tok / _TOP_K
        return 1e-6 * sum(_low_latency_us(ranks, tokens * scale))
    dispatch, combine = _NORMAL_BANDWIDTH[max(size for size in _NORMAL_BANDWIDTH if size <= max(ranks, 8))]
    copies = tokens * visited(config, ranks)
    fp8_row = config.hidden_size * (1 + 4 / 128)
    return copies * fp8_row / dispatch + copies * config.hidden_size * 2 / combine


def _low_latency_us(ranks: int, tokens: float) -> tuple[float, float]:
    """Dispatch and combine, between the measured numbers of ranks by their logarithm."""
    sizes = (*_LOW_LATENCY_US, *_LARGER_GROUPS)
    ranks = min(max(ranks, sizes[0]), sizes[-1])
    above = sizes[bisect_left(sizes, ranks)]
    below = max((size for size in sizes if size < above), default=above)
    part = log2(ranks / below) / log2(above / below) if above > below else 0.0
    low, high = _measured_us(below, tokens), _measured_us(above, tokens)
    return low[0] + part * (high[0] - low[0]), low[1] + part * (high[1] - low[1])


def _measured_us(ranks: int, tokens: float) -> tuple[float, float]:
    dispatch, combine = (_interpolate(_LOW_LATENCY_TOKENS, us, tokens) for us in _LOW_LATENCY_US[min(ranks, 64)])
    more = _LARGER_GROUPS.get(ranks, (1.0, 1.0))
    return dispatch * more[0], combine * more[1]


@cache
def visited(config: ModelConfig, ranks: int) -> float:
    """Places that a token goes to in the mean, if choices are uniform: nodes, or within one node GPUs."""
    places = ranks if ranks <= GPUS_PER_NODE else ceil(ranks / GPUS_PER_NODE)
    groups, chosen = config.n_group, config.topk_group
    if groups % places == 0:
        each = groups // places  # whole groups to a place
        eligible = places * (1 - comb(groups - each, chosen) / comb(groups, chosen))
    else:
        eligible = places * chosen / groups
    return eligible * (1 - (1 - 1 / eligible) ** config.num_experts_per_tok)


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Linear between points; before the first its value, after the last on along the last line."""
    if x <= xs[0]:
        return ys[0]
    i = min(bisect_left(xs, x), len(xs) - 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])
