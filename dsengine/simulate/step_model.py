"""How long a step takes in which every attention group computes what its scheduler chose.

The rooflines of `dsengine plan` for batches of decodes and chunks of prompts, and published costs of the exchanges. In
every layer the groups wait for each other, so that the fullest of them decides. Chunks of prompts are computed in the
expanded form, decodes in the absorbed one. A roofline is a bound; `efficiency` is how much of it is assumed to be
reached, by all operations alike, and is never fitted to anything. Exchanges cost what was measured, whatever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from dsengine.model.config import ModelConfig
from dsengine.plan.communication import all_reduce_seconds, exchange_seconds
from dsengine.plan.hardware import Gpu
from dsengine.plan.layout import Layout
from dsengine.plan.roofline import RankWork, Work, total_seconds


@dataclass(frozen=True)
class GroupStep:
    """What one attention group computes in a step.

    Attributes:
        decodes: requests that compute one token.
        context: cached tokens that these attend to, all together.
        prompt_tokens: tokens of chunks of prompts.
        prompt_pairs: pairs of one of these and a token that it attends to.
        expanded: tokens whose keys and values the chunks need: those before them, and their own.
        samples: tokens that are drawn.
    """

    decodes: int = 0
    context: int = 0
    prompt_tokens: int = 0
    prompt_pairs: int = 0
    expanded: int = 0
    samples: int = 0

    @property
    def tokens(self) -> int:
        return self.decodes + self.prompt_tokens


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; `communication` is what the exchanges add to it."""

    total: float
    communication: float


class StepModel:
    """Times of the steps of one instance of a layout.

    Args:
        cache_bytes: bytes of a cached token in one layer.
        efficiency: part of every roofline that is reached, in (0, 1].
        overlap: exchanges run beside the computation of another half of the batch, without a cost: each layer takes
            the longer of the two.

    Raises:
        ValueError: `efficiency` is out of range.
    """

    def __init__(
        self, config: ModelConfig, layout: Layout, gpu: Gpu, cache_bytes: int, *, efficiency: float, overlap: bool
    ) -> None:
        if not 0 < efficiency <= 1:
            raise ValueError(f"efficiency is {efficiency}; it must be more than 0 and at most 1")
        self.config = config
        self.layout = layout
        self.efficiency = efficiency
        self.overlap = overlap
        self._rank = RankWork(config, layout, gpu, cache_bytes)
        self._linear = lru_cache(maxsize=65536)(self._linear_seconds)
        self._mixed = lru_cache(maxsize=65536)(self._routed_seconds)

    @cached_property
    def _num_moe(self) -> int:
        return self.config.num_hidden_layers - self.config.first_k_dense_replace

    def seconds(self, steps: Sequence[GroupStep], weight: float = 1.0) -> StepTime:
        """One step of all groups, none of which may be left out: an idle one has an empty step.

        Args:
            weight: groups that each of `steps` stands for.
        """
        num_dense = self.config.first_k_dense_replace
        attention = [self._attention(step) for step in steps]
        linear = [self._linear(step.tokens, step.decodes) for step in steps]
        moe = max(a + projections + shared for a, (projections, shared, _) in zip(attention, linear, strict=True))
        dense = max(a + projections + mlp for a, (projections, _, mlp) in zip(attention, linear, strict=True))
        moe += self._mixed(round(weight * sum(step.tokens for step in steps)))
        head = max(self._rank.head(step.samples).seconds(self._rank.gpu) for step in steps) / self.efficiency
        tokens = max(step.tokens for step in steps)
        sums, exchanges = self._communication(tokens, any(step.prompt_tokens for step in steps))
        computed = self._num_moe * moe + num_dense * dense + head
        if self.overlap:
            total = self._num_moe * max(moe, exchanges) + num_dense * max(dense, sums) + head
        else:
            total = computed + self._num_moe * exchanges + num_dense * sums
        return StepTime(total, total - computed)

    def _attention(self, step: GroupStep) -> float:
        """Attention proper of one layer, and what depends on how many cached tokens are read."""
        config, rank, seconds = self.config, self._rank, 0.0
        if step.decodes:
            per_pair = 2.0 * rank.heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
            seconds += rank.gpu.seconds(step.context * rank.cache_bytes, step.context * per_pair, is_fp8=False)
        if step.prompt_tokens:
            rows = rank.heads * (config.qk_nope_head_dim + config.v_head_dim)
            widths = config.qk_head_dim + config.v_head_dim
            moved = rank.heads * 2 * (step.expanded * widths + step.prompt_tokens * widths)
            works = [
                rank.linear("kv_b", rows, config.kv_lora_rank, step.expanded),
                Work("mla", moved, 2.0 * step.prompt_pairs * rank.heads * widths),
            ]
            seconds += total_seconds(works, rank.gpu)
        return seconds / self.efficiency

    def _linear_seconds(self, tokens: int, decodes: int) -> tuple[float, float, float]:
        """Of one layer: projections around attention; router and shared experts; the MLP of a dense layer."""
        if tokens == 0:
            return 0.0, 0.0, 0.0
        config, rank = self.config, self._rank
        projections = [
            *rank.queries(tokens),
            rank.linear("o", config.hidden_size, rank.heads * config.v_head_dim, tokens),
        ]
        if decodes:
            projections += [
                rank.absorbed("w_uk", config.qk_nope_head_dim, decodes),
                rank.absorbed("w_uv", config.v_head_dim, decodes),
            ]
        shared = [rank.router(tokens)]
        if config.n_shared_experts:
            shared += rank.gated_mlp("shared", config.shared_intermediate_size // self.layout.attn_tp, tokens)
        parts = (projections, shared, rank.dense(tokens))
        first, second, third = (total_seconds(works, rank.gpu) / self.efficiency for works in parts)
        return first, second, third

    def _routed_seconds(self, tokens: int) -> float:
        return self._rank.routed_experts(tokens).seconds(self._rank.gpu) / self.efficiency

    def _communication(self, tokens: int, has_prompts: bool) -> tuple[float, float]:
        """What the fullest group needs in a dense layer, where its ranks add up their parts twice, and in a MoE layer,
        where with other groups around dispatch and combine take the place of the second sum."""
        layout, row = self.layout, 2 * self.config.hidden_size
        reduce = all_reduce_seconds(tokens * row, layout.attn_tp)
        if layout.attn_dp == 1:
            return 2 * reduce, 2 * reduce
        share = -(-tokens // layout.attn_tp)
        exchange = exchange_seconds(self.config, share, layout.world, low_latency=not has_prompts)
        return 2 * reduce, reduce + exchange
