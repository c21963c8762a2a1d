"""Token ids to text while they arrive, ending at stop strings wherever token boundaries fall.

Streaming and non-streaming answers, online and offline, all go through here, so that they agree to the character.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence

from dsengine.engine.sampling_params import SamplingParams
from dsengine.tokenizer.tokenizer import Tokenizer

_LONGEST_UTF8_SEQUENCE = 4


class StopMatcher:
    """Finds the earliest end of any of several strings in a text that arrives in pieces (Aho-Corasick).

    Linear in the text, whatever the number and the overlap of the strings. Where two strings end at the same character,
    the longer one counts; what is found does not depend on how the text was cut.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for string in strings:
            self._insert(string)
        self._fail = [0] * len(self._next)
        self._hold = [0] * len(self._next)
        self._link()
        self._state = 0

    def _insert(self, string: str) -> None:
        node = 0
        for char in string:
            if char not in self._next[node]:
                self._next[node][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._match.append(None)
            node = self._next[node][char]
        self._match[node] = string

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            fail = self._fail[node]
            if self._match[node] is None:
                self._match[node] = self._match[fail]
            # A complete string that cannot grow holds nothing back once its match has been passed over.
            self._hold[node] = self._depth[node] if self._next[node] else self._hold[fail]
            for char, child in self._next[node].items():
                self._fail[child] = self._step(fail, char)
                queue.append(child)

    def _step(self, node: int, char: str) -> int:
        while node and char not in self._next[node]:
            node = self._fail[node]
        return self._next[node].get(char, 0)

    def feed(self, text: str, *, ignore: bool = False) -> tuple[int, str] | None:
        """Read on. Returns (characters of `text` up to and including the match, string found), or None.

        Args:
            ignore: pass over strings that end in this piece.
        """
        for i, char in enumerate(text):
            self._state = self._step(self._state, char)
            match = self._match[self._state]
            if match is not None and not ignore:
                return i + 1, match
        return None

    @property
    def num_held(self) -> int:
        """Characters at the end of the text so far that may be the beginning of one of the strings."""
        return self._hold[self._state]


class IncrementalDetokenizer:
    """The text of one growing sequence.

    The deltas, put together, equal the one-shot decoding of the tokens, cut at the first stop string; how the tokens
    were grouped into calls makes no difference. Work is linear in what is pushed.

    Args:
        prompt_ids: if these end in the middle of a character, the output begins with that character, completed.
        params: `stop`, `min_tokens`, `include_stop_str_in_output`, `stop_token_ids`, `ignore_eos` and
            `skip_special_tokens` are used. A token that ends the sequence (EOS or a stop id, after `min_tokens` others)
            counts, but yields text only under `include_stop_str_in_output`. So does a stop string: the token in which
            it ends must come after `min_tokens` others.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_token_ids if params.skip_special_tokens else frozenset[int]()
        eos = frozenset[int]() if params.ignore_eos else tokenizer.eos_token_ids
        self._silent = frozenset[int]() if params.include_stop_str_in_output else eos | set(params.stop_token_ids)
        self._min_tokens = params.min_tokens
        self._keep_stop = params.include_stop_str_in_output
        self._matcher = StopMatcher(params.stop) if params.stop else None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._utf8.decode(_unfinished_character(tokenizer, prompt_ids))
        self._held = ""
        self.stop_match: str | None = None
        self.num_tokens = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """Take new tokens in and return the text that is now certain.

        After `stop_match` is set, further tokens are not part of the output: `num_tokens` says how many are.
        """
        pieces = []
        for token_id in token_ids:
            if self.stop_match is not None:
                break
            self.num_tokens += 1
            if token_id in self._skip or (token_id in self._silent and self.num_tokens > self._min_tokens):
                continue
            pieces.append(self._advance(self._utf8.decode(self._tokenizer.token_bytes(token_id))))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text: what was held back for a stop string or for the rest of a character."""
        if self.stop_match is not None:
            return ""
        rest = self._advance(self._utf8.decode(b"", True))
        held, self._held = self._held, ""
        return rest + held

    def _advance(self, text: str) -> str:
        if self._matcher is None or not text:
            return text
        found = self._matcher.feed(text, ignore=self.num_tokens <= self._min_tokens)
        pending = self._held + text
        if found is None:
            cut = len(pending) - self._matcher.num_held
            self._held = pending[cut:]
            return pending[:cut]
        consumed, self.stop_match = found
        end = len(self._held) + consumed
        self._held = ""
        return pending[: end if self._keep_stop else end - len(self.stop_match)]


def _unfinished_character(tokenizer: Tokenizer, token_ids: Sequence[int]) -> bytes:
    """Bytes at the end of a prompt that begin a UTF-8 character without completing it."""
    tail = b""
    for token_id in reversed(token_ids):
        tail = tokenizer.token_bytes(token_id) + tail
        if len(tail) >= _LONGEST_UTF8_SEQUENCE:
            break
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(tail)
    unfinished: bytes = decoder.getstate()[0]
    return unfinished
