"""Jump-forward: what a grammar leaves no choice about is proposed in one piece and verified in one step.

A JSON schema fixes most of a short answer: keys, quotes, braces. Writing these texts into the output as they are would
change it, because a text can be cut into tokens in several ways and the model has its own; so they are only proposed,
as a chain of drafts. At each of them the token is drawn that the request would get there anyway, under the grammar's
mask, and the chain is followed as long as it holds that token. The output is the one without jumps, in fewer steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from weakref import WeakKeyDictionary

from dsengine.engine.request import Request
from dsengine.specdec.shape import TreeShape

LONGEST = 24
"""Tokens of one proposal, at most."""

_FIRST = 8  # tokens of a request's first proposal
_SHORTEST_WITH_GRAPHS = 4  # an estimate: launching a step's kernels one by one takes as long as two or three steps
_MAX_BYTES = 4 * LONGEST
# Rows of logits that the chains of one step may take in all.
_MAX_ROWS = 256


class Speller:
    """Cuts texts into tokens as a byte-pair encoding does whose ids are in the order of its merges.

    That is how DeepSeek's vocabularies are made; with another one proposals would only be accepted less often.

    Args:
        tokens: what each id spells; empty for those that spell nothing.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._ids = {token: i for i, token in reversed(list(enumerate(tokens))) if token}
        self.spell = lru_cache(1024)(self._spell)

    def _spell(self, text: str) -> tuple[int, ...]:
        """Token ids of the beginning of a text; none if a byte of it is no token."""
        parts = [bytes([byte]) for byte in text.encode()[:_MAX_BYTES]]
        ids, none = self._ids, len(self._ids) + 1
        while len(parts) > 1:
            ranks = [ids.get(left + right, none) for left, right in pairwise(parts)]
            lowest = min(ranks)
            if lowest == none:
                break
            at = ranks.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return tuple(ids[part] for part in parts) if all(part in ids for part in parts) else ()


class JumpForward:
    """Which requests have proposals, and what has come of them.

    Args:
        has_graphs: decode steps are captured, and those with chains are not: then only long ones are worth it.

    Attributes:
        num_tokens: proposed tokens that were accepted.
    """

    def __init__(self, max_running_requests: int, *, has_graphs: bool = False) -> None:
        self.num_tokens = 0
        self._shortest = _SHORTEST_WITH_GRAPHS if has_graphs else 1
        self._max_rows = min(_MAX_ROWS, max_running_requests)
        self._requests: dict[Request, None] = {}
        self._limits: WeakKeyDictionary[Request, int] = WeakKeyDictionary()

    def enter(self, request: Request, shape: TreeShape, num_accepted: int) -> None:
        """What has come of a request's proposal in a step with chains or trees of this shape.

        A model may prefer to spell a text in its own way, and every draft costs: after a proposal that was not followed
        to its end the next ones are short, and they grow again as they are followed.
        """
        self.num_tokens += num_accepted
        tried = min(len(request.proposal), shape.max_depth)
        limit = num_accepted + 2 if num_accepted < tried else 2 * max(tried, self._limits.get(request, _FIRST) // 2)
        self._limits[request] = min(limit, LONGEST)

    def look(self, requests: Iterable[Request]) -> None:
        """Find the proposals of requests that have just got tokens."""
        for request in requests:
            if request.grammar is None:
                continue
            limit = self._limits.get(request, _FIRST)
            request.proposal = () if request.is_finished else request.grammar.propose(request.output_token_ids, limit)
            if request.proposal:
                self._requests[request] = None
            else:
                self._requests.pop(request, None)

    def chains(self) -> TreeShape | None:
        """What holds the proposals there are, as far as there is room for the logits; None: nothing is proposed."""
        for request in [request for request in self._requests if request.is_finished]:
            del self._requests[request]
        if not self._requests:
            return None
        room = self._max_rows // len(self._requests) - 1
        # All chains of a step are equally long; what one is too short for waits for the next step.
        mean = -(-sum(len(request.proposal) for request in self._requests) // len(self._requests))
        length = min(room, mean)
        return TreeShape(length, 1, length + 1) if length >= self._shortest else None
