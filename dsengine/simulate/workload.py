"""What a simulated cluster is asked to do: a trace that is replayed, or conversations made up from a few numbers.

Requests are told by lengths only; the tokens of a prompt are made when it is sent and differ wherever prompts do: the
beginning is that of its prefix group, a later turn begins with all that was said before.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

OUTPUT_TOKEN = 0
"""What every simulated step draws."""
_LONGEST = 2**20


@dataclass(frozen=True)
class Turn:
    """Tokens that a client adds to the conversation, and those it gets back."""

    input_len: int
    output_len: int


@dataclass(frozen=True)
class Conversation:
    """Turns that build on each other, the next one sent `think_time` seconds after the answer to the one before.

    Attributes:
        arrival: seconds after the start.
        prefix_group: conversations of one group have their first `prefix_len` tokens (of the first turn) in common.
    """

    arrival: float
    turns: tuple[Turn, ...]
    prefix_group: int = 0
    prefix_len: int = 0
    think_time: float = 0.0


@dataclass(frozen=True)
class Synthetic:
    """Conversations with lengths drawn evenly around their means, arriving at random.

    Attributes:
        conversations: how many.
        rate: arrivals a second, exponential gaps; 0: no arrivals but `concurrency` conversations at any time.
        input_len: new tokens of a turn, without the prefix.
        spread: lengths lie within this fraction of their mean.
        prefix_groups: common prefixes, chosen with equal probability.
    """

    conversations: int = 1000
    rate: float = 0.0
    concurrency: int = 256
    input_len: int = 2000
    output_len: int = 200
    spread: float = 0.2
    prefix_groups: int = 1
    prefix_len: int = 0
    turns: int = 1
    think_time: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("conversations", "concurrency", "input_len", "output_len", "prefix_groups", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("rate", "prefix_len", "think_time"):
            if not 0 <= getattr(self, name) < _LONGEST:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to {_LONGEST - 1}")
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread is {self.spread}; it must be at least 0 and less than 1")

    @classmethod
    def parse(cls, words: Iterable[str]) -> Synthetic:
        """From words such as "input_len=2000".

        Raises:
            ValueError: a word has another form, an unknown name, or a value that is no number of the right kind.
        """
        known: dict[str, type[int] | type[float]] = {
            each.name: float if each.type == "float" else int for each in fields(cls)
        }
        values: dict[str, Any] = {}
        for word in words:
            name, equals, text = word.partition("=")
            if not equals or name not in known:
                raise ValueError(f"{word!r} is neither a file nor NAME=VALUE with one of {', '.join(known)}")
            try:
                values[name] = known[name](text)
            except ValueError:
                raise ValueError(f"{name} is {text!r}; it must be of type {known[name].__name__}") from None
        return cls(**values)

    def generate(self) -> list[Conversation]:
        rng = random.Random(self.seed)
        arrival, found = 0.0, []
        for _ in range(self.conversations):
            turns = [
                Turn(
                    self._draw(rng, self.input_len) + (self.prefix_len if first else 0),
                    self._draw(rng, self.output_len),
                )
                for first in [True] + [False] * (self.turns - 1)
            ]
            group = rng.randrange(self.prefix_groups)
            found.append(Conversation(arrival, tuple(turns), group, self.prefix_len, self.think_time))
            arrival += rng.expovariate(self.rate) if self.rate else 0.0
        return found

    def _draw(self, rng: random.Random, mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - self.spread, 1 + self.spread)))


def read_trace(path: Path) -> list[Conversation]:
    """A trace: on each line a JSON object with `arrival` (seconds), `input_len`, `output_len`, and if wanted
    `prefix_group` (any string or number) and `prefix_len` (tokens that all of the group begin with).

    Raises:
        ValueError: a line is something else; the message names it.
        OSError: the file cannot be read.
    """
    found: list[Conversation] = []
    groups: dict[object, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                found.append(_read_line(json.loads(line), groups))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path} holds no requests")
    return sorted(found, key=lambda conversation: conversation.arrival)


def _read_line(row: object, groups: dict[object, int]) -> Conversation:
    if not isinstance(row, dict):
        raise ValueError("it must be a JSON object")
    unknown = row.keys() - {"arrival", "input_len", "output_len", "prefix_group", "prefix_len"}
    if unknown:
        raise ValueError(f"there is no field {min(unknown)!r}")
    arrival = row.get("arrival")
    if isinstance(arrival, bool) or not isinstance(arrival, int | float) or not 0 <= arrival < math.inf:
        raise ValueError(f"arrival is {arrival!r}; it must be a number of seconds")
    lengths = {}
    for name, least in (("input_len", 1), ("output_len", 1), ("prefix_len", 0)):
        value = row.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _LONGEST:
            raise ValueError(f"{name} is {value!r}; it must be a whole number from {least} to {_LONGEST - 1}")
        lengths[name] = value
    if lengths["prefix_len"] > lengths["input_len"]:
        raise ValueError(f"prefix_len is {lengths['prefix_len']}, more than input_len, {lengths['input_len']}")
    group = groups.setdefault(json.dumps(row.get("prefix_group")), len(groups))
    turn = Turn(lengths["input_len"], lengths["output_len"])
    return Conversation(float(arrival), (turn,), group, lengths["prefix_len"])


@dataclass
class Dialogue:
    """A conversation under way: what has been said, as token ids.

    Attributes:
        ids: positive numbers that nobody else gets.
    """

    conversation: Conversation
    ids: Iterator[int]
    said: list[int] = field(default_factory=list)
    num_turns: int = 0

    @property
    def is_over(self) -> bool:
        return self.num_turns == len(self.conversation.turns)

    def next_prompt(self) -> list[int]:
        """The prompt of the next turn, of which there must be one."""
        conversation = self.conversation
        new = conversation.turns[self.num_turns].input_len
        # Prompts differ from where an id of their own stands; what follows it need not.
        if self.num_turns == 0 and conversation.prefix_len:
            self.said += [1 + conversation.prefix_group] + [OUTPUT_TOKEN] * (conversation.prefix_len - 1)
            new -= conversation.prefix_len
        if new:
            self.said += [-next(self.ids)] + [OUTPUT_TOKEN] * (new - 1)
        self.num_turns += 1
        return list(self.said)

    @property
    def output_len(self) -> int:
        return self.conversation.turns[self.num_turns - 1].output_len

    def answered(self) -> None:
        """The answer to the latest turn is part of what was said."""
        self.said += [OUTPUT_TOKEN] * self.output_len
