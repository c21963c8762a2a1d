"""Models with random weights straight on the device, at true shapes, and batches for them: no checkpoint is needed.

The model is the engine's own. What a random model cannot have is a meaningful routing: its tokens resemble each other,
and a router with random weights would send them to few experts. `SyntheticRouting` therefore lets the router run for
its cost and replaces its choice by a uniform one; under expert parallelism it also stands for the other ranks, whose
tokens the experts are given as a dispatch would bring them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_data import (
    CODE_STD,
    WEIGHT_STD,
    fill_random,
    fp8_scales,
    quantized_rows,
    random_tensor,
    received_ids,
    routing_weights,
    uniform_ids,
)
from dsengine.kernels.registry import Kernels
from dsengine.model.activations import ActivationFormat
from dsengine.model.config import ModelConfig
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.forward_batch import ForwardBatch
from dsengine.model.moe import MixtureOfExperts, Router
from dsengine.model.tensors import expected_tensors, layer_prefix, nextn_tensors
from dsengine.model.weights import Slot, WeightSlots
from dsengine.plan.layout import Layout

_VARIANTS = 8  # routings that consecutive layers take in turn


def share_config(config: ModelConfig, layout: Layout) -> ModelConfig:
    """The config of a model as small as one rank's share: fewer heads, and narrower or fewer experts.

    Raises:
        ValueError: the model cannot be cut so.
    """
    problem = layout.problem(config)
    if problem is not None:
        raise ValueError(f"{layout.name} of {config.model_type}: {problem}")
    by_expert = layout.experts == "ep"
    if by_expert and layout.attn_tp > 1:
        raise ValueError(
            f"{layout.name}: shared experts would be cut and routed ones not; use attention TP or EP alone"
        )
    return dataclasses.replace(
        config,
        num_nextn_predict_layers=0,
        num_attention_heads=config.num_attention_heads // layout.attn_tp,
        vocab_size=config.vocab_size // layout.attn_tp,
        intermediate_size=config.intermediate_size // layout.attn_tp,
        moe_intermediate_size=config.moe_intermediate_size // (1 if by_expert else layout.world),
        n_routed_experts=config.n_routed_experts // (layout.world if by_expert else 1),
    )


class SyntheticRouting:
    """Uniform routing for a model of random weights, and the tokens of the ranks that are not there.

    Args:
        kernels: the engine's.
        config: of the whole model.
        layout: whose share one rank computes.
    """

    def __init__(self, kernels: Kernels, config: ModelConfig, layout: Layout, device: torch.device) -> None:
        self._kernels = kernels
        self._config = config
        self._layout = layout
        self._device = device
        self._variants: list[_Variant] = []
        self._next = 0

    @property
    def kernels(self) -> Kernels:
        """The engine's operations, with routing and (under EP) the experts' input replaced."""
        experts = self._received_experts if self._layout.experts == "ep" else self._kernels.moe_experts
        return dataclasses.replace(self._kernels, moe_route=self._route, moe_experts=experts)

    def prepare(self, tokens: int) -> None:
        """Makes the routings for batches of `tokens` on every rank, and smaller ones where no rank is absent; graphs
        captured before keep their own."""
        self._variants = [self._make_variant(tokens) for _ in range(_VARIANTS)]

    def _make_variant(self, tokens: int) -> _Variant:
        config, layout, device = self._config, self._layout, self._device
        ids = uniform_ids(tokens * layout.attn_dp, config.n_routed_experts, config.num_experts_per_tok, device)
        own = ids[:tokens]
        if layout.experts == "tp":
            return _Variant(own, routing_weights(own), None)
        received = received_ids(ids, config.n_routed_experts // layout.world)
        rows = received.shape[0]
        peers = _Received(
            received,
            routing_weights(received),
            random_tensor(rows, config.hidden_size, device=device),
            *quantized_rows(rows, config.hidden_size, device),
            torch.arange(tokens, device=device) % rows,
        )
        return _Variant(own, routing_weights(own), peers)

    def _route(self, logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        self._kernels.moe_route(logits, **options)
        self._next = (self._next + 1) % len(self._variants)
        variant = self._variants[self._next]
        return variant.weights[: len(logits)], variant.ids[: len(logits)]

    def _received_experts(
        self,
        x: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        topk_weights: Tensor | None,
        topk_ids: Tensor,
        **options: Any,
    ) -> Tensor:
        """The experts of this rank over the tokens of all ranks; as many rows as x has go back to their owners here,
        which stands for the combine."""
        peers = self._variants[self._next].received
        assert peers is not None
        is_fp8 = options.get("x_scale") is not None
        if is_fp8:
            options["x_scale"] = peers.scale
        rows = peers.codes if is_fp8 else peers.x.to(x.dtype)
        out = self._kernels.moe_experts(rows, w_gate_up, w_down, peers.weights, peers.ids, **options)
        return out[peers.returned]


@dataclass(frozen=True)
class _Received:
    """Tokens that a dispatch brought; `returned` are the rows that are taken for this rank's own."""

    ids: Tensor
    weights: Tensor
    x: Tensor
    codes: Tensor
    scale: Tensor
    returned: Tensor


@dataclass(frozen=True)
class _Variant:
    ids: Tensor
    weights: Tensor
    received: _Received | None


def build_random_model(
    config: ModelConfig, kernels: Kernels, device: torch.device, *, router_experts: int | None = None
) -> DeepseekModel:
    """A model of random weights: bf16, and block FP8 with FP8 activations where the config is quantised. It has a NextN
    layer if the config says so.

    Args:
        config: of the model, or of a rank's share of it.
        router_experts: experts the routers choose among, if more than the rank holds.
    """
    is_fp8 = config.quantization is not None
    scale_fmt = config.quantization.scale_fmt if config.quantization is not None else None
    with_nextn = config.num_nextn_predict_layers > 0
    tensors = expected_tensors(config) | (nextn_tensors(config) if with_nextn else {})
    fp8 = frozenset(tensor.name for tensor in tensors.values() if is_fp8 and tensor.may_be_fp8)
    slots = WeightSlots(device, torch.bfloat16, fp8, ActivationFormat(is_fp8, scale_fmt))
    model = DeepseekModel(slots, kernels, config, with_nextn=with_nextn)
    _fill(slots.by_name.values())
    if router_experts is not None and router_experts != config.n_routed_experts:
        _widen_routers(model, kernels, dataclasses.replace(config, n_routed_experts=router_experts))
    return model


def _fill(slots: Iterable[Slot]) -> None:
    for slot in slots:
        if slot.scale is not None:
            fill_random(slot.weight, CODE_STD)
            slot.scale.copy_(fp8_scales(*slot.scale.shape, device=slot.scale.device))
        elif slot.weight.dim() == 1:
            slot.weight.copy_(1 + 0.1 * torch.randn(slot.weight.shape, device=slot.weight.device))
        else:
            fill_random(slot.weight, WEIGHT_STD)


def _widen_routers(model: DeepseekModel, kernels: Kernels, config: ModelConfig) -> None:
    for index, layer in enumerate(model.layers):
        if isinstance(layer.mlp, MixtureOfExperts):
            slots = WeightSlots(model.device, model.dtype)
            layer.mlp.router = Router(slots, kernels, config, f"{layer_prefix(index)}mlp.gate.")
            _fill(slots.by_name.values())


def decode_batch(requests: int, context: int, num_blocks: int, block_size: int, device: torch.device) -> ForwardBatch:
    """One new token for each request, the last of `context`; every request has blocks of its own.

    Raises:
        ValueError: the cache has too few blocks.
    """
    return make_batch((1,) * requests, (context - 1,) * requests, num_blocks, block_size, device)


def prefill_batch(requests: int, prompt: int, num_blocks: int, block_size: int, device: torch.device) -> ForwardBatch:
    """Whole prompts of `prompt` tokens, nothing cached.

    Raises:
        ValueError: the cache has too few blocks.
    """
    return make_batch((prompt,) * requests, (0,) * requests, num_blocks, block_size, device)


def make_batch(
    query_lens: tuple[int, ...], context_lens: tuple[int, ...], num_blocks: int, block_size: int, device: torch.device
) -> ForwardBatch:
    """A batch of equal requests with random tokens, either all absorbed (one token each) or all expanded."""
    requests, new, total = len(query_lens), query_lens[0], query_lens[0] + context_lens[0]
    per_request = -(-total // block_size)
    if requests * per_request > num_blocks:
        raise ValueError(
            f"{requests} requests of {total} tokens need {requests * per_request} blocks, not {num_blocks}"
        )
    table = torch.randperm(num_blocks, device=device)[: requests * per_request].view(requests, per_request).int()
    positions = torch.arange(context_lens[0], total, device=device).repeat(requests)
    rows = torch.arange(requests, device=device).repeat_interleave(new)
    cu_seqlens = torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32, device=device)
    is_decode = new == 1
    return ForwardBatch(
        input_ids=torch.randint(0, 100, (requests * new,), device=device),
        positions=positions,
        slot_mapping=table[rows, positions // block_size].long() * block_size + positions % block_size,
        block_table=table,
        cache_seqlens=torch.full((requests,), total, dtype=torch.int32, device=device),
        cu_seqlens_q=cu_seqlens,
        num_decodes=requests if is_decode else 0,
        num_decode_tokens=requests if is_decode else 0,
        query_lens=query_lens,
        context_lens=context_lens,
        logits_indices=cu_seqlens[1:].long() - 1,
    )
