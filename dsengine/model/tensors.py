"""The table of tensors a checkpoint must hold, derived from the config alone.

Loading, checking headers, writing random checkpoints and planning memory all start from this one description of the
hub layout: names as DeepSeek publishes them, shapes [out, in].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsengine.model.config import ModelConfig

SCALE_SUFFIX = "_scale_inv"
"""Appended to the name of an FP8 weight; despite the name, the factor to *multiply* by."""

FLOAT_DTYPES = ("BF16", "F16", "F32")
FP8_DTYPE = "F8_E4M3"


@dataclass(frozen=True)
class ExpectedTensor:
    """One tensor of the hub layout.

    Attributes:
        shape: as stored.
        may_be_fp8: a linear layer that block-FP8 checkpoints quantise, with scales in `name + SCALE_SUFFIX`.
    """

    name: str
    shape: tuple[int, ...]
    may_be_fp8: bool = False


def expected_tensors(config: ModelConfig) -> dict[str, ExpectedTensor]:
    """All tensors of a model without its NextN layer, by name."""
    tensors = list(_top_level(config))
    for layer in range(config.num_hidden_layers):
        tensors.extend(_decoder_layer(config, layer))
    return {tensor.name: tensor for tensor in tensors}


def nextn_tensors(config: ModelConfig) -> dict[str, ExpectedTensor]:
    """All tensors of the NextN layer but the copies of embedding and head, by name."""
    layer = config.num_hidden_layers
    prefix = layer_prefix(layer)
    hidden = config.hidden_size
    tensors = [
        *_decoder_layer(config, layer),
        ExpectedTensor(f"{prefix}enorm.weight", (hidden,)),
        ExpectedTensor(f"{prefix}hnorm.weight", (hidden,)),
        ExpectedTensor(f"{prefix}eh_proj.weight", (hidden, 2 * hidden)),
        ExpectedTensor(f"{prefix}shared_head.norm.weight", (hidden,)),
    ]
    return {tensor.name: tensor for tensor in tensors}


def nextn_copies(config: ModelConfig) -> dict[str, ExpectedTensor]:
    """Copies of embedding and head that NextN layers are published with: the main ones are used in their place."""
    prefix = layer_prefix(config.num_hidden_layers)
    shape = (config.vocab_size, config.hidden_size)
    names = (f"{prefix}embed_tokens.weight", f"{prefix}shared_head.head.weight")
    return {name: ExpectedTensor(name, shape) for name in names}


def is_recomputed(name: str) -> bool:
    """Whether a stored tensor is one that every engine computes itself (Kimi-K2 stores rotary frequencies)."""
    return name.endswith(".rotary_emb.inv_freq")


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def scale_shape(weight_shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a weight [out, in]; the last block of a ragged dimension is just smaller."""
    return -(-weight_shape[0] // block[0]), -(-weight_shape[1] // block[1])


def _top_level(config: ModelConfig) -> Iterator[ExpectedTensor]:
    vocab, hidden = config.vocab_size, config.hidden_size
    yield ExpectedTensor("model.embed_tokens.weight", (vocab, hidden))
    yield ExpectedTensor("model.norm.weight", (hidden,))
    yield ExpectedTensor("lm_head.weight", (vocab, hidden))


def _decoder_layer(config: ModelConfig, layer: int) -> Iterator[ExpectedTensor]:
    prefix, hidden = layer_prefix(layer), config.hidden_size
    yield ExpectedTensor(f"{prefix}input_layernorm.weight", (hidden,))
    yield ExpectedTensor(f"{prefix}post_attention_layernorm.weight", (hidden,))
    yield from _attention(config, f"{prefix}self_attn.")
    mlp = f"{prefix}mlp."
    if not config.is_moe_layer(layer):
        yield from _gated_mlp(mlp, hidden, config.intermediate_size)
        return
    yield ExpectedTensor(f"{mlp}gate.weight", (config.n_routed_experts, hidden))
    if config.has_router_bias:
        yield ExpectedTensor(f"{mlp}gate.e_score_correction_bias", (config.n_routed_experts,))
    for expert in range(config.n_routed_experts):
        yield from _gated_mlp(f"{mlp}experts.{expert}.", hidden, config.moe_intermediate_size)
    if config.n_shared_experts:
        yield from _gated_mlp(f"{mlp}shared_experts.", hidden, config.shared_intermediate_size)


def _attention(config: ModelConfig, prefix: str) -> Iterator[ExpectedTensor]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query_rows = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        yield ExpectedTensor(f"{prefix}q_proj.weight", (query_rows, hidden), may_be_fp8=True)
    else:
        yield ExpectedTensor(f"{prefix}q_a_proj.weight", (config.q_lora_rank, hidden), may_be_fp8=True)
        yield ExpectedTensor(f"{prefix}q_a_layernorm.weight", (config.q_lora_rank,))
        yield ExpectedTensor(f"{prefix}q_b_proj.weight", (query_rows, config.q_lora_rank), may_be_fp8=True)
    yield ExpectedTensor(f"{prefix}kv_a_proj_with_mqa.weight", (config.latent_dim, hidden), may_be_fp8=True)
    yield ExpectedTensor(f"{prefix}kv_a_layernorm.weight", (latent,))
    kv_rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield ExpectedTensor(f"{prefix}kv_b_proj.weight", (kv_rows, latent), may_be_fp8=True)
    yield ExpectedTensor(f"{prefix}o_proj.weight", (hidden, heads * config.v_head_dim), may_be_fp8=True)


def _gated_mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[ExpectedTensor]:
    yield ExpectedTensor(f"{prefix}gate_proj.weight", (intermediate, hidden), may_be_fp8=True)
    yield ExpectedTensor(f"{prefix}up_proj.weight", (intermediate, hidden), may_be_fp8=True)
    yield ExpectedTensor(f"{prefix}down_proj.weight", (hidden, intermediate), may_be_fp8=True)
