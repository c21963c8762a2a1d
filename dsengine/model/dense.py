"""The feed-forward part of a layer without experts, shared by the ranks of an attention group or by all ranks.

A group has its tokens on every rank, so that its ranks' results only have to be summed. Shared by all ranks, each holds
less of the layer, but the tokens have to be brought together first, as for routed experts.
"""

from __future__ import annotations

from torch import Tensor

from dsengine.kernels.registry import Kernels
from dsengine.model.activations import Activation
from dsengine.model.config import ModelConfig
from dsengine.model.moe import GatedMLP
from dsengine.model.token_rows import ActivationRows
from dsengine.model.weights import WeightSlots
from dsengine.parallel.exchange import gather_tokens, group_tokens, sum_over_group, token_shares


class DenseMLP:
    """One gated MLP, summed over the ranks that share it."""

    def __init__(self, slots: WeightSlots, kernels: Kernels, config: ModelConfig, prefix: str) -> None:
        self._layout, hidden = slots.layout, config.hidden_size
        self.mlp = GatedMLP(slots, kernels, prefix, hidden, config.intermediate_size, self._layout.dense)
        self._rows = ActivationRows(hidden, slots.dtype, takes_fp8=self.mlp.takes_fp8)

    @property
    def takes_fp8(self) -> bool:
        """Whether the input is wanted in FP8 too."""
        return self.mlp.takes_fp8

    def __call__(self, x: Activation, rank_tokens: tuple[int, ...] | None = None) -> Tensor:
        """[T, hidden_size] → the same.

        Args:
            rank_tokens: of the pass, as in `ForwardBatch`.
        """
        layout, num_tokens = self._layout, x.value.shape[0]
        if layout.dense is layout.attention:
            return layout.attention.all_reduce(self.mlp(x))
        tokens = group_tokens(num_tokens, rank_tokens, layout.dp_size, layout.dp_rank)
        shares = token_shares(tokens, layout.attention.size, layout.world.rank)
        rows, combine = gather_tokens(layout.world, self._rows.pack(x.rows(shares.own)), shares)
        value, scale = self._rows.unpack(rows)
        part = self.mlp(Activation(value)) if scale is None else self.mlp.multiply_fp8(value, scale, x.value.dtype)
        return sum_over_group(layout.attention, None, combine(part), num_tokens, shares)
