"""Multi-head latent attention, absorbed for few new tokens and expanded for many (DeepSeek-V2, section 2.1).

Both forms compute the same thing from the same cache of one latent per token. Absorbed, the heads' queries are moved
into the latent space by W_UK and the result back by W_UV: no key or value is ever built. Expanded, latents become keys
of 192 and values of 128 per head, which makes each query-key pair 3.4 times cheaper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.registry import Kernels
from dsengine.model.activations import Activation
from dsengine.model.attention_plan import AbsorbedPart, AttentionPlan, ContextPiece, ExpandedPart, runs_absorbed
from dsengine.model.config import LATENT_NORM_EPS, ModelConfig
from dsengine.model.forward_batch import ForwardBatch
from dsengine.model.linear import Linear
from dsengine.model.norm import InputNorm
from dsengine.model.weights import Slot, WeightSlots

__all__ = ["LatentAttention", "runs_absorbed"]


class LatentAttention:
    """MLA of one layer, or of this rank's H heads of it: the ranks' results add up to the layer's.

    The tensors `w_uk` [H, nope, R] and `w_uv` [H, v, R] are views of one kv_b_proj, which is always kept in the
    activations' dtype: both forms need it in every step.
    """

    def __init__(self, slots: WeightSlots, kernels: Kernels, config: ModelConfig, prefix: str) -> None:
        self._kernels = kernels
        self._config = config
        self.softmax_scale = config.softmax_scale
        all_heads = config.num_attention_heads
        heads_here = slots.layout.part(all_heads)
        heads = self._num_heads = heads_here.stop - heads_here.start
        query_rows = all_heads * config.qk_head_dim
        self.q_norm: InputNorm | None = None
        self.q_b: Linear | None = None
        if config.q_lora_rank is None:
            self._query_width = heads * config.qk_head_dim
            query_name = f"{prefix}q_proj.weight"
        else:
            self._query_width = config.q_lora_rank
            query_name = f"{prefix}q_a_proj.weight"
            q_b_name = f"{prefix}q_b_proj.weight"
            self.q_b = Linear(slots, kernels, config.q_lora_rank, {q_b_name: query_rows}, cut_rows=(q_b_name,))
            self.q_norm = InputNorm(
                slots,
                kernels,
                f"{prefix}q_a_layernorm.weight",
                config.q_lora_rank,
                LATENT_NORM_EPS,
                quantizes=self.q_b.takes_fp8,
            )
        # The query's part comes first: only then do the rows of FP8 blocks stay aligned (1536 is a multiple of 128).
        in_width = query_rows if config.q_lora_rank is None else config.q_lora_rank
        in_parts = {query_name: in_width, f"{prefix}kv_a_proj_with_mqa.weight": config.latent_dim}
        per_rank = (query_name,) if config.q_lora_rank is None else ()
        self.qkv_a = Linear(slots, kernels, config.hidden_size, in_parts, cut_rows=per_rank)
        self.kv_norm_weight = slots.tensor(f"{prefix}kv_a_layernorm.weight", config.kv_lora_rank, dtype=torch.float32)
        head_rows = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b = slots.empty(heads * head_rows, config.kv_lora_rank)
        rows = slice(heads_here.start * head_rows, heads_here.stop * head_rows)
        slots.add(f"{prefix}kv_b_proj.weight", Slot(self.kv_b, cut=None if slots.layout.is_single else (rows,)))
        per_head = self.kv_b.view(heads, -1, config.kv_lora_rank)
        self.w_uk, self.w_uv = torch.split(per_head, [config.qk_nope_head_dim, config.v_head_dim], dim=1)
        out_parts = {f"{prefix}o_proj.weight": config.hidden_size}
        self.o_proj = Linear(slots, kernels, all_heads * config.v_head_dim, out_parts, cut_columns=True)

    @property
    def takes_fp8(self) -> bool:
        """Whether the input is wanted in FP8 too."""
        return self.qkv_a.takes_fp8

    def __call__(
        self, x: Activation, batch: ForwardBatch, plan: AttentionPlan, cos_sin: Tensor, kv_cache: Tensor
    ) -> Tensor:
        """Attend, after storing the new tokens' latents in the cache.

        Args:
            x: [T, hidden_size].
            cos_sin: float32 [positions, rope], as from `rotary_table`.
            kv_cache: [blocks, block_size, R + rope] of x's dtype, or uint8 [blocks, block_size, bytes of an FP8 token].

        Returns:
            [T, hidden_size], this rank's share of the sum.
        """
        if batch.num_tokens == 0:
            return x.value
        config = self._config
        query, kv_a = self.qkv_a(x).split_with_sizes((self._query_width, config.latent_dim), dim=-1)
        if self.q_norm is not None and self.q_b is not None:
            query = self.q_b(self.q_norm.activation(query))
        query = query.reshape(-1, self._num_heads, config.qk_head_dim)
        q_nope, q_rope = query.split_with_sizes((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        q_rope, latents = self._kernels.mla_prep(
            q_rope, kv_a, self.kv_norm_weight, LATENT_NORM_EPS, cos_sin, batch.positions, batch.slot_mapping, kv_cache
        )
        split = plan.num_absorbed_tokens
        parts = []
        if plan.absorbed is not None:
            parts.append(self._attend_absorbed(q_nope[:split], q_rope[:split], plan.absorbed, kv_cache))
        if plan.expanded is not None:
            expanded_query = torch.cat((q_nope[split:], q_rope[split:]), dim=-1)
            parts.append(self._attend_expanded(expanded_query, latents[split:], plan.expanded, kv_cache))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.o_proj(attended)

    def store(self, x: Activation, positions: Tensor, slots: Tensor, cos_sin: Tensor, kv_cache: Tensor) -> None:
        """Store the latents of x [T, hidden_size] in the cache: all that later tokens need of them."""
        _, kv_a = self.qkv_a(x).split_with_sizes((self._query_width, self._config.latent_dim), dim=-1)
        no_queries = kv_a.new_empty((kv_a.shape[0], 0, self._config.qk_rope_head_dim))
        self._kernels.mla_prep(
            no_queries, kv_a, self.kv_norm_weight, LATENT_NORM_EPS, cos_sin, positions, slots, kv_cache
        )

    def _attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, part: AbsorbedPart, kv_cache: Tensor) -> Tensor:
        """[T, H, nope] and [T, H, rope] → [T, H · v], T the tokens of this part."""
        q_latent = self._kernels.absorb_queries(q_nope, self.w_uk)
        attended, _ = self._kernels.mla_decode(
            q_latent,
            q_rope,
            kv_cache,
            part.block_table,
            part.cache_seqlens,
            part.cu_seqlens_q,
            self.softmax_scale,
            max_seqlen_q=part.max_seqlen_q,
            max_seqlen_k=part.max_seqlen_k,
            ancestor_mask=part.ancestor_mask,
        )
        return self._kernels.release_values(attended, self.w_uv).flatten(1)

    def _attend_expanded(self, query: Tensor, latents: Tensor, part: ExpandedPart, kv_cache: Tensor) -> Tensor:
        """[T, H, nope + rope] and the new latents [T, R + rope] → [T, H · v], T the tokens of this part."""
        keys, values = self._expand(latents)
        out, lse = self._kernels.mla_prefill(
            query,
            keys,
            values,
            part.cu_seqlens_q,
            part.cu_seqlens_q,
            self.softmax_scale,
            causal=True,
            need_lse=bool(part.pieces),
            seqlens_q=part.seqlens_q,
            seqlens_k=part.seqlens_q,
        )
        for piece in part.pieces:
            assert lse is not None
            rows = piece.queries
            out[rows], lse[rows] = self._add_context(query[rows], out[rows], lse[rows], piece, kv_cache)
        return out.flatten(1)

    def _add_context(
        self, query: Tensor, out: Tensor, lse: Tensor, piece: ContextPiece, kv_cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Merge attention over a piece of the cached context into what these queries have gathered so far."""
        rank, dtype = self._config.kv_lora_rank, query.dtype
        keys, values = self._expand(self._kernels.gather_latents(kv_cache, piece.slots, rank=rank, dtype=dtype))
        context_out, context_lse = self._kernels.mla_prefill(
            query,
            keys,
            values,
            piece.cu_seqlens_q,
            piece.cu_seqlens_k,
            self.softmax_scale,
            causal=False,
            seqlens_q=piece.seqlens_q,
            seqlens_k=piece.seqlens_k,
        )
        assert context_lse is not None
        return self._kernels.merge_attention(context_out, context_lse, out, lse)

    def _expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [S, R + rope] → keys [S, H, nope + rope] and values [S, H, v]."""
        config = self._config
        heads = self._num_heads
        latent, k_rope = torch.split(latents, [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        per_head = self._kernels.linear(latent, self.kv_b).view(latents.shape[0], heads, -1)
        k_nope, values = torch.split(per_head, [config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        keys = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, heads, -1)), dim=-1)
        return keys, values
