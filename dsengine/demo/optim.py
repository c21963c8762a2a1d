"""Muon, batched over stacks of matrices, for the demo training.

torch.optim.Muon takes 2-D parameters one at a time; an MoE layer is a stack of small ones, for which one batched
Newton-Schulz iteration is several times faster on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards the nearest semi-orthogonal matrix, for each matrix of [..., m, n]."""
    a, b, c = COEFFICIENTS
    x = update.to(torch.bfloat16)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = (x if wide else x.mT).float()
    return result


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised updates; gate_up stacks [E, 2I, h] are taken as 2E matrices."""

    def __init__(
        self, params: list[dict[str, Any]], lr: float, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "halves": 1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                rows, columns = p.shape[-2] // group["halves"], p.shape[-1]
                update = orthogonalise(update.reshape(-1, rows, columns)).view_as(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
