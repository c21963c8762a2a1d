"""What one GPU of a layout must hold: weights in the types this engine keeps them in, and room for the cache.

Everything is added up from the table of tensors, so that it is the loader's own arithmetic: FP8 weights with their
scales stay FP8 where the GPU computes in FP8, kv_b_proj is always bf16 (both forms of attention need it so), norms and
routers are float32, the rest is bf16.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from dsengine.model.config import ModelConfig
from dsengine.model.tensors import (
    FP8_DTYPE,
    ExpectedTensor,
    expected_tensors,
    nextn_copies,
    nextn_tensors,
    scale_shape,
)
from dsengine.plan.hardware import Gpu
from dsengine.plan.layout import Layout
from dsengine.plan.source import PlannedModel

CONTEXT_BYTES = 600 * 2**20
"""CUDA's context and the libraries' own memory, about; not part of what a program allocates."""
GRAPH_BYTES = 2**30
"""What captured decode steps keep, about; the engine measures it."""
RESERVE_BYTES = 2**29
"""What the engine keeps clear (`dsengine.engine.device_setup`)."""

ROUTED = "routed experts"
_FP8_BLOCK = (128, 128)
_STORED_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SPLIT_BY_HEADS = (".q_proj.", ".q_b_proj.", ".kv_b_proj.", ".o_proj.")
_EXPANDED_TOKENS = 4096  # as dsengine.model.attention_plan.PIECE_TOKENS, which importing would bring torch along


@dataclass(frozen=True)
class Part:
    """Tensors of one kind that layouts split alike.

    Attributes:
        split: "world", "attn_tp", "dense", "lm_head" or "none": the ranks over which a layout divides it.
        loaded_bytes: in memory, all layers, unsplit.
        experts: how many experts the part is made of; 0: it is none of experts.
    """

    name: str
    split: str
    parameters: int
    loaded_bytes: int
    experts: int = 0

    def bytes_per_rank(self, layout: Layout) -> int:
        over = {
            "world": layout.world,
            "attn_tp": layout.attn_tp,
            "dense": layout.dense_ranks,
            "lm_head": layout.lm_head_ranks,
            "none": 1,
        }[self.split]
        copies = 1 + layout.redundant / self.experts if self.experts else 1
        return int(self.loaded_bytes * copies) // over


@dataclass(frozen=True)
class Weights:
    """All that is loaded of a checkpoint.

    Attributes:
        parameters: of the model without NextN layer.
        active_parameters: those that one token meets (its own experts; embedding and head counted whole).
        nextn_parameters: of the NextN layer, without its copies of embedding and head.
        stored_bytes: of the checkpoint's files by dtype, as safetensors spells it; scales count as F32.
    """

    parts: tuple[Part, ...]
    parameters: int
    active_parameters: int
    nextn_parameters: int
    stored_bytes: dict[str, int]

    def bytes_per_rank(self, layout: Layout) -> int:
        return sum(part.bytes_per_rank(layout) for part in self.parts)


def weigh(model: PlannedModel, gpu: Gpu) -> Weights:
    """Add up a model's tensors as `gpu` would hold them."""
    config = model.config
    main = expected_tensors(config)
    nextn = nextn_tensors(config) if config.num_nextn_predict_layers else {}
    if model.stored is not None and not any(name in model.stored for name in nextn):
        nextn = {}
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for tensor in (*main.values(), *nextn.values()):
        part = sums[_place(tensor.name)]
        part[0] += math.prod(tensor.shape)
        part[1] += _loaded_bytes(tensor, _is_fp8(model, tensor) and gpu.fp8_flops is not None)
    parameters = sum(math.prod(tensor.shape) for tensor in main.values())
    idle = config.n_routed_experts - config.num_experts_per_tok
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    return Weights(
        tuple(
            Part(name, split, count, size, config.n_routed_experts if name == ROUTED else 0)
            for (name, split), (count, size) in sums.items()
        ),
        parameters,
        parameters - moe_layers * idle * per_expert,
        sum(math.prod(tensor.shape) for tensor in nextn.values()),
        _stored_bytes(model, {**main, **nextn}),
    )


def _place(name: str) -> tuple[str, str]:
    """(part, how it is split) of a tensor."""
    if ".mlp.experts." in name:
        return ROUTED, "world"
    if ".mlp.shared_experts." in name:
        return "shared experts", "attn_tp"
    if ".mlp.gate." in name:
        return "routers", "none"
    if ".mlp." in name:
        return "dense layers", "dense"
    if ".self_attn." in name:
        return ("attention, by heads", "attn_tp") if any(s in name for s in _SPLIT_BY_HEADS) else ("attention", "none")
    if name == "model.embed_tokens.weight":
        return "embedding", "attn_tp"
    if name == "lm_head.weight":
        return "lm_head", "lm_head"
    return "norms and the rest", "none"


def _is_fp8(model: PlannedModel, tensor: ExpectedTensor) -> bool:
    if model.stored is not None and tensor.name in model.stored:
        return model.stored[tensor.name].dtype == FP8_DTYPE
    return tensor.may_be_fp8 and model.config.quantization is not None


def _loaded_bytes(tensor: ExpectedTensor, keeps_fp8: bool) -> int:
    count = math.prod(tensor.shape)
    if keeps_fp8 and ".kv_b_proj." not in tensor.name:
        return count + 4 * math.prod(scale_shape(tensor.shape, _FP8_BLOCK))
    is_float32 = len(tensor.shape) == 1 or ".mlp.gate." in tensor.name
    return count * (4 if is_float32 else 2)


def _stored_bytes(model: PlannedModel, tensors: Mapping[str, ExpectedTensor]) -> dict[str, int]:
    """Bytes by dtype: from the headers, or of the files as DeepSeek publishes them (NextN's copies included)."""
    found: dict[str, int] = defaultdict(int)
    if model.stored is not None:
        for stored in model.stored.values():
            found[stored.dtype] += stored.num_bytes
        return dict(found)
    config = model.config
    plain = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[config.dtype]
    for tensor in (*tensors.values(), *(nextn_copies(config) if config.num_nextn_predict_layers else {}).values()):
        count = math.prod(tensor.shape)
        if _is_fp8(model, tensor):
            found[FP8_DTYPE] += count
            found["F32"] += 4 * math.prod(scale_shape(tensor.shape, _FP8_BLOCK))
        else:
            found[plain] += count * _STORED_BYTES[config.dtype]
    return dict(found)


def cache_row_bytes(config: ModelConfig, is_fp8: bool) -> int:
    """Bytes of a cached token in one layer: bf16, or the FP8 format of `dsengine.kernels.fp8_kv`.

    Raises:
        ValueError: the FP8 format does not fit the model.
    """
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    if not is_fp8:
        return 2 * (rank + rope)
    if rank % _FP8_BLOCK[1]:
        raise ValueError(f"kv_cache_dtype is fp8_e4m3, but kv_lora_rank is {rank}; it must be a multiple of 128")
    return rank + 4 * (rank // _FP8_BLOCK[1]) + 2 * rope


def cache_bytes_per_token(config: ModelConfig, is_fp8: bool = False) -> int:
    """Bytes a cached token takes on every rank of its attention group: all layers, and the NextN layer."""
    return (config.num_hidden_layers + config.num_nextn_predict_layers) * cache_row_bytes(config, is_fp8)


def working_bytes(config: ModelConfig, layout: Layout, chunk_tokens: int, requests: int) -> int:
    """Largest buffers of one step, roughly: expanded attention of a chunk, its experts, the logits and their sorting.

    An estimate to leave room by, not a measurement.
    """
    heads = config.num_attention_heads // layout.attn_tp
    head_dims = config.qk_head_dim + config.v_head_dim
    attention = 2 * 2 * heads * head_dims * (chunk_tokens + _EXPANDED_TOKENS)
    inter = config.moe_intermediate_size // (layout.world if layout.experts == "tp" else 1)
    experts = 2 * chunk_tokens * config.num_experts_per_tok * (3 * inter + config.hidden_size)
    dense = 2 * chunk_tokens * 3 * config.intermediate_size // layout.attn_tp
    logits = 4 * 4 * requests * config.vocab_size
    residuals = 6 * 2 * chunk_tokens * config.hidden_size
    return attention + max(experts, dense) + logits + residuals


def suggested_fraction(gpu: Gpu, needed: int) -> float:
    """`--mem-fraction-static` that leaves twice the estimated working memory free, at most 0.9."""
    return max(0.5, min(0.9, math.floor(100 * (1 - 2 * needed / gpu.memory_bytes)) / 100))


def cache_tokens(gpu: Gpu, weight_bytes: int, needed: int, token_bytes: int, fraction: float, block_size: int) -> int:
    """Tokens the cache of one rank holds, in whole blocks; 0 where not even the weights fit.

    The engine's own rule (`dsengine.engine.memory_ledger`): the static fraction bounds weights, graphs and cache, and
    what a step needs for a while must be free beside them.

    Args:
        needed: estimated bytes of the largest step.
    """
    outside = max(gpu.memory_bytes - int(fraction * gpu.memory_bytes), needed + RESERVE_BYTES)
    room = gpu.memory_bytes - CONTEXT_BYTES - weight_bytes - GRAPH_BYTES - outside
    return max(0, room // token_bytes // block_size * block_size)
