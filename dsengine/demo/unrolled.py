"""The NextN layer drafting on from its own outputs, in its training form: what it predicts, and how often rightly."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsengine.demo.batches import Batch, collate, encode
from dsengine.demo.model import DemoModel, GroupedCausal, WeightForm
from dsengine.demo.problems import held_out_conversations


class Unrolled:
    """Attention of one pass after the other over the same tokens: token i sees the first pass's keys up to i, and of
    later passes only its own, since these are the drafts that its tree would hold."""

    def __init__(self, causal: GroupedCausal) -> None:
        self._causal = causal
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._keys.append(k)
        self._values.append(v)
        if len(self._keys) == 1:
            return self._causal(layer, q, k, v)
        shapes, source = self._causal.shapes, self._causal.source
        sizes = [rows * length for rows, length in shapes]
        parts = [t.index_select(0, source).split(sizes) for t in (q, *self._keys, *self._values)]
        outputs = [self._attend(group, shape) for *group, shape in zip(*parts, shapes, strict=True)]
        return torch.cat(outputs).index_select(0, self._causal.places)

    def _attend(self, group: list[Tensor], shape: tuple[int, int]) -> Tensor:
        heads, (rows, length) = group[0].shape[1], shape
        by_head = [t.view(rows, length, heads, -1).transpose(1, 2).flatten(0, 1) for t in group]
        q, keys, values = by_head[0], by_head[1 : 1 + len(self._keys)], by_head[1 + len(self._keys) :]
        scale = self._causal.config.softmax_scale
        future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1)
        context = torch.baddbmm(future, q, keys[0].transpose(1, 2), alpha=scale)
        own = [(q * k).sum(-1, keepdim=True) * scale for k in keys[1:]]
        weights = torch.cat((context, *own), -1).softmax(-1).to(values[0].dtype)
        out = torch.bmm(weights[..., :length], values[0])
        for index, value in enumerate(values[1:]):
            out = out + weights[..., length + index, None] * value
        flat: Tensor = out.unflatten(0, (rows, heads)).transpose(1, 2).flatten(0, 1)
        return flat


def unroll(model: DemoModel, hidden: Tensor, batch: Batch, form: WeightForm, depth: int) -> list[Tensor]:
    """Logits [T, V] of `depth` passes: pass s predicts, at token i, token i + 2 + s."""
    attend = Unrolled(GroupedCausal(model.config, batch.shapes, batch.source, batch.places))
    logits = []
    for step in range(depth):
        hidden = model.draft(hidden, batch.targets.roll(-step), batch.positions + step, attend, form)
        logits.append(model.logits(hidden, form))
    return logits


def loss_weights(batch: Batch, step: int) -> Tensor:
    """Of pass `step` at every token: that of the token it predicts, 0 where the text has ended."""
    inside = batch.positions.roll(-step) >= batch.positions + step
    return batch.later_weights.roll(-step) * inside


@torch.no_grad()
def acceptance(
    model: DemoModel, tokenizer: Tokenizer, trunk_form: WeightForm, form: WeightForm, depth: int, count: int = 64
) -> list[float]:
    """Of each depth, how often a draft is the trunk's own choice where all before it were; on held-out answers."""
    batch = collate([encode(tokenizer, conversation) for conversation in held_out_conversations(count)], 0.0)
    causal = GroupedCausal(model.config, batch.shapes, batch.source, batch.places)
    hidden = model.trunk(batch.ids, batch.positions, causal, trunk_form)
    choice = model.logits(hidden, trunk_form).argmax(-1)
    so_far, rates = loss_weights(batch, depth - 1) > 0, []
    for step, logits in enumerate(unroll(model, hidden, batch, form, depth)):
        agrees = so_far & (logits.argmax(-1) == choice.roll(-1 - step))
        rates.append(round(float(agrees.sum() / so_far.sum()), 4))
        so_far = agrees
    return rates
