"""Whether a model can be spread over a number of ranks, told before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from dsengine.model.config import ModelConfig
from dsengine.model.weights import FP8_BLOCK
from dsengine.parallel.deep_ep import find_problems
from dsengine.parallel.layout import MoeExchange


def check_layout(
    config: ModelConfig,
    *,
    tp_size: int,
    attn_dp_size: int = 1,
    experts_whole: bool,
    keeps_fp8: bool,
    moe_exchange: MoeExchange = "gather",
    redundant_experts: int = 0,
    dense_over_world: bool = False,
) -> None:
    """Prove that every weight can be cut into equal parts; vocabularies always can, because the last ones are padded.

    Args:
        tp_size: all ranks.
        attn_dp_size: groups of ranks with tokens of their own.
        experts_whole: routed experts are dealt out whole, not cut.
        keeps_fp8: weights stay block FP8, and so may be cut between blocks only.
        moe_exchange, redundant_experts, dense_over_world: as in `Layout`.

    Raises:
        ValueError: some cannot; all of them are listed.
    """
    if tp_size < 1:
        raise ValueError(f"the number of ranks is {tp_size}; it must be at least 1")
    if attn_dp_size < 1 or tp_size % attn_dp_size:
        raise ValueError(f"attn_dp_size is {attn_dp_size}; it must divide the number of ranks, {tp_size}")
    if moe_exchange not in get_args(MoeExchange):
        choices = " or ".join(map(repr, get_args(MoeExchange)))
        raise ValueError(f"moe_exchange is {moe_exchange!r}; expected {choices}")
    fp8 = keeps_fp8 and config.quantization is not None
    group = tp_size // attn_dp_size
    problems = [
        *_attention_problems(config, group, fp8),
        *_dense_problems(config, tp_size if dense_over_world else group, fp8),
        *_expert_problems(config, tp_size, experts_whole, fp8, moe_exchange, redundant_experts),
    ]
    if problems:
        groups = "" if attn_dp_size == 1 else f" in {attn_dp_size} groups"
        raise ValueError(f"this model cannot be spread over {tp_size} ranks{groups}: {'; '.join(problems)}")


def _attention_problems(config: ModelConfig, size: int, fp8: bool) -> Iterator[str]:
    """What the ranks of one group share: heads and shared experts."""
    heads = config.num_attention_heads
    if heads % size:
        yield f"num_attention_heads is {heads}, which is not a multiple of {size}"
    elif fp8 and size > 1:
        yield from _between_blocks("queries (num_attention_heads · qk_head_dim)", heads * config.qk_head_dim, size)
        yield from _between_blocks("o_proj's input (num_attention_heads · v_head_dim)", heads * config.v_head_dim, size)
    if config.n_shared_experts:
        yield from _width("n_shared_experts · moe_intermediate_size", config.shared_intermediate_size, size, fp8)


def _dense_problems(config: ModelConfig, size: int, fp8: bool) -> Iterator[str]:
    """What an attention group or all ranks share: the layers without experts."""
    if config.first_k_dense_replace > 0:
        yield from _width("intermediate_size", config.intermediate_size, size, fp8)


def _expert_problems(
    config: ModelConfig, size: int, whole: bool, fp8: bool, exchange: MoeExchange, redundant: int
) -> Iterator[str]:
    """What all ranks share: routed experts."""
    experts = config.n_routed_experts
    if not experts:
        return
    if whole:
        if not 0 <= redundant <= experts * (size - 1):
            yield f"redundant_experts is {redundant}, and must be from 0 to {experts * (size - 1)}"
        elif (experts + redundant) % size:
            with_copies = f" and redundant_experts {redundant}" if redundant else ""
            yield f"n_routed_experts is {experts}{with_copies}, which is not a multiple of {size}"
        if exchange in ("deepep", "deepep_normal") and size > 1:
            top_k, low_latency = config.num_experts_per_tok, exchange == "deepep"
            yield from find_problems(config.hidden_size, top_k, size, low_latency=low_latency)
        return
    yield from _width("moe_intermediate_size", config.moe_intermediate_size, size, fp8)
    if exchange != "gather":
        yield f"moe_exchange is {exchange!r}, which needs whole experts"
    if redundant:
        yield f"redundant_experts is {redundant}, which needs whole experts"


def _width(name: str, width: int, size: int, fp8: bool) -> Iterator[str]:
    if width % size:
        yield f"{name} is {width}, which is not a multiple of {size}"
    elif fp8 and size > 1:
        yield from _between_blocks(name, width, size)


def _between_blocks(name: str, width: int, size: int) -> Iterator[str]:
    block = FP8_BLOCK[0]
    if width % (size * block):
        yield (
            f"{name} is {width}, and FP8 weights are cut between blocks of {block} only, "
            f"so it would have to be a multiple of {size * block} (weight_format dequantized has no such limit)"
        )
