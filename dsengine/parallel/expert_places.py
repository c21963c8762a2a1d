"""Where each routed expert of a layer lies at present, on the device, and how many tokens went to it.

The tables keep their shapes and addresses when experts move, so that captured steps see the new places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ExpertPlaces:
    """Translates the router's experts into places.

    Args:
        num_experts: of the layer.
        placement: the expert in each place, as in `eplb`.
        max_copies: that any expert may have.
        turn: which copy this rank's first token of a batch takes; ranks that route the same tokens need the same.

    Attributes:
        counts: int64, tokens that this rank has sent to each place since the experts lie as they do, or since they were
            last set to zero.
    """

    def __init__(
        self, num_experts: int, placement: Sequence[int], max_copies: int, turn: int, device: torch.device
    ) -> None:
        self.counts = torch.zeros(len(placement), dtype=torch.int64, device=device)
        self._num_experts = num_experts
        self._places = torch.zeros((num_experts, max_copies), dtype=torch.int64, device=device)
        self._num_copies = torch.ones(num_experts, dtype=torch.int64, device=device)
        self._turn = turn
        self.placement: tuple[int, ...] = ()
        self.update(placement)

    def update(self, placement: Sequence[int]) -> None:
        """Experts lie elsewhere from now on; counting begins anew."""
        copies: list[list[int]] = [[] for _ in range(self._num_experts)]
        for place, expert in enumerate(placement):
            copies[expert].append(place)
        width = self._places.shape[1]
        assert all(0 < len(places) <= width for places in copies), f"{placement} has no place, or too many, for some"
        rows = [places + [0] * (width - len(places)) for places in copies]
        self._places.copy_(torch.tensor(rows))
        self._num_copies.copy_(torch.tensor([len(places) for places in copies]))
        self.placement = tuple(placement)
        self.counts.zero_()

    def by_expert(self, counts: Sequence[int]) -> list[int]:
        """Counts of places as those of the experts in them."""
        loads = [0] * self._num_experts
        for expert, count in zip(self.placement, counts, strict=True):
            loads[expert] += count
        return loads

    def __call__(self, expert_ids: Tensor) -> Tensor:
        """int64 [n, K] → the place of a copy of each; counts them. The copies take turns from token to token."""
        row = torch.arange(self._turn, self._turn + len(expert_ids), device=expert_ids.device).unsqueeze(1)
        places = self._places[expert_ids, row % self._num_copies[expert_ids]]
        flat = places.flatten()
        self.counts.scatter_add_(0, flat, torch.ones_like(flat))
        return places
