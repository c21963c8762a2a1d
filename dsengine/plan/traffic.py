"""What each rank puts into collectives in one step, by the engine's own way of cutting and exchanging.

A rank's contribution counts, as `dsengine.parallel.collectives.Traffic` counts it, whatever way the backend spreads it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsengine.model.config import ModelConfig
from dsengine.plan.layout import Layout

_LOGIT = 4


@dataclass(frozen=True)
class StepTraffic:
    """Bytes of one rank.

    Attributes:
        dense_layer, moe_layer: of one layer of that kind.
        step: of a whole step with its logits.
    """

    dense_layer: int
    moe_layer: int
    step: int


def step_traffic(
    config: ModelConfig, layout: Layout, tokens: int, samples: int, *, value_bytes: int = 2, is_fp8: bool = False
) -> StepTraffic:
    """When each attention group has `tokens` tokens and experts are reached by "gather".

    Args:
        samples: rows of logits.
        value_bytes: of an activation.
        is_fp8: experts take FP8, which is what travels to them.
    """
    size, row = layout.attn_tp, config.hidden_size * value_bytes
    reduce = tokens * row if size > 1 else 0
    if layout.attn_dp == 1:
        moe = reduce
    else:
        share = -(-tokens // size)
        moe = share * layout.world * row + share * _travelling_row(config, value_bytes, is_fp8)
        if size > 1:
            moe += share * size * row * bool(config.n_shared_experts) + share * row
    dense_layer, moe_layer = 2 * reduce, reduce + moe
    logits = samples * -(-config.vocab_size // size) * _LOGIT if size > 1 else 0
    num_dense = config.first_k_dense_replace
    layers = num_dense * dense_layer + (config.num_hidden_layers - num_dense) * moe_layer
    return StepTraffic(dense_layer, moe_layer, reduce + layers + logits)


def _travelling_row(config: ModelConfig, value_bytes: int, is_fp8: bool) -> int:
    """A token on its way to experts, as `dsengine.model.token_rows` packs it: values, scales, weights and places."""
    hidden, listed = config.hidden_size, _aligned(4 * config.num_experts_per_tok)
    values = hidden + _aligned(4 * -(-hidden // 128)) if is_fp8 else hidden * value_bytes
    return values + 2 * listed


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16
