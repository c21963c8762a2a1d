"""The DeepSeek-V2/V3 decoder: from a batch of tokens to hidden states and logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dsengine.kernels.registry import Kernels
from dsengine.model.attention_plan import plan_attention
from dsengine.model.config import ModelConfig
from dsengine.model.decoder_layer import DecoderLayer
from dsengine.model.forward_batch import ForwardBatch
from dsengine.model.lm_head import LmHead, vocabulary_rows
from dsengine.model.nextn import NextnLayer
from dsengine.model.norm import Norm
from dsengine.model.rope import rotary_table
from dsengine.model.weights import WeightSlots


class DeepseekModel:
    """The model with its embedding, layers, head and, where the checkpoint has one, its NextN layer.

    Building it allocates every parameter through `slots`, unfilled; `load_model` is what builds and fills one.

    Args:
        with_nextn: build the NextN layer too.
    """

    def __init__(self, slots: WeightSlots, kernels: Kernels, config: ModelConfig, with_nextn: bool) -> None:
        hidden = config.hidden_size
        self.config = config
        self.slots = slots
        self._kernels = kernels
        self.device = slots.device
        self.dtype = slots.dtype
        self.cos_sin = rotary_table(config, slots.device)
        self._group = slots.layout.attention
        self._vocab_here, _ = slots.layout.padded_part(config.vocab_size)
        self.embed_tokens = vocabulary_rows(
            slots, "model.embed_tokens.weight", config.vocab_size, hidden, slots.layout.attention
        )
        self.layers = [DecoderLayer(slots, kernels, config, index) for index in range(config.num_hidden_layers)]
        self.norm = Norm(slots, kernels, "model.norm.weight", hidden, config.rms_norm_eps)
        self.lm_head = LmHead(slots, kernels, config.vocab_size, hidden)
        self.nextn = NextnLayer(slots, kernels, config, self.embed, self.cos_sin) if with_nextn else None

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings [T, hidden_size] of int64 ids [T]."""
        return self._group.all_reduce(self._kernels.embed(input_ids, self.embed_tokens, self._vocab_here.start))

    def forward(self, batch: ForwardBatch, kv_caches: Sequence[Tensor]) -> Tensor:
        """Run all layers, writing the new tokens' latents into the caches.

        Args:
            batch: T tokens.
            kv_caches: one per layer, [blocks, block_size, R + rope] of the model's dtype; entry `num_hidden_layers`,
                if there is one, is the NextN layer's and left alone here.

        Returns:
            [T, hidden_size] after the final norm.
        """
        plan = plan_attention(batch, block_size=kv_caches[0].shape[1])
        x, residual = self.embed(batch.input_ids), None
        for index, (layer, kv_cache) in enumerate(zip(self.layers, kv_caches[: len(self.layers)], strict=True)):
            try:
                x, residual = layer(x, residual, batch, plan, self.cos_sin, kv_cache)
            except Exception as error:  # for the report, where other ranks have failed
                error.add_note(f"layer {index}")
                raise
        normed, _ = self.norm.after_add(x, residual)
        return normed

    def compute_logits(self, hidden: Tensor, rank_rows: tuple[int, ...] | None = None) -> Tensor:
        """Hidden states [N, hidden_size] after a final norm → float32 logits [N, vocab_size].

        Args:
            rank_rows: N of every attention group, all of which ask at the same time; None where there is one only.
        """
        return self.lm_head(hidden, rank_rows)
