"""Moves routed experts between ranks while the model serves, so that all ranks have about the same to do.

Every rank counts the tokens that it sends to each place. Now and then the counts are added up, and then, layer by
layer and between steps, the experts of a layer travel straight from rank to rank to where they should lie. A layer
answers the same before and after its move but for the order in which a token's experts are summed.

In a step all wait for the busiest rank, so that what costs time is the imbalance of single steps, which is more than
that of their sum. It is told from the counts of the latest steps, which are kept on the device until the next look.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from dsengine.model.deepseek import DeepseekModel
from dsengine.model.moe import MixtureOfExperts
from dsengine.parallel.collectives import Group
from dsengine.parallel.eplb import Move, imbalance, keep_places, place_experts, plan_moves
from dsengine.parallel.expert_places import ExpertPlaces

logger = logging.getLogger(__name__)

_STEPS_KEPT = 256


@dataclass(frozen=True)
class ExpertBalance:
    """What an `ExpertBalancer` has seen and done.

    Attributes:
        looks: at the counts of all ranks.
        moved: experts that were brought elsewhere.
        step_imbalance: the busiest rank's tokens over the mean of ranks, in the mean of MoE layers and of the steps
            before the latest look that had any; 1 is even.
        worst_layer_imbalance: the same of the layer where it is largest.
    """

    looks: int
    moved: int
    step_imbalance: float
    worst_layer_imbalance: float


class ExpertBalancer:
    """Of one model; every rank calls the same methods between the same steps.

    Args:
        model: loaded with a layout that balances experts.
        nodes: machines with equally many ranks each.
        interval: steps from one look at the counts to the next; the moves take a step for each layer beside.
        threshold: a layer is left as it is while its busiest rank has less than so many times the mean to do.
    """

    def __init__(self, model: DeepseekModel, *, nodes: int = 1, interval: int = 1000, threshold: float = 1.05) -> None:
        layers = [*model.layers, *([model.nextn.layer] if model.nextn is not None else [])]
        self._world = model.slots.layout.world
        self._interval = interval
        self._steps = 0
        self._nodes = nodes
        self._groups = model.config.n_group
        self._threshold = threshold
        self._moes: list[tuple[MixtureOfExperts, ExpertPlaces]] = []
        for layer in layers:
            if isinstance(layer.mlp, MixtureOfExperts):
                assert layer.mlp.places is not None, "the layout does not balance experts"
                self._moes.append((layer.mlp, layer.mlp.places))
        self._loads: list[list[int]] = []
        self._next = len(self._moes)
        shape = (min(interval, _STEPS_KEPT), len(self._moes), self._world.size)
        self._history = torch.zeros(shape, dtype=torch.int64, device=model.device)
        self._counted = self._rank_counts()
        self._looks = self._moved = 0
        self._imbalances: list[float] = []

    def before_step(self) -> None:
        """Called before each step of the model: does what is due."""
        self._remember()
        self._steps += 1
        if self.is_moving:
            self.advance()
        elif self._steps >= self._interval:
            self._steps = 0
            self.begin()
        self._counted = self._rank_counts()

    def balance(self) -> ExpertBalance | None:
        """As of the latest look; None before there was one at steps with tokens."""
        found = self._imbalances
        if not found:
            return None
        return ExpertBalance(self._looks, self._moved, sum(found) / len(found), max(found))

    def _rank_counts(self) -> Tensor:
        """int64 [layers, ranks], what `counts` add up to."""
        counts = torch.stack([places.counts for _, places in self._moes])
        return counts.view(len(self._moes), self._world.size, -1).sum(2)

    def _remember(self) -> None:
        """What this rank has sent in the step before."""
        self._history[self._steps % len(self._history)] = self._rank_counts() - self._counted

    @property
    def is_moving(self) -> bool:
        """Some layers are still to be looked at since the last `begin`."""
        return self._next < len(self._moes)

    def begin(self) -> None:
        """Take the counts since the last time as a measure, and start with the first layer."""
        counts = torch.stack([places.counts for _, places in self._moes])
        for _, places in self._moes:
            places.counts.zero_()
        self._loads = self._world.all_reduce(counts).tolist()
        self._next = 0
        self._looks += 1
        self._imbalances = step_imbalances(self._world.all_reduce(self._history)) or self._imbalances
        self._history.zero_()

    def advance(self) -> int:
        """Look at the next layer, and move its experts if that is worth it; returns how many moved."""
        moe, places = self._moes[self._next]
        loads = places.by_expert(self._loads[self._next])
        self._next += 1
        ranks, old = self._world.size, places.placement
        before = imbalance(loads, old, ranks)
        if before < self._threshold:
            return 0
        wanted = place_experts(loads, ranks=ranks, places=len(old), nodes=self._nodes, groups=self._groups)
        if imbalance(loads, wanted, ranks) >= before:
            return 0
        new = keep_places(old, wanted, ranks)
        moves = plan_moves(old, new, ranks, self._nodes)
        for weight in moe.expert_weights:
            move_rows(self._world, weight, moves)
        moe.rearrange(new)
        self._moved += len(moves)
        if self._world.rank == 0:
            after = imbalance(loads, new, ranks)
            logger.info(
                "%d experts of MoE layer %d moved: the busiest rank had %.2f times the mean to do, now %.2f",
                len(moves),
                self._next - 1,
                before,
                after,
            )
        return len(moves)


def step_imbalances(tokens: Tensor) -> list[float]:
    """The largest of ranks over their mean, by layer, in the mean of the steps that had any; empty if none had.

    Args:
        tokens: int64 [steps, layers, ranks].
    """
    tokens = tokens[tokens.sum((1, 2)) > 0].double()
    if not len(tokens):
        return []
    ratios = tokens.amax(2) / tokens.mean(2)
    found: list[float] = ratios.nanmean(0).tolist()
    return [ratio for ratio in found if ratio == ratio]


def move_rows(world: Group, weight: Tensor, moves: list[Move]) -> None:
    """Carry out moves on one parameter [places here, ...]; meanwhile what goes and comes takes memory too."""
    here = len(weight)
    sent = [0] * world.size
    received = [0] * world.size
    leaving: list[int] = []
    arriving: list[int] = []
    for move in sorted(moves, key=lambda move: (move.target // here, move.target)):
        if move.source // here == world.rank:
            sent[move.target // here] += 1
            leaving.append(move.source % here)
    for move in sorted(moves, key=lambda move: (move.source // here, move.target)):
        if move.target // here == world.rank:
            received[move.source // here] += 1
            arriving.append(move.target % here)
    rows = weight.flatten(1).view(torch.uint8)
    assert rows.data_ptr() == weight.data_ptr(), "a parameter of experts lies in one piece"
    moved = world.all_to_all_rows(rows[torch.tensor(leaving, dtype=torch.int64)], sent, received)
    rows[torch.tensor(arriving, dtype=torch.int64)] = moved
