"""Batched greedy decoding with the training model, for the evaluations made while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dsengine.demo.model import DemoConfig, DemoModel, WeightForm

EOS_ID, PAD_ID = 1, 2


@dataclass
class CachedAttention:
    """Attention over left-padded rows, keeping keys and values of every layer between calls."""

    config: DemoConfig
    rows: int
    padding: Tensor
    cache: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(0, (self.rows, -1)).transpose(1, 2) for t in (q, k, v))
        if layer in self.cache:
            old_k, old_v = self.cache[layer]
            k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
        self.cache[layer] = (k, v)
        queries, keys = q.shape[2], k.shape[2]
        index = torch.arange(keys)
        mask = index[None, None] <= index[keys - queries :][None, :, None]
        mask = mask & (index >= self.padding[:, None])[:, None]
        mask = mask | (index == index[keys - queries :, None])[None]
        out = F.scaled_dot_product_attention(q, k, v, mask[:, None], scale=self.config.softmax_scale)
        return out.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def greedy(model: DemoModel, prompts: list[list[int]], max_tokens: int, form: WeightForm) -> list[list[int]]:
    """Continuations without the end of sentence, one per prompt."""
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    ids = torch.tensor([[PAD_ID] * (longest - len(prompt)) + prompt for prompt in prompts])
    attend = CachedAttention(model.config, len(prompts), padding)
    positions = (torch.arange(longest) - padding[:, None]).clamp_min(0)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    produced: list[Tensor] = []
    for step in range(max_tokens):
        hidden = model.trunk(ids.flatten(), positions.flatten(), attend, form)
        logits = model.logits(hidden.unflatten(0, (len(prompts), -1))[:, -1], form)
        token = logits.argmax(-1).masked_fill(done, EOS_ID)
        produced.append(token)
        done |= token == EOS_ID
        if bool(done.all()):
            break
        ids, positions = token[:, None], (longest + step - padding)[:, None]
    return [trim(row) for row in torch.stack(produced, 1).tolist()]


def trim(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS_ID)] if EOS_ID in tokens else tokens
