"""What each rank puts into collectives in one step, by the engine's own way of cutting and exchanging.

A rank's contribution counts, as `dsengine.parallel.collectives.Traffic` counts it, whatever way the backend spreads it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsengine.model.config import ModelConfig
from dsengine.plan.layout import Layout


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
        is_fp8: experts and dense layers take FP8, which is what travels to them.
    """
    size, row = layout.attn_tp, config.hidden_size * value_bytes
    reduce = tokens * row if size > 1 else 0
    share = -(-tokens // size)
    # Each rank's share to all ranks, the summands of all back; then each share to all of its group.
    gathered = share * (_input_row(config, value_bytes, is_fp8) + layout.world * row + row * (size > 1))
    dense = gathered if layout.dense_ranks > size else reduce
    moe = reduce
    if layout.attn_dp > 1:
        listed = 2 * _aligned(4 * config.num_experts_per_tok)
        moe = gathered + share * listed + share * size * row * (size > 1 and bool(config.n_shared_experts))
    dense_layer, moe_layer = reduce + dense, reduce + moe
    logits = _logits(config, layout, samples, value_bytes)
    num_dense = config.first_k_dense_replace
    layers = num_dense * dense_layer + (config.num_hidden_layers - num_dense) * moe_layer
    return StepTraffic(dense_layer, moe_layer, reduce + layers + logits)


def _logits(config: ModelConfig, layout: Layout, samples: int, value_bytes: int) -> int:
    """Hidden states to those who share the lm_head, and each part of the logits to those who have the token."""
    size, ranks = layout.attn_tp, layout.lm_head_ranks
    part = -(-config.vocab_size // ranks) * value_bytes
    if ranks == size:
        return samples * part if size > 1 else 0
    share = -(-samples // size)
    return share * (config.hidden_size * value_bytes + (ranks - 1) * part + ranks * part * (size > 1))


def _input_row(config: ModelConfig, value_bytes: int, is_fp8: bool) -> int:
    """A token on its way to a layer, as `dsengine.model.token_rows` packs it: values, or FP8 codes and scales."""
    hidden = config.hidden_size
    return hidden + _aligned(4 * -(-hidden // 128)) if is_fp8 else hidden * value_bytes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16
