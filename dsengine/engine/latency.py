"""How many tokens a step may compute, so that those who wait for their next token do not wait too long.

A step takes some time whatever it computes, and some more for every token. Both are estimated from the steps that have
been, and the largest step is taken that stays below the target. Where a prompt's first token would come too late so,
the step grows as far as it must to bring it in time, if it can: a prompt that is late anyway delays nobody else.

Everything here is arithmetic on its arguments: no clock, no device, no chance.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsengine.specdec.shape import TreeShape

_MARGIN = 0.9  # of the target that a step may be expected to take
_DECAY = 0.98  # of what was observed, per step
_FIRST_BUDGET = 128  # tokens, beside the decodes, until something is known
_SMALLEST_CHUNK = 16  # tokens of prompts that every step may compute: they always get on
_GROWTH = 2.0  # a step may be so much larger than the largest that was seen lately
_OUTLIER = 4.0  # what took longer than this many times what was expected was something else


@dataclass(frozen=True)
class Demand:
    """What the scheduler has to do.

    Attributes:
        decoding: running requests that need one token.
        prompt_tokens: still to be computed of the prompt that comes first; 0: there is none.
        waited: seconds since that prompt arrived.
    """

    decoding: int
    prompt_tokens: int = 0
    waited: float = 0.0


class LatencyController:
    """Chooses the token budget of each step.

    Args:
        largest: tokens of a step at most.
        target_itl: seconds between one token and the next of a running request.
        target_ttft: seconds from a request's arrival to its first token; None: as it comes.
    """

    def __init__(self, largest: int, target_itl: float, target_ttft: float | None = None) -> None:
        self._largest = largest
        self._target = _MARGIN * target_itl
        self._target_ttft = target_ttft
        self._open: tuple[float, int] | None = None
        self._largest_seen = 0.0
        # Sums over the steps: of 1, tokens, seconds, tokens squared, tokens times seconds.
        self._sums = [0.0] * 5
        self.budget = largest

    def choose(self, demand: Demand) -> int:
        """The budget of the next step, which `budget` tells afterwards too."""
        self.budget = self._largest
        if demand.decoding:
            least = demand.decoding + _SMALLEST_CHUNK
            wanted = max(least, self._within_target(), self._for_first_token(demand))
            self.budget = min(self._largest, int(wanted))
        return self.budget

    def start(self, now: float, num_tokens: int) -> None:
        """A step of so many tokens begins; the one before it, if there is one, ends."""
        if self._open is not None:
            began, tokens = self._open
            self.observe(tokens, now - began)
        self._open = (now, num_tokens)

    def rest(self) -> None:
        """What comes next is no step: the time until then was not spent on the one before."""
        self._open = None

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Enter how long a step took."""
        fixed, each = self.costs()
        expected = fixed + each * num_tokens
        if self._sums[0] > 1 and expected > 0:
            seconds = min(seconds, _OUTLIER * expected)
        self._largest_seen = max(_DECAY * self._largest_seen, float(num_tokens))
        new = (1.0, num_tokens, seconds, num_tokens**2, num_tokens * seconds)
        self._sums = [_DECAY * old + value for old, value in zip(self._sums, new, strict=True)]

    def costs(self) -> tuple[float, float]:
        """(seconds of a step whatever it computes, seconds of each token): the line nearest to what was observed."""
        count, tokens, seconds, squares, products = self._sums
        if count == 0:
            return 0.0, 0.0
        spread = squares - tokens**2 / count
        # Steps that are all alike tell nothing of the two apart: then all is laid on the tokens.
        if spread <= 1e-3 * squares:
            return 0.0, seconds / max(tokens, 1.0)
        each = max((products - tokens * seconds / count) / spread, 0.0)
        fixed = (seconds - each * tokens) / count
        return (fixed, each) if fixed >= 0 else (0.0, products / squares)

    def _within_target(self) -> float:
        """Tokens of a step that takes no longer than it may."""
        fixed, each = self.costs()
        if not self._largest_seen:
            return _FIRST_BUDGET
        fitting = (self._target - fixed) / each if each > 0 else self._largest
        return min(fitting, _GROWTH * max(self._largest_seen, _FIRST_BUDGET / _GROWTH))

    def _for_first_token(self, demand: Demand) -> float:
        """Tokens of the steps that bring the first prompt's first token just in time; 0 if that cannot be."""
        if self._target_ttft is None or not demand.prompt_tokens:
            return 0.0
        fixed, each = self.costs()
        left = self._target_ttft - demand.waited - each * demand.prompt_tokens
        if left <= 0:
            return 0.0
        # n steps of T tokens, of which `decoding` are others', take n·(fixed + each·T) and compute n·(T - decoding).
        needed = (fixed * demand.prompt_tokens + (self._target_ttft - demand.waited) * demand.decoding) / left
        return needed if needed <= self._largest else 0.0


def within(tree: TreeShape | None, num_requests: int, budget: int) -> TreeShape | None:
    """A tree, or the chain that is left of it where so many requests with one each would go beyond the budget."""
    if tree is None or num_requests * tree.num_nodes <= budget:
        return tree
    depth = min(tree.max_depth, budget // num_requests - 1)
    return TreeShape(depth, 1, depth + 1) if depth > 0 else None
