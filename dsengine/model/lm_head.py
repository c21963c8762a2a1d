"""The last product: hidden states to logits of the whole vocabulary, whichever ranks hold its rows.

The ranks of an attention group, or all ranks, hold as many rows each; the last ones may be padding, so that any
vocabulary can be cut. What travels are logits in the model's own type, half of what float32 would be in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.registry import Kernels
from dsengine.model.weights import Slot, WeightSlots
from dsengine.parallel.collectives import Group
from dsengine.parallel.exchange import gather_tokens, group_tokens, sum_over_group, token_shares


class LmHead:
    """Rows [vocab_size, hidden_size] of "lm_head.weight"; no model that is served shares them with its embedding."""

    def __init__(self, slots: WeightSlots, kernels: Kernels, vocab_size: int, hidden_size: int) -> None:
        self._linear = kernels.linear
        self._layout, self._vocab_size = slots.layout, vocab_size
        self.weight = vocabulary_rows(slots, "lm_head.weight", vocab_size, hidden_size, self._layout.lm_head)

    def __call__(self, hidden: Tensor, rank_rows: tuple[int, ...] | None = None) -> Tensor:
        """Hidden states [N, hidden_size] → float32 logits [N, vocab_size].

        Args:
            rank_rows: N of every attention group; None where there is one group only.
        """
        layout = self._layout
        if layout.lm_head.size == 1:
            return self._linear(hidden, self.weight).float()
        if layout.lm_head is layout.attention:
            logits = layout.attention.all_gather(self._linear(hidden, self.weight))
        else:
            logits = self._over_world(hidden, rank_rows)
        return logits[:, : self._vocab_size].float()

    def _over_world(self, hidden: Tensor, rank_rows: tuple[int, ...] | None) -> Tensor:
        """Every rank multiplies the rows of all groups by its part of the vocabulary, and gets the other parts of the
        rows that it brought."""
        layout, world, width = self._layout, self._layout.world, len(self.weight)
        rows = group_tokens(len(hidden), rank_rows, layout.dp_size, layout.dp_rank)
        shares = token_shares(rows, layout.attention.size, world.rank)
        if not shares.num_tokens:
            return hidden.new_empty((0, world.size * width))
        gathered, _ = gather_tokens(world, hidden[shares.own], shares)
        parts = self._linear(gathered, self.weight)
        sent = [max(shares.counts)] * world.size if shares.is_padded else list(shares.counts)
        count = sent[world.rank]
        whole = world.all_to_all_rows(parts, sent, [count] * world.size).view(world.size, count, width)
        own = whole.transpose(0, 1).reshape(count, world.size * width)[: shares.counts[world.rank]]
        return sum_over_group(layout.attention, None, own, len(hidden), shares)


def vocabulary_rows(slots: WeightSlots, name: str, vocab_size: int, hidden_size: int, group: Group) -> Tensor:
    """This rank's rows of [vocab_size, hidden_size]: as many on each of `group`'s, those past the vocabulary zero."""
    here, rows = slots.layout.padded_part(vocab_size, group)
    if slots.layout.is_single:
        return slots.tensor(name, rows, hidden_size)
    table = torch.zeros((rows, hidden_size), dtype=slots.dtype, device=slots.device)
    slots.add(name, Slot(table[: here.stop - here.start], cut=(here,)))
    return table
