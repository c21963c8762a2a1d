"""The operations between the large ones: norms, activations, quantisation, routing, the cache's bookkeeping, sampling.

Their inputs were written by the operation before and lie in L2 when the batch is small; so they do here. A roofline by
memory's bandwidth is given only where the data exceeds L2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.anchors import Published
from benchmarks.gpu_data import L2_BYTES, random_tensor
from benchmarks.problems.attention import BLOCK_SIZE, make_cache
from benchmarks.problems.base import BackendCall, Problem, Setup, call_with
from dsengine.kernels.backend import Operation
from dsengine.kernels.logits.api import LogitEdits
from dsengine.kernels.registry import OPERATIONS
from dsengine.plan.roofline import Work

SIZES = (1, 8, 64, 128, 256, 4096)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# H200, microseconds, up to 128 tokens: vLLM's fused routing (vLLM issue 34206) and quantisation of 7168 columns
# (aiconfigurator); best of what is published.
_PUBLISHED: dict[str, Published] = {"moe_route": {"vLLM": 4.0}, "quant_fp8_group": {"vLLM 0.24": 1.9}}


@dataclass(frozen=True)
class Small:
    """One small operation: its arguments for a number of tokens, without the backend."""

    name: str
    arguments: Callable[[Setup, int], Arguments]
    sizes: tuple[int, ...] = SIZES


def small_problems(setup: Setup) -> Iterator[Problem]:
    """Every small operation at V3's sizes, 128 heads."""
    by_name = {operation.name: operation for operation in OPERATIONS}
    for small in SMALL:
        operation = by_name[small.name]
        yield Problem(
            "small",
            small.name,
            operation,
            setup.sizes(*small.sizes),
            partial(_prepare, setup, small, operation),
            partial(_work, setup, small),
            partial(_published, small.name),
        )


def _prepare(setup: Setup, small: Small, operation: Operation) -> Callable[[int], list[BackendCall]]:
    def calls(tokens: int) -> list[BackendCall]:
        args, options = small.arguments(setup, tokens)
        return [call_with(operation.function, *args, **options)]

    return calls


def _work(setup: Setup, small: Small, tokens: int) -> Work | None:
    """Bytes of the arguments once, and as many again for the result, where that is more than L2 holds."""
    row_bytes = _ROW_BYTES.get(small.name)
    if row_bytes is None:
        return None
    macs = _MULTIPLICATIONS[small.name](setup) if small.name in _MULTIPLICATIONS else 0
    moved = row_bytes(setup) * tokens + 2 * macs  # every weight is multiplied with once per row
    return Work(small.name, moved, 2.0 * macs * tokens) if moved > L2_BYTES else None


def _published(name: str, tokens: int) -> Published:
    return _PUBLISHED.get(name, {}) if tokens <= 128 else {}


def _rows(setup: Setup, tokens: int, width: int | None = None) -> Tensor:
    return random_tensor(tokens, width or setup.config.hidden_size, device=setup.device)


def _norm_weight(setup: Setup, width: int | None = None) -> Tensor:
    shape = (width or setup.config.hidden_size,)
    return 1 + random_tensor(*shape, device=setup.device, dtype=torch.float32, std=0.1)


def _norm(setup: Setup, tokens: int) -> Arguments:
    return (_rows(setup, tokens), _norm_weight(setup), 1e-6), {}


def _add_norm(setup: Setup, tokens: int) -> Arguments:
    return (_rows(setup, tokens), _rows(setup, tokens), _norm_weight(setup), 1e-6), {}


def _quantize(setup: Setup, tokens: int) -> Arguments:
    return (_rows(setup, tokens),), {}


def _activate(setup: Setup, tokens: int) -> Arguments:
    return (_rows(setup, tokens, 2 * setup.config.shared_intermediate_size),), {}


def _angles(setup: Setup) -> Tensor:
    return torch.rand(setup.config.max_position_embeddings, setup.config.qk_rope_head_dim, device=setup.device)


def _positions(setup: Setup, tokens: int) -> Tensor:
    return torch.randint(0, setup.config.max_position_embeddings, (tokens,), device=setup.device)


def _query_rope(setup: Setup, tokens: int) -> Tensor:
    config = setup.config
    query = random_tensor(tokens, config.num_attention_heads, config.qk_head_dim, device=setup.device)
    return query[..., config.qk_nope_head_dim :]


def _rope(setup: Setup, tokens: int) -> Arguments:
    return (_query_rope(setup, tokens), _angles(setup), _positions(setup, tokens)), {}


def _cache_and_slots(setup: Setup, tokens: int) -> tuple[Tensor, Tensor]:
    blocks = 2 * -(-tokens // BLOCK_SIZE)
    slots = torch.randperm(blocks * BLOCK_SIZE, device=setup.device)[:tokens]
    return make_cache(setup, blocks, is_fp8=False), slots


def _mla_prep(setup: Setup, tokens: int) -> Arguments:
    config = setup.config
    cache, slots = _cache_and_slots(setup, tokens)
    latents, norm = _rows(setup, tokens, config.latent_dim), _norm_weight(setup, config.kv_lora_rank)
    positions = _positions(setup, tokens)
    return (_query_rope(setup, tokens), latents, norm, 1e-6, _angles(setup), positions, slots, cache), {}


def _gather(setup: Setup, tokens: int) -> Arguments:
    return _cache_and_slots(setup, tokens), {"rank": setup.config.kv_lora_rank, "dtype": torch.bfloat16}


def _merge(setup: Setup, tokens: int) -> Arguments:
    config = setup.config
    outs = [random_tensor(tokens, config.num_attention_heads, config.v_head_dim, device=setup.device) for _ in range(2)]
    lses = [torch.randn(tokens, config.num_attention_heads, device=setup.device) for _ in range(2)]
    return (outs[0], lses[0], outs[1], lses[1]), {}


def _route(setup: Setup, tokens: int) -> Arguments:
    config = setup.config
    logits = torch.randn(tokens, config.n_routed_experts, device=setup.device)
    return (logits,), {
        "method": config.topk_method,
        "scoring": config.scoring_func,
        "top_k": config.num_experts_per_tok,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "bias": 0.1 * torch.randn(config.n_routed_experts, device=setup.device),
        "renormalize": config.norm_topk_prob,
        "scaling": config.routed_scaling_factor,
    }


def _sample(setup: Setup, tokens: int) -> Arguments:
    device = setup.device
    logits = 4 * torch.randn(tokens, setup.config.vocab_size, device=device)
    temperature, top_p, min_p = (torch.full((tokens,), value, device=device) for value in (0.7, 0.95, 0.0))
    top_k = torch.full((tokens,), 50, device=device)
    seeds, positions = (torch.arange(tokens, device=device) for _ in range(2))
    return (logits, temperature, top_k, top_p, min_p, seeds, positions), {}


def _process_logits(setup: Setup, tokens: int) -> Arguments:
    """Half of the rows have penalties on a thousand tokens each, as after a long answer; none has bans."""
    device, vocab = setup.device, setup.config.vocab_size
    seen = min(1000, vocab // 2)
    counts = torch.tensor([seen if row % 2 == 0 else 0 for row in range(tokens)], device=device)
    none = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
    starts = torch.cat((none[:1], counts.cumsum(0).int()))
    ids = torch.cat([torch.randperm(vocab, device=device)[:count] for count in counts.tolist()]).int()
    edits = LogitEdits(
        repetition_penalty=torch.full((tokens,), 1.1, device=device),
        presence_penalty=torch.full((tokens,), 0.1, device=device),
        frequency_penalty=torch.zeros(tokens, device=device),
        seen_starts=starts,
        seen_ids=ids,
        seen_counts=torch.ones_like(ids),
        bias_starts=none,
        bias_ids=none[:0],
        bias_values=torch.empty(0, device=device),
        banned_starts=none,
        banned_ids=none[:0],
    )
    return (4 * torch.randn(tokens, vocab, device=device), vocab - 8, edits), {}


def _embed(setup: Setup, tokens: int) -> Arguments:
    table = random_tensor(setup.config.vocab_size, setup.config.hidden_size, device=setup.device)
    return (torch.randint(0, setup.config.vocab_size, (tokens,), device=setup.device), table), {}


def _linear(setup: Setup, tokens: int) -> Arguments:
    """The NextN layer's eh_proj, which no V3 checkpoint holds in FP8."""
    hidden = setup.config.hidden_size
    return (_rows(setup, tokens, 2 * hidden), random_tensor(hidden, 2 * hidden, device=setup.device)), {}


def _absorb(setup: Setup, tokens: int) -> Arguments:
    config = setup.config
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    weight = random_tensor(heads, nope, config.kv_lora_rank, device=setup.device)
    return (random_tensor(tokens, heads, nope, device=setup.device), weight), {}


def _release(setup: Setup, tokens: int) -> Arguments:
    config = setup.config
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    weight = random_tensor(heads, config.v_head_dim, rank, device=setup.device)
    return (random_tensor(tokens, heads, rank, device=setup.device), weight), {}


SMALL: tuple[Small, ...] = (
    Small("add_rms_norm_quant", _add_norm),
    Small("moe_route", _route),
    Small("quant_fp8_group", _quantize),
    Small("mla_prep", _mla_prep),
    Small("silu_mul_quant", _activate),
    Small("add_rms_norm", _add_norm),
    Small("rms_norm_quant", _norm),
    Small("rms_norm", _norm),
    Small("silu_mul", _activate),
    Small("merge_attention", _merge, (256, 4096)),
    Small("gather_latents", _gather, (4096, 32768)),
    Small("rope", _rope),
    Small("sample", _sample, (1, 8, 64, 128, 256)),
    Small("process_logits", _process_logits, (1, 8, 64, 128, 256)),
    Small("embed", _embed),
    Small("linear", _linear),
    Small("absorb_queries", _absorb),
    Small("release_values", _release),
)

# Bytes read and written per token, where that is more than bookkeeping.
_ROW_BYTES: dict[str, Callable[[Setup], int]] = {
    "add_rms_norm_quant": lambda setup: (4 * 2 + 1) * setup.config.hidden_size,
    "add_rms_norm": lambda setup: 4 * 2 * setup.config.hidden_size,
    "rms_norm_quant": lambda setup: (2 * 2 + 1) * setup.config.hidden_size,
    "rms_norm": lambda setup: 2 * 2 * setup.config.hidden_size,
    "quant_fp8_group": lambda setup: 3 * setup.config.hidden_size,
    "silu_mul": lambda setup: 3 * 2 * setup.config.shared_intermediate_size,
    "silu_mul_quant": lambda setup: 5 * setup.config.shared_intermediate_size,
    "merge_attention": lambda setup: 3 * 2 * setup.config.num_attention_heads * setup.config.v_head_dim,
    "gather_latents": lambda setup: 2 * 2 * setup.config.latent_dim,
    "linear": lambda setup: 2 * 3 * setup.config.hidden_size,
}
# Of one row, for products with bf16 weights.
_MULTIPLICATIONS: dict[str, Callable[[Setup], int]] = {"linear": lambda setup: 2 * setup.config.hidden_size**2}
