"""One decoder layer: attention and feed-forward part, each preceded by its norm, around one residual stream."""

from __future__ import annotations

from torch import Tensor

from dsengine.kernels.registry import Kernels
from dsengine.model.attention_plan import AttentionPlan
from dsengine.model.config import ModelConfig
from dsengine.model.dense import DenseMLP
from dsengine.model.forward_batch import ForwardBatch
from dsengine.model.mla import LatentAttention
from dsengine.model.moe import MixtureOfExperts
from dsengine.model.norm import InputNorm
from dsengine.model.tensors import layer_prefix
from dsengine.model.weights import WeightSlots


class DecoderLayer:
    """Layer `index` of the model; `num_hidden_layers` is the NextN layer's."""

    def __init__(self, slots: WeightSlots, kernels: Kernels, config: ModelConfig, index: int) -> None:
        prefix, hidden, eps = layer_prefix(index), config.hidden_size, config.rms_norm_eps
        self._group = slots.layout.attention
        self.attention = LatentAttention(slots, kernels, config, f"{prefix}self_attn.")
        self.mlp: MixtureOfExperts | DenseMLP
        if config.is_moe_layer(index):
            self.mlp = MixtureOfExperts(slots, kernels, config, f"{prefix}mlp.")
        else:
            self.mlp = DenseMLP(slots, kernels, config, f"{prefix}mlp.")
        self.input_norm = InputNorm(
            slots, kernels, f"{prefix}input_layernorm.weight", hidden, eps, quantizes=self.attention.takes_fp8
        )
        self.post_attention_norm = InputNorm(
            slots, kernels, f"{prefix}post_attention_layernorm.weight", hidden, eps, quantizes=self.mlp.takes_fp8
        )

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: ForwardBatch,
        plan: AttentionPlan,
        cos_sin: Tensor,
        kv_cache: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(output of the feed-forward part, residual stream it is still to be added to), both [T, hidden_size]:
        the next norm adds the two, in one pass."""
        normed, residual = self.input_norm.activation_after_add(x, residual)
        attended = self._group.all_reduce(self.attention(normed, batch, plan, cos_sin, kv_cache))
        normed, residual = self.post_attention_norm.activation_after_add(attended, residual)
        return self.mlp(normed, batch.rank_tokens), residual

    def store(self, x: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor, kv_cache: Tensor) -> None:
        """What a call with x [T, hidden_size] and no residual leaves in the cache, and nothing else."""
        self.attention.store(self.input_norm.activation(x), positions, slots, cos_sin, kv_cache)
