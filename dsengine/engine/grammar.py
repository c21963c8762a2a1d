"""Constrained output: which tokens may come next, by a grammar that was compiled elsewhere.

The front end compiles (in a process that may be killed) and sends the result; here it is only followed. A request's
matcher takes in tokens when the next ones are about to be drawn: everything before them is known to the host then, and
neither preemption nor speculation has to tell it anything. xgrammar is imported when the first grammar arrives.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsengine.engine.jump_forward import Speller
from dsengine.engine.messages import GRAMMAR_LEFT, GRAMMAR_TOO_SLOW
from dsengine.engine.request import Request
from dsengine.model.transfer import upload

logger = logging.getLogger(__name__)

_WORD_BITS = 32

# CPU seconds that following one request's grammar may take: so much at once, and so much more for every token. An
# ambiguous grammar of a few characters can take a second per token, which all other requests would wait for.
_BUDGET = 0.25
_BUDGET_PER_TOKEN = 0.002


class GrammarError(ValueError):
    """A grammar cannot be used."""


class GrammarStore:
    """The vocabulary and the compiled grammars that the front end has sent.

    Args:
        vocab_size: columns of the logits.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._vocabulary: Any = None
        self._grammars: dict[str, Any] = {}
        self._speller = Speller(())
        self._unspelt: frozenset[int] = frozenset()
        self._scratch = torch.zeros((1, -(-vocab_size // _WORD_BITS)), dtype=torch.int32)

    def load_vocabulary(self, tokens: Sequence[bytes], stop_token_ids: Sequence[int]) -> None:
        """What each token id spells (nothing for tokens that no grammar may produce), and the ids that end a text."""
        import xgrammar

        self._vocabulary = xgrammar.TokenizerInfo(
            list(tokens),
            xgrammar.VocabType.RAW,
            vocab_size=self._vocab_size,
            stop_token_ids=list(stop_token_ids),
        )
        self._grammars.clear()
        self._speller = Speller(tokens)
        self._unspelt = frozenset(self._vocabulary.special_token_ids)

    def load(self, key: str, data: str) -> None:
        """Keep a compiled grammar.

        Args:
            data: from `CompiledGrammar.serialize_json`, for the same vocabulary.
        """
        import xgrammar

        try:
            self._grammars[key] = xgrammar.CompiledGrammar.deserialize_json(data, self._vocabulary)
        except Exception:  # the requests that name it are refused; the others must not notice
            logger.exception("a compiled grammar cannot be read")

    def drop(self, key: str) -> None:
        """Forget a grammar; requests that follow it go on."""
        self._grammars.pop(key, None)

    def start(self, key: str, after: int | None) -> GrammarState:
        """The state of a new request.

        Args:
            after: the grammar begins behind this token; None: at once.

        Raises:
            GrammarError: no such grammar has been sent.
        """
        if key not in self._grammars:
            raise GrammarError(f"no grammar {key!r} has been loaded")
        import xgrammar

        matcher = xgrammar.GrammarMatcher(self._grammars[key])
        return GrammarState(matcher, after, self._speller, self._unspelt, self._scratch)


class GrammarState:
    """How far one request's output has come in its grammar.

    Args:
        matcher: of xgrammar, at the grammar's beginning.
        unspelt: tokens that no grammar takes; the matcher would write a line to standard error for each one offered.
        scratch: int32 [1, words], for a mask that is looked at only here.

    Attributes:
        error: why it can be followed no further; the request is to fail then.
    """

    def __init__(
        self, matcher: Any, after: int | None, speller: Speller, unspelt: frozenset[int], scratch: Tensor
    ) -> None:
        self._matcher = matcher
        self._speller = speller
        self._unspelt = unspelt
        self._scratch = scratch
        self._after = after
        self._has_begun = after is None
        self.error: str | None = None
        self._budget = _BUDGET
        self._num_seen = 0

    def catch_up(self, output_token_ids: Sequence[int]) -> None:
        """Take in the tokens that have been drawn since the last call."""
        new = output_token_ids[self._num_seen :]
        self._num_seen = len(output_token_ids)
        self._budget = min(self._budget + _BUDGET_PER_TOKEN * len(new), _BUDGET)
        with self._at_own_cost():
            for token in new:
                if self.error != GRAMMAR_LEFT and self._accept(token) is None:
                    self.error = GRAMMAR_LEFT

    def fill(self, mask: Tensor, row: int, draft: Sequence[int] = ()) -> None:
        """Set the bits of the tokens that may follow; of none where the grammar failed, which fails the request.

        Args:
            mask: int32 [rows, words] on the host, all bits set.
            draft: tokens behind those taken in. Where the grammar forbids one, the row is left alone: none is drawn.
        """
        if self.error is None:
            with self._at_own_cost():
                self._follow(mask, row, draft)
        if self.error is not None:
            mask[row] = 0

    def propose(self, output_token_ids: Sequence[int], limit: int) -> tuple[int, ...]:
        """Tokens that the grammar leaves little choice about, from here on; what they spell is the only way to go on,
        but it may be cut into other tokens.

        Args:
            output_token_ids: all of the output.
            limit: longest proposal.
        """
        self.catch_up(output_token_ids)
        proposal: list[int] = []
        with self._at_own_cost():
            # Not even an error for lack of time may tell ranks apart that share requests: it is the first one's to say.
            while self.error != GRAMMAR_LEFT and len(proposal) < limit and (piece := self._next_piece()):
                for token in piece[: limit - len(proposal)]:
                    if not self._matcher.accept_token(token):
                        break
                    proposal.append(token)
                else:
                    continue
                break
            if proposal:
                self._matcher.rollback(len(proposal))
        return tuple(proposal)

    def _next_piece(self) -> tuple[int, ...]:
        """A text that must come next, in tokens, or else a token that must; nothing where there is a choice."""
        if not self._has_begun or self._matcher.is_terminated():
            return ()
        if text := self._matcher.find_jump_forward_string():
            return self._speller.spell(text)
        self._matcher.fill_next_token_bitmask(self._scratch, 0)
        words = self._scratch.numpy().view(np.uint32)[0]
        [places] = words.nonzero()
        if len(places) != 1 or (word := int(words[places[0]])) & (word - 1):
            return ()
        return (int(places[0]) * _WORD_BITS + word.bit_length() - 1,)

    @contextlib.contextmanager
    def _at_own_cost(self) -> Iterator[None]:
        started = time.thread_time()
        yield
        self._budget -= time.thread_time() - started
        if self._budget < 0:
            self.error = self.error or GRAMMAR_TOO_SLOW

    def _follow(self, mask: Tensor, row: int, draft: Sequence[int]) -> None:
        had_begun, num_accepted = self._has_begun, 0
        for token in draft:
            accepted = self._accept(token)
            if accepted is None:
                break
            num_accepted += accepted
        else:
            self._fill(mask, row)
        if num_accepted:
            self._matcher.rollback(num_accepted)
        self._has_begun = had_begun

    def _accept(self, token: int) -> int | None:
        """Take a token in; returns how many the matcher took in of it, None if the grammar forbids it."""
        if not self._has_begun:
            self._has_begun = token == self._after
            return 0
        if self._matcher.is_terminated():
            return 0
        return 1 if token not in self._unspelt and self._matcher.accept_token(token) else None

    def _fill(self, mask: Tensor, row: int) -> None:
        if self._has_begun and not self._matcher.is_terminated():
            self._matcher.fill_next_token_bitmask(mask, row)


def forbid(
    logits: Tensor, requests: Sequence[Request], drafts: Sequence[Sequence[Sequence[int]]] | None = None
) -> None:
    """Set the logits of tokens that the requests' grammars forbid to minus infinity.

    Args:
        logits: float32 [rows, vocab_size]; changed in place. Each request has one row, or as many as it has drafts.
        drafts: for each request and row, the tokens behind the request's own.
    """
    rows: list[int] = []
    states: list[GrammarState] = []
    paths: list[Sequence[int]] = []
    first = 0
    for number, request in enumerate(requests):
        own: Sequence[Sequence[int]] = [()] if drafts is None else drafts[number]
        if request.grammar is not None:
            request.grammar.catch_up(request.output_token_ids)
            rows += range(first, first + len(own))
            states += [request.grammar] * len(own)
            paths += own
        first += len(own)
    if not rows:
        return
    vocab_size = logits.shape[1]
    mask = torch.full((len(rows), -(-vocab_size // _WORD_BITS)), -1, dtype=torch.int32)
    for row, (state, path) in enumerate(zip(states, paths, strict=True)):
        state.fill(mask, row, path)
    places = upload(np.array(rows, dtype=np.int64), logits.device)
    words = upload(mask.numpy(), logits.device)
    bits = torch.arange(_WORD_BITS, dtype=torch.int32, device=logits.device)
    allowed = ((words[:, :, None] >> bits) & 1).flatten(1)[:, :vocab_size].bool()
    logits[places] = logits[places].masked_fill(~allowed, float("-inf"))
