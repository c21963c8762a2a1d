"""The NextN layer (DeepSeek calls it MTP): a decoder layer that predicts one token further than the main model.

From the main model's hidden state at position i and the token at i + 1 it predicts token i + 2. It is the drafter of
speculative decoding. Source: DeepSeek-V3, section 2.2; in the published weights the embedding's half of eh_proj comes
first, the reverse of the paper.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsengine.kernels.registry import Kernels
from dsengine.model.attention_plan import plan_attention
from dsengine.model.config import ModelConfig
from dsengine.model.decoder_layer import DecoderLayer
from dsengine.model.forward_batch import ForwardBatch
from dsengine.model.linear import Linear
from dsengine.model.norm import Norm
from dsengine.model.tensors import layer_prefix
from dsengine.model.weights import WeightSlots


class NextnLayer:
    """Shares embedding and head with the main model, and the layout of its cache with every other layer.

    Args:
        embed: the main model's, int64 ids [T] → [T, hidden_size].
        cos_sin: rotary table of the main model.
    """

    def __init__(
        self,
        slots: WeightSlots,
        kernels: Kernels,
        config: ModelConfig,
        embed: Callable[[Tensor], Tensor],
        cos_sin: Tensor,
    ) -> None:
        prefix, hidden = layer_prefix(config.num_hidden_layers), config.hidden_size
        self._embed = embed
        self._cos_sin = cos_sin
        self.enorm = Norm(slots, kernels, f"{prefix}enorm.weight", hidden, config.rms_norm_eps)
        self.hnorm = Norm(slots, kernels, f"{prefix}hnorm.weight", hidden, config.rms_norm_eps)
        self.eh_proj = Linear(slots, kernels, 2 * hidden, {f"{prefix}eh_proj.weight": hidden})
        self.layer = DecoderLayer(slots, kernels, config, config.num_hidden_layers)
        self.norm = Norm(slots, kernels, f"{prefix}shared_head.norm.weight", hidden, config.rms_norm_eps)

    def forward(self, previous_hidden: Tensor, next_token_ids: Tensor, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """One step of drafting for the same tokens, positions and slots the main model ran on.

        Args:
            previous_hidden: [T, hidden_size], the main model's hidden states after its final norm, at positions i (or
                this layer's own output, when drafting further).
            next_token_ids: int64 [T], the tokens at positions i + 1.
            batch: of the same T tokens; its `input_ids` are not read.
            kv_cache: this layer's cache, [blocks, block_size, R + rope].

        Returns:
            [T, hidden_size] after shared_head.norm: `compute_logits` of it scores the tokens at positions i + 2.
        """
        x = self._combine(previous_hidden, next_token_ids)
        plan = plan_attention(batch, block_size=kv_cache.shape[1])
        x, residual = self.layer(x, None, batch, plan, self._cos_sin, kv_cache)
        normed, _ = self.norm.after_add(x, residual)
        return normed

    def store(
        self, previous_hidden: Tensor, next_token_ids: Tensor, positions: Tensor, slots: Tensor, kv_cache: Tensor
    ) -> None:
        """What `forward` does to the cache, without an output: the entries of a single layer need no attention.

        Args:
            positions, slots: int64 [T].
        """
        self.layer.store(self._combine(previous_hidden, next_token_ids), positions, slots, self._cos_sin, kv_cache)

    def _combine(self, previous_hidden: Tensor, next_token_ids: Tensor) -> Tensor:
        embedding = self._embed(next_token_ids)
        return self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(previous_hidden)), dim=-1))
