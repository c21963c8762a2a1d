"""What a model answers to one fixed schedule of steps, and the bytes of weights it holds: the same for every rank."""

from __future__ import annotations

import torch
from tiny_checkpoints import Session
from torch import Tensor

from dsengine.model.deepseek import DeepseekModel

STEPS: tuple[list[tuple[int, list[int]]], ...] = (
    [(0, list(range(3, 40)))],
    [(0, [5]), (1, list(range(60, 71)))],
    [(0, [9]), (1, [17])],
)
"""(request, new tokens): an expanded prefill, a decode beside a prefill, two decodes."""


def answers(model: DeepseekModel) -> dict[str, Tensor]:
    """Logits of every token of every step, and the NextN layer's logits where there is one."""
    session = Session(model, max_tokens=64, num_requests=2)
    found = {f"step{i}": torch.cat(session.run(step)) for i, step in enumerate(STEPS)}
    if model.nextn is not None:
        session = Session(model, max_tokens=64, num_requests=1)
        batch = session.batch(STEPS[0])
        with torch.inference_mode():
            hidden = model.forward(batch, session.kv_caches)
            drafted = model.nextn.forward(hidden, batch.input_ids.roll(-1), batch, session.kv_caches[-1])
            found["nextn"] = model.compute_logits(drafted)
    return found
