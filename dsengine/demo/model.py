"""The training form of the demo model: a DeepSeek-V3 in plain torch, small enough to train on a CPU.

Tokens are flat, [T]; only attention knows where sequences begin, through the `Attend` it is handed. MLA is expanded,
RoPE interleaved with YaRN, the router sigmoid noaux_tc in float32, and the NextN layer is trained beside the trunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DemoConfig:
    """The names are those of DeepSeek's config.json."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 512
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 2.5
    q_lora_rank: int = 256
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    rope_theta: float = 10000.0
    yarn_factor: float = 8.0
    yarn_original: int = 1024
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0

    @property
    def softmax_scale(self) -> float:
        mscale = 0.1 * math.log(self.yarn_factor) + 1.0
        return mscale**2 / math.sqrt(self.qk_nope_head_dim + self.qk_rope_head_dim)


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, H, 192], k [T, H, 192], v [T, H, 128]) -> [T, H, 128]."""

# Rows of an expert are padded to a multiple of this, in training and in decoding: see `batches.TOKENS_MULTIPLE`.
EXPERT_ROWS, EXPERT_ROWS_DECODING = 128, 16

WeightForm = Callable[[Tensor, bool], Tensor]
"""(weight, stored in FP8) -> the weight as the forward pass shall see it; identity until quantisation is simulated."""


def yarn_frequencies(config: DemoConfig) -> Tensor:
    dim, theta = config.qk_rope_head_dim, config.rope_theta

    def correction(rotations: float) -> float:
        return dim * math.log(config.yarn_original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction(config.yarn_beta_fast)), 0)
    high = min(math.ceil(correction(config.yarn_beta_slow)), dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float64)
    ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    plain = theta ** (-2 * index / dim)
    return (plain * (1 - ramp) + plain / config.yarn_factor * ramp).float()


def rope_table(config: DemoConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions.float()[:, None] * yarn_frequencies(config)
    return angles.cos()[:, None], angles.sin()[:, None]


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` compiled where gradients are taken, which is where its time matters; eager elsewhere."""
    compiled = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(*arguments: Tensor | float) -> Tensor:
        chosen = compiled if torch.is_grad_enabled() else function
        return chosen(*arguments)

    return call


@fused
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [T, H, 64]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@fused
def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@fused
def combine(routed: Tensor, weights: Tensor) -> Tensor:
    """[T, K, h] outputs of the chosen experts, weighed by [T, K]."""
    return (routed * weights[..., None]).sum(1)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, form: WeightForm) -> Tensor:
        return rms_norm(x, form(self.weight, False), self.eps)


def matrix(*shape: int, gain: float = 0.6) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * gain / math.sqrt(shape[-1]))


class Attention(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        c = self.config = config
        heads = c.num_attention_heads
        self.q_a_proj = matrix(c.q_lora_rank, c.hidden_size)
        self.q_a_layernorm = Norm(c.q_lora_rank, 1e-6)
        self.q_b_proj = matrix(heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.q_lora_rank)
        self.kv_a_proj_with_mqa = matrix(c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size)
        self.kv_a_layernorm = Norm(c.kv_lora_rank, 1e-6)
        self.kv_b_proj = matrix(heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        self.o_proj = matrix(c.hidden_size, heads * c.v_head_dim, gain=0.1)

    def forward(self, x: Tensor, layer: int, rope: tuple[Tensor, Tensor], attend: Attend, form: WeightForm) -> Tensor:
        c, heads = self.config, self.config.num_attention_heads
        latent_q = self.q_a_layernorm(F.linear(x, form(self.q_a_proj, True)), form)
        q = F.linear(latent_q, form(self.q_b_proj, True)).unflatten(-1, (heads, -1))
        q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), -1)
        kv = F.linear(x, form(self.kv_a_proj_with_mqa, True))
        latent, k_rope = kv.split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        latent = self.kv_a_layernorm(latent, form)
        expanded = F.linear(latent, form(self.kv_b_proj, True)).unflatten(-1, (heads, -1))
        k_nope, v = expanded.split((c.qk_nope_head_dim, c.v_head_dim), -1)
        k_rope = apply_rope(k_rope[:, None], *rope).expand(-1, heads, -1)
        q = torch.cat((q_nope, apply_rope(q_rope, *rope)), -1)
        out = attend(layer, q, torch.cat((k_nope, k_rope), -1), v)
        return F.linear(out.flatten(1), form(self.o_proj, True))


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = matrix(2 * width, hidden)
        self.down_proj = matrix(hidden, width, gain=0.1)

    def forward(self, x: Tensor, form: WeightForm) -> Tensor:
        return F.linear(swiglu(F.linear(x, form(self.gate_up_proj, True))), form(self.down_proj, True))


class Moe(nn.Module):
    bias: Tensor
    load: Tensor

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        c = self.config = config
        self.gate = nn.Parameter(torch.randn(c.n_routed_experts, c.hidden_size) * 0.02)
        self.register_buffer("bias", torch.zeros(c.n_routed_experts))
        self.register_buffer("load", torch.zeros(c.n_routed_experts), persistent=False)
        self.counted: Tensor | None = None
        self.experts_gate_up = matrix(c.n_routed_experts, 2 * c.moe_intermediate_size, c.hidden_size)
        self.experts_down = matrix(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size, gain=0.1)
        self.shared_experts = Mlp(c.hidden_size, c.n_shared_experts * c.moe_intermediate_size)

    def route(self, x: Tensor, form: WeightForm) -> tuple[Tensor, Tensor]:
        """noaux_tc: expert ids and weights [T, K]; the bias steers the choice only."""
        c = self.config
        with torch.autocast("cpu", enabled=False):
            scores = F.linear(x.float(), form(self.gate, False)).sigmoid()
        choice = scores.detach() + self.bias
        groups = choice.unflatten(-1, (c.n_group, -1))
        kept = groups.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices
        dropped = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, kept, False)
        choice = groups.masked_fill(dropped[..., None], -torch.inf).flatten(1)
        ids = choice.topk(c.num_experts_per_tok, -1).indices
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor

    def forward(self, x: Tensor, form: WeightForm) -> Tensor:
        c, k = self.config, self.config.num_experts_per_tok
        ids, weights = self.route(x, form)
        counts = torch.bincount(ids.flatten(), minlength=c.n_routed_experts)
        if self.counted is not None:
            self.load += torch.bincount(ids[self.counted].flatten(), minlength=c.n_routed_experts)
        multiple = EXPERT_ROWS if self.training else EXPERT_ROWS_DECODING
        order, source, slots, sizes = padded_by_expert(ids, counts, multiple)
        gate_up = form(self.experts_gate_up, True).to(torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype)
        down = form(self.experts_down, True).to(gate_up.dtype)
        rows = x.to(gate_up.dtype).index_select(0, source).split(sizes)
        outputs = []
        for part, expert_in, expert_out in zip(rows, gate_up.unbind(0), down.unbind(0), strict=True):
            outputs.append(F.linear(swiglu(F.linear(part, expert_in)), expert_out))
        inverse = torch.empty_like(order).scatter_(0, order, slots)
        routed = torch.cat(outputs).index_select(0, inverse).unflatten(0, (-1, k))
        out: Tensor = combine(routed, weights) + self.shared_experts(x, form)
        return out


def padded_by_expert(ids: Tensor, counts: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Group (token, choice) pairs by expert, each group padded to a multiple of `multiple`.

    Returns:
        order: pairs by expert; source: token of each padded row (padding repeats token 0, its output is not used);
        slots: padded row of each pair of `order`; and the padded sizes of the groups.
    """
    experts = ids.flatten()
    order = experts.argsort(stable=True)
    padded = (counts + multiple - 1) // multiple * multiple
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    slots = torch.arange(order.numel()) + shift[experts[order]]
    source = torch.zeros(int(padded.sum()), dtype=torch.long)
    source[slots] = order // ids.shape[1]
    return order, source, slots, padded.tolist()


class Layer(nn.Module):
    def __init__(self, config: DemoConfig, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size) if dense else Moe(config)

    def forward(self, x: Tensor, layer: int, rope: tuple[Tensor, Tensor], attend: Attend, form: WeightForm) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x, form), layer, rope, attend, form)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x, form), form)
        return out


class DemoModel(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Parameter(torch.randn(c.vocab_size, c.hidden_size) * 0.8)
        self.layers = nn.ModuleList(Layer(c, i < c.first_k_dense_replace) for i in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Parameter(torch.randn(c.vocab_size, c.hidden_size) * 0.02)
        self.enorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = matrix(c.hidden_size, 2 * c.hidden_size)
        self.nextn = Layer(c, dense=False)
        self.nextn_norm = Norm(c.hidden_size, c.rms_norm_eps)

    def embed(self, ids: Tensor, form: WeightForm) -> Tensor:
        return F.embedding(ids, form(self.embed_tokens, False)).float()

    def trunk(self, ids: Tensor, positions: Tensor, attend: Attend, form: WeightForm) -> Tensor:
        """Hidden states [T, h] after the final norm."""
        rope = rope_table(self.config, positions)
        x = self.embed(ids, form)
        for index, layer in enumerate(self.layers):
            x = layer(x, index, rope, attend, form)
        hidden: Tensor = self.norm(x, form)
        return hidden

    def draft(self, hidden: Tensor, next_ids: Tensor, positions: Tensor, attend: Attend, form: WeightForm) -> Tensor:
        """Hidden states of the NextN layer, from h_i and token i+1 towards token i+2; the embedding half is first."""
        both = torch.cat((self.enorm(self.embed(next_ids, form), form), self.hnorm(hidden, form)), -1)
        x = F.linear(both, form(self.eh_proj, False)).float()
        x = self.nextn(x, self.config.num_hidden_layers, rope_table(self.config, positions), attend, form)
        out: Tensor = self.nextn_norm(x, form)
        return out

    def logits(self, hidden: Tensor, form: WeightForm) -> Tensor:
        return F.linear(hidden, form(self.lm_head, False))

    def moe_layers(self) -> list[Moe]:
        return [module for module in self.modules() if isinstance(module, Moe)]


def identity_form(weight: Tensor, fp8: bool) -> Tensor:
    return weight


class GroupedCausal:
    """Causal attention over flat sequences, laid out for it in padded groups: see `batches.Batch`."""

    def __init__(self, config: DemoConfig, shapes: list[tuple[int, int]], source: Tensor, places: Tensor) -> None:
        self.config, self.shapes, self.source, self.places = config, shapes, source, places

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = [rows * length for rows, length in self.shapes]
        parts = zip(*(t.index_select(0, self.source).split(sizes) for t in (q, k, v)), self.shapes, strict=True)
        outputs = [causal_attention(pq, pk, pv, shape, self.config.softmax_scale) for pq, pk, pv, shape in parts]
        return torch.cat(outputs).index_select(0, self.places)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int], scale: float) -> Tensor:
    """Attention within each sequence of a group of shape (rows, length); q, k [rows * length, H, 192], v [..., 128].

    Written out as two products, because on a CPU torch's fused kernel takes three times as long at these lengths.
    """
    heads, (rows, length) = q.shape[1], shape
    q, k, v = (t.view(rows, length, heads, -1).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1)
    weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scale).softmax(-1).to(v.dtype)
    out: Tensor = torch.bmm(weights, v).unflatten(0, (rows, heads)).transpose(1, 2).flatten(0, 1)
    return out
