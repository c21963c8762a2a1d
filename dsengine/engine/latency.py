"""How many tokens a step may compute, so that those who wait for their next token do not wait too long.

A step takes some time for those who decode, with their drafts, and some more for every token of a prompt, the more the
longer the text before that token is. Both are estimated from the steps that have been, and the largest step is taken
that stays below the target. The cost of a prompt's token is learned from chunks of the sizes that are chosen: whatever
else decides about it, the choice comes to rest where a step takes as long as it may.

Where a prompt's first token would come too late so, the step grows as far as it must to bring it in time, if it can: a
prompt that is late anyway delays nobody else.

Everything here is arithmetic on its arguments: no clock, no device, no chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsengine.engine.batch import ScheduledBatch
from dsengine.specdec.shape import TreeShape

_MARGIN = 0.9  # of a target that may be expected to pass
_DECODE_DECAY = 0.98  # of what was observed of steps, per step
_CHUNK_DECAY = 0.9  # and of prompts beside them, per step that has any
_FIRST_CHUNK = 128  # tokens of prompts, until something is known of them
_SMALLEST_CHUNK = 16  # tokens of prompts that every step may compute: they always get on
_GROWTH = 2.0  # a chunk may be so much larger than the largest that was seen lately
_OUTLIER = 4.0  # what took longer than this many times what was expected was something else


@dataclass(frozen=True)
class Demand:
    """What the scheduler has to do.

    Attributes:
        decoding: running requests that need one token.
        prompt_tokens: still to be computed of the prompt that comes first; 0: there is none.
        context: tokens before those.
        waited: seconds since that prompt arrived.
    """

    decoding: int
    prompt_tokens: int = 0
    context: int = 0
    waited: float = 0.0


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
        decode_tokens: of requests that need one token, with their drafts.
        prompt_tokens: of all others.
        context: tokens before each of those, in the mean.
    """

    decode_tokens: int
    prompt_tokens: int = 0
    context: float = 0.0

    @classmethod
    def of(cls, batch: ScheduledBatch) -> Work:
        chunks = [s for s in batch.requests if s.num_tokens - s.num_drafts > 1]
        count = sum(s.num_tokens for s in chunks)
        pairs = sum(s.num_tokens * (s.start + s.num_tokens / 2) for s in chunks)
        return cls(batch.num_tokens - count, count, pairs / max(count, 1))


class Line:
    """The straight line nearest to points of which old ones count less; it neither falls nor begins below 0."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        # Sums over the points: of their weights, x, y, x squared, x times y.
        self._sums = [0.0] * 5

    @property
    def weight(self) -> float:
        """Of all points together; 0: there are none."""
        return self._sums[0]

    def add(self, x: float, y: float, weight: float = 1.0) -> None:
        new = (1.0, x, y, x * x, x * y)
        self._sums = [self._decay * old + weight * value for old, value in zip(self._sums, new, strict=True)]

    def fit(self) -> tuple[float, float]:
        """(height at 0, slope); level where the points stand too close together to tell, and 0 of none."""
        weight, x, y, squares, products = self._sums
        if weight == 0:
            return 0.0, 0.0
        spread = squares - x * x / weight
        if spread <= 1e-3 * squares:
            return max(y / weight, 0.0), 0.0
        slope = max((products - x * y / weight) / spread, 0.0)
        height = (y - slope * x) / weight
        return (height, slope) if height >= 0 else (0.0, max(products / squares, 0.0))


class LatencyController:
    """Chooses what each step may compute.

    Args:
        largest: tokens of a step at most.
        target_itl: seconds between one token and the next of a running request.
        target_ttft: seconds from a request's arrival to its first token; None: as it comes.
    """

    def __init__(self, largest: int, target_itl: float, target_ttft: float | None = None) -> None:
        self._largest = largest
        self._target = _MARGIN * target_itl
        self._target_ttft = None if target_ttft is None else _MARGIN * target_ttft
        self._open: tuple[float, Work] | None = None
        self._decodes = Line(_DECODE_DECAY)  # seconds of a step without prompts, over its tokens
        self._chunks = Line(_CHUNK_DECAY)  # seconds of a prompt's token beside decodes, over the tokens before it
        self._largest_chunk = 0.0
        self.budget = largest

    def most_decode_tokens(self, demand: Demand) -> int:
        """Tokens that those who decode may take together, with their drafts, in a step within the target."""
        if not demand.decoding:
            return self._largest
        fixed, each = self._decodes.fit()
        target = self._target
        if demand.prompt_tokens:  # which get no less of the time than drafts, and their smallest chunk in any case
            target = min(target / 2, target - self.chunk_seconds(_SMALLEST_CHUNK, demand.context))
        if each == 0:
            return self._largest if fixed <= target else demand.decoding
        return max(demand.decoding, min(self._largest, int((target - fixed) / each)))

    def choose(self, demand: Demand, drafts: int = 0) -> int:
        """The budget of the next step, which `budget` tells afterwards too.

        Args:
            drafts: that those who decode will take along.
        """
        self.budget = self._largest
        if demand.decoding:
            decodes = demand.decoding + drafts
            chunk = max(_SMALLEST_CHUNK, self._within_target(demand, decodes), self._for_first_token(demand, decodes))
            self.budget = min(self._largest, decodes + int(chunk))
        return self.budget

    def start(self, now: float, work: Work) -> None:
        """A step begins; the one before it, if there is one, has ended."""
        self.end(now)
        self._open = (now, work)

    def end(self, now: float) -> None:
        """The step that is under way, if there is one, has ended."""
        if self._open is not None:
            began, work = self._open
            self.observe(work, now - began)
        self._open = None

    def rest(self) -> None:
        """What comes next is no step: the time until then was not spent on the one before."""
        self._open = None

    def observe(self, work: Work, seconds: float) -> None:
        """Enter how long a step took."""
        decoding = self.decode_seconds(work.decode_tokens)
        expected = decoding + self.chunk_seconds(work.prompt_tokens, work.context)
        known = self._chunks.weight if work.prompt_tokens else self._decodes.weight
        if known > 1 and expected > 0:
            seconds = min(seconds, _OUTLIER * expected)
        if not work.prompt_tokens:
            self._decodes.add(work.decode_tokens, seconds)
        elif work.decode_tokens:
            each = (seconds - decoding) / work.prompt_tokens
            self._chunks.add(work.context, each, min(1.0, work.prompt_tokens / _SMALLEST_CHUNK))
            self._largest_chunk = max(_CHUNK_DECAY * self._largest_chunk, float(work.prompt_tokens))

    def decode_seconds(self, tokens: int) -> float:
        """Expected of a step without prompts."""
        fixed, each = self._decodes.fit()
        return fixed + each * tokens

    def chunk_seconds(self, tokens: float, context: float) -> float:
        """Expected of so many tokens of a prompt beside decodes, so many others before each in the mean."""
        each, per_context = self._chunks.fit()
        return tokens * (each + per_context * context)

    def _within_target(self, demand: Demand, decodes: int) -> float:
        """Tokens of the chunk that fills a step which takes no longer than it may."""
        if self._decodes.weight == 0:
            return _FIRST_CHUNK
        left = self._target - self.decode_seconds(decodes)
        if left <= 0:
            return 0.0
        if self._chunks.weight == 0:  # a prompt's token costs hardly more than one that is decoded
            return min(_FIRST_CHUNK, left * decodes / self.decode_seconds(decodes))
        each, per_context = self._chunks.fit()
        # A chunk of n tokens takes n·(each + per_context·(context + n/2)).
        linear = each + per_context * demand.context
        root = linear + math.sqrt(linear**2 + 2 * per_context * left)
        fitting = 2 * left / root if root > 0 else self._largest
        return min(fitting, _GROWTH * max(self._largest_chunk, _FIRST_CHUNK / _GROWTH))

    def _for_first_token(self, demand: Demand, decodes: int) -> float:
        """Tokens of the chunks that bring the first prompt's first token just in time; 0 if that cannot be."""
        if self._target_ttft is None or not demand.prompt_tokens or self._chunks.weight == 0:
            return 0.0
        prompt = demand.prompt_tokens
        left = self._target_ttft - demand.waited - self.chunk_seconds(prompt, demand.context + prompt / 2)
        if left <= 0:
            return 0.0
        # Chunks of n tokens take prompt / n steps, each with the decodes' time.
        needed = prompt * self.decode_seconds(decodes) / left
        return needed if decodes + needed <= self._largest else 0.0


def within(tree: TreeShape | None, num_requests: int, budget: int) -> TreeShape | None:
    """A tree, or the chain that is left of it where so many requests with one each would go beyond the budget."""
    if tree is None or num_requests * tree.num_nodes <= budget:
        return tree
    depth = min(tree.max_depth, budget // num_requests - 1)
    return TreeShape(depth, 1, depth + 1) if depth > 0 else None
