"""The least time a decode step or a prompt can take: each operation bounded by its bytes or by its arithmetic.

Every weight is counted once per operation, in the type the checkpoint stores it in; FP8 weights are multiplied at the
FP8 rate, the absorbed products and attention at the bf16 rate. Nothing is counted for launches, communication, norms,
rope, routing and sampling: the bounds are out of reach, and how far out of reach is what benchmarks report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from dsengine.model.config import ModelConfig
from dsengine.plan.hardware import Gpu
from dsengine.plan.layout import Layout

_BF16 = 2
_SCALE = 4 / 128**2  # bytes of float32 scales per FP8 weight


@dataclass(frozen=True)
class Work:
    """What an operation on one rank must move and compute.

    Attributes:
        bytes: weights, cache and activations, each read or written once.
        flops: two for each multiplication and addition.
        is_fp8: computed at the FP8 rate.
    """

    name: str
    bytes: float
    flops: float
    is_fp8: bool = False

    def seconds(self, gpu: Gpu) -> float:
        return gpu.seconds(self.bytes, self.flops, self.is_fp8)


@dataclass(frozen=True)
class Load:
    """What one rank is asked for in a step.

    Attributes:
        tokens: new tokens of its attention group.
        routed_tokens: tokens of all groups together, which the experts of all ranks share.
        context: cached tokens each new token attends to.
        requests: that the tokens belong to, whose cache is read once for all of a request's tokens; None: one each.
    """

    tokens: int
    routed_tokens: int
    context: int
    requests: int | None = None

    @classmethod
    def decode(cls, layout: Layout, requests: int, context: int) -> Load:
        """One new token for each of `requests` spread over all groups: the load of the fullest group."""
        return cls(ceil(requests / layout.attn_dp), requests, context)


def total_seconds(works: list[Work], gpu: Gpu) -> float:
    return sum(work.seconds(gpu) for work in works)


def experts_hit(num_experts: int, top_k: int, tokens: int) -> float:
    """Experts that at least one of `tokens` chooses, in the mean, if every choice is uniform."""
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


class RankWork:
    """Operations of one rank under a layout.

    Args:
        cache_bytes: bytes of a cached token in one layer; default: bf16.
    """

    def __init__(self, config: ModelConfig, layout: Layout, gpu: Gpu, cache_bytes: int | None = None) -> None:
        self.config = config
        self.layout = layout
        self.gpu = gpu
        self.cache_bytes = config.latent_dim * _BF16 if cache_bytes is None else cache_bytes
        self.is_fp8 = config.quantization is not None and gpu.fp8_flops is not None
        self.heads = config.num_attention_heads // layout.attn_tp

    def linear(self, name: str, rows: int, columns: int, tokens: float, weights: float = 1) -> Work:
        """y = x Wᵀ with a weight [rows, columns] that FP8 checkpoints quantise; x is FP8 too where W is, y is bf16.

        Args:
            tokens: rows of x and y in all.
            weights: how many weights of this shape are read (experts); each token meets one of them.
        """
        weight_bytes, x_bytes = (1 + _SCALE, 1) if self.is_fp8 else (_BF16, _BF16)
        moved = weights * rows * columns * weight_bytes + tokens * (columns * x_bytes + rows * _BF16)
        return Work(name, moved, 2.0 * rows * columns * tokens, self.is_fp8)

    def decode_attention(self, load: Load) -> list[Work]:
        """The absorbed form, from the normalised input to o_proj's output."""
        config, tokens, heads = self.config, load.tokens, self.heads
        rank, pairs = config.kv_lora_rank, load.tokens * load.context
        cached = (load.tokens if load.requests is None else load.requests) * load.context
        attended = Work("mla", cached * self.cache_bytes, 2.0 * pairs * heads * (2 * rank + config.qk_rope_head_dim))
        return [
            *self.queries(tokens),
            self.absorbed("w_uk", config.qk_nope_head_dim, tokens),
            attended,
            self.absorbed("w_uv", config.v_head_dim, tokens),
            self.linear("o", config.hidden_size, heads * config.v_head_dim, tokens),
        ]

    def prefill_attention(self, tokens: int, prompt: int) -> list[Work]:
        """The expanded form for `tokens` tokens of whole prompts of `prompt` tokens each."""
        config, heads = self.config, self.heads
        widths = config.qk_head_dim + config.v_head_dim
        moved = tokens * heads * (widths + config.qk_head_dim + config.v_head_dim) * _BF16
        kv_rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
        return [
            *self.queries(tokens),
            self.linear("kv_b", kv_rows, config.kv_lora_rank, tokens),
            Work("mla", moved, 2.0 * tokens * (prompt / 2) * heads * widths),
            self.linear("o", config.hidden_size, heads * config.v_head_dim, tokens),
        ]

    def queries(self, tokens: int) -> Iterator[Work]:
        """From the normalised input to queries and latents."""
        config = self.config
        query_rows = self.heads * config.qk_head_dim
        if config.q_lora_rank is None:
            yield self.linear("q", query_rows, config.hidden_size, tokens)
            yield self.linear("kv_a", config.latent_dim, config.hidden_size, tokens)
        else:
            yield self.linear("qkv_a", config.q_lora_rank + config.latent_dim, config.hidden_size, tokens)
            yield self.linear("q_b", query_rows, config.q_lora_rank, tokens)

    def absorbed(self, name: str, per_head: int, tokens: int) -> Work:
        """A product with half of kv_b: "w_uk", or "w_uv" with the values' width."""
        rank, heads = self.config.kv_lora_rank, self.heads
        weight = heads * per_head * rank * (1 if self.is_fp8 else _BF16)
        moved = weight + tokens * heads * (per_head + rank) * _BF16
        return Work(name, moved, 2.0 * tokens * heads * per_head * rank)

    def gated_mlp(self, name: str, intermediate: int, tokens: int) -> list[Work]:
        hidden = self.config.hidden_size
        return [
            self.linear(f"{name}_gate_up", 2 * intermediate, hidden, tokens),
            self.linear(f"{name}_down", hidden, intermediate, tokens),
        ]

    def mixture(self, load: Load) -> list[Work]:
        """Router, shared experts and routed experts of one layer."""
        config, tokens = self.config, load.tokens
        works = [self.router(tokens)]
        if config.n_shared_experts:
            works += self.gated_mlp("shared", config.shared_intermediate_size // self.layout.attn_tp, tokens)
        return [*works, self.routed_experts(load.routed_tokens)]

    def router(self, tokens: int) -> Work:
        """Logits of all experts, from bf16 activations and weights."""
        experts, hidden = self.config.n_routed_experts, self.config.hidden_size
        return Work("router", (experts + tokens) * hidden * _BF16, 2.0 * experts * hidden * tokens)

    def routed_experts(self, routed_tokens: int) -> Work:
        """This rank's part of the experts, for tokens of the whole world and uniform choices.

        Redundant experts count as so many more experts to choose from.
        """
        config, hidden = self.config, self.config.hidden_size
        held = config.n_routed_experts + self.layout.redundant
        inter, share = config.moe_intermediate_size, 1 / self.layout.world
        if self.layout.experts == "tp":
            inter, share = inter // self.layout.world, 1.0
        hit = share * experts_hit(held, config.num_experts_per_tok, routed_tokens)
        pairs = share * routed_tokens * config.num_experts_per_tok
        gate_up = self.linear("experts", 2 * inter, hidden, pairs, weights=hit)
        down = self.linear("experts", hidden, inter, pairs, weights=hit)
        return Work("experts", gate_up.bytes + down.bytes, gate_up.flops + down.flops, self.is_fp8)

    def decode_layer(self, load: Load, is_moe: bool) -> list[Work]:
        attention = self.decode_attention(load)
        return attention + (self.mixture(load) if is_moe else self.dense(load.tokens))

    def dense(self, tokens: int) -> list[Work]:
        """The MLP of a layer without experts, for `tokens` tokens of each group."""
        tokens *= self.layout.attn_dp if self.layout.dense_over_world else 1
        return self.gated_mlp("dense", self.config.intermediate_size // self.layout.dense_ranks, tokens)

    def prefill_layer(self, load: Load, is_moe: bool) -> list[Work]:
        """`load.tokens` new tokens of whole prompts of `load.context` tokens."""
        attention = self.prefill_attention(load.tokens, load.context)
        return attention + (self.mixture(load) if is_moe else self.dense(load.tokens))

    def head(self, tokens: int) -> Work:
        """Logits of `tokens` tokens of each group."""
        tokens *= self.layout.attn_dp if self.layout.lm_head_over_world else 1
        rows, hidden = self.config.vocab_size // self.layout.lm_head_ranks, self.config.hidden_size
        moved = rows * hidden * _BF16 + tokens * (hidden * _BF16 + rows * 4)
        return Work("lm_head", moved, 2.0 * rows * hidden * tokens)

    def decode_step_seconds(self, load: Load) -> float:
        """All layers and the head, one new token per request."""
        config = self.config
        moe = total_seconds(self.decode_layer(load, is_moe=True), self.gpu)
        dense = total_seconds(self.decode_layer(load, is_moe=False), self.gpu)
        num_dense = config.first_k_dense_replace
        layers = num_dense * dense + (config.num_hidden_layers - num_dense) * moe
        return layers + self.head(load.tokens).seconds(self.gpu)
