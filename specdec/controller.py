"""Which tree to draft in the next step: as deep and as wide as acceptance and the cost of a step make worthwhile.

A step with a tree yields more tokens and costs more. How many it yields follows from the acceptance measured so far,
depth by depth; what it costs follows from the number of tokens that pass through the model, at the present batch and
context. On a small batch the weights are read anyway and a tree costs little; on a large one every node costs, and
nothing is drafted at all.

Everything here is arithmetic on its arguments: no clock, no device, no chance. The same observations in the same order
lead to the same choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dsengine.specdec.shape import TreeShape, largest_tree

_PRIOR_RATE = 0.7
_PRIOR_WEIGHT = 4.0  # observations that the prior is worth
_OTHER_WEIGHT = 16.0  # and another width's, at most
_DECAY = 0.99  # of what was observed, per step: old texts are forgotten, and shapes given up are tried again some day
_SWITCH_GAIN = 1.03  # a change of shape must promise this much, so that noise does not make the choice flutter


class StepCosts(Protocol):
    """Seconds of one pass, in any unit common to both."""

    def main(self, tokens: int, requests: int, context: int) -> float:
        """The main model's pass over `tokens` new tokens of `requests` requests, with `context` cached tokens each."""
        ...

    def draft(self, tokens: int, requests: int, context: int) -> float:
        """The drafter's pass over so many tokens; 0 for a drafter that computes nothing."""
        ...

    def catch_up(self, tokens: int) -> float:
        """Entering so many tokens into the drafter's cache; 0 for a drafter that has none."""
        ...


@dataclass(frozen=True)
class Load:
    """What a step is asked for: requests that decode, and cached tokens of each in the mean."""

    requests: int
    context: int


def ladder(largest: TreeShape) -> tuple[TreeShape, ...]:
    """Shapes no deeper, wider or larger than `largest`: chains of every depth, and trees of its width."""
    shapes = {TreeShape(steps, 1, steps + 1) for steps in range(1, largest.max_depth + 1)}
    for steps in range(1, largest.steps + 1):
        shapes.add(TreeShape(steps, largest.topk, min(largest.num_nodes, largest_tree(steps, largest.topk))))
    return tuple(sorted(shapes))


def step_cost(shape: TreeShape | None, load: Load, costs: StepCosts) -> float:
    """Cost of one step with trees of `shape`, or of plain decoding: drafting, verifying and catching up.

    The drafter's cache is kept complete even while nothing is drafted, so plain decoding passes through it too.
    """
    count, context = load.requests, load.context
    if shape is None:
        return costs.main(count, count, context) + costs.catch_up(count)
    # First the roots. Then a chain runs its newest node alone; a wider tree runs all its nodes so far again.
    passes = [1, *(1 if shape.topk == 1 else shape.topk * step for step in range(1, shape.steps))]
    drafting = sum(costs.draft(count * nodes, count, context) for nodes in passes)
    catching_up = costs.catch_up(count * (shape.max_depth + 1))
    return drafting + costs.main(count * shape.num_nodes, count, context) + catching_up


def expected_tokens(rates: Sequence[float]) -> float:
    """Tokens of one step in the mean, the model's own included, given the chance of each depth if the one before it
    was accepted."""
    total, reached = 1.0, 1.0
    for rate in rates:
        reached *= rate
        total += reached
    return total


class Acceptance:
    """How often a draft of each depth is accepted, once the one before it was; recent steps count most."""

    def __init__(self) -> None:
        self._accepted: dict[tuple[int, int], float] = {}
        self._tried: dict[tuple[int, int], float] = {}

    def observe(self, shape: TreeShape, accepted: Sequence[int]) -> None:
        """Enter one step.

        Args:
            accepted: drafts accepted of each request.
        """
        for depth in range(1, shape.max_depth + 1):
            key = (shape.topk, depth)
            tried = sum(count >= depth - 1 for count in accepted)
            self._tried[key] = self._tried.get(key, 0.0) + tried
            self._accepted[key] = self._accepted.get(key, 0.0) + sum(count >= depth for count in accepted)

    def forget(self) -> None:
        """Let what was observed count a little less."""
        for counts in (self._accepted, self._tried):
            for key in counts:
                counts[key] *= _DECAY

    def rate(self, topk: int, depth: int) -> float:
        """Chance of a draft at `depth`; what was seldom seen is taken to be like what is nearest to it: the depth
        before, and the same depth at another width."""
        first = _PRIOR_RATE if topk == 1 else _as_wide(_PRIOR_RATE)
        guess = self.rate(topk, depth - 1) if depth > 1 else first
        accepted, weight = _PRIOR_WEIGHT * guess, _PRIOR_WEIGHT
        for (width, at), tried in self._tried.items():
            if at != depth or tried == 0:
                continue
            observed, worth = self._accepted[width, at] / tried, tried
            if width != topk:
                worth = min(tried / 4, _OTHER_WEIGHT)
                if topk == 1:
                    observed = _as_narrow(observed)
                elif width == 1:
                    observed = _as_wide(observed)
            accepted += worth * observed
            weight += worth
        return accepted / weight

    def rates(self, shape: TreeShape) -> list[float]:
        """Chances of all depths of a shape."""
        return [self.rate(shape.topk, depth) for depth in range(1, shape.max_depth + 1)]


def _as_wide(rate: float) -> float:
    """What several candidates are hoped to reach where one reaches `rate`: half of what it misses is among them."""
    return (1 + rate) / 2


def _as_narrow(rate: float) -> float:
    return max(0.0, 2 * rate - 1)


class TreeController:
    """Chooses the shape of each step.

    Args:
        largest: the largest tree allowed.
        costs: of the model on this device; None always takes `largest`.
    """

    def __init__(self, largest: TreeShape, costs: StepCosts | None) -> None:
        self.largest = largest
        self.acceptance = Acceptance()
        self._costs = costs
        self._shapes: tuple[TreeShape | None, ...] = (None, *ladder(largest))
        self._current: TreeShape | None = largest

    @property
    def current(self) -> TreeShape | None:
        """The shape chosen last."""
        return self._current

    def choose(self, load: Load) -> TreeShape | None:
        """The shape for the next step, None for plain decoding."""
        if self._costs is None or load.requests == 0:
            return self._current
        self.acceptance.forget()
        best = max(self._shapes, key=lambda shape: self._speed(shape, load))
        if self._speed(best, load) > _SWITCH_GAIN * self._speed(self._current, load):
            self._current = best
        return self._current

    def observe(self, shape: TreeShape, accepted: Sequence[int]) -> None:
        """Enter a step's outcome: drafts accepted of each request that had a tree."""
        self.acceptance.observe(shape, accepted)

    def _speed(self, shape: TreeShape | None, load: Load) -> float:
        """Tokens per request and unit of cost."""
        assert self._costs is not None
        tokens = 1.0 if shape is None else expected_tokens(self.acceptance.rates(shape))
        return tokens / step_cost(shape, load, self._costs)
