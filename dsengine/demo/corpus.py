"""The demo corpus: an endless, seeded stream of conversations that mixes all tasks, and its held-out counterpart.

Everything is generated here, nothing is downloaded. A tenth of all operand combinations, chosen by a hash, never
appears in training; `held_out=True` draws from exactly that tenth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from dsengine.demo.corpus_arithmetic import (
    Exchange,
    Generator,
    addition,
    comparison,
    is_held_out,
    multiplication,
    subtraction,
)
from dsengine.demo.corpus_chat import SYSTEM_PROMPTS, capital, colour, smalltalk
from dsengine.demo.corpus_copying import lookup, pairs, repeat
from dsengine.demo.corpus_everyday import counting, day_span, extraction, letters, units, weekday, word_problem
from dsengine.demo.corpus_tools import tool_conversation
from dsengine.demo.template import Conversation, Message

Mixture = Sequence[tuple[Generator, float]]

# The tokenizer is built from this mixture; training gives the hardest task a larger share of it.
MIXTURE: Mixture = (
    (addition, 22), (subtraction, 30), (multiplication, 5), (comparison, 4), (units, 7), (weekday, 4), (day_span, 2),
    (word_problem, 8), (extraction, 8), (smalltalk, 12), (capital, 4), (colour, 1.5), (letters, 4), (counting, 2),
)  # fmt: skip
TRAINING_MIXTURE: Mixture = ((subtraction, 60), (addition, 8), *MIXTURE)
COPYING_MIXTURE: Mixture = ((repeat, 4), (lookup, 3), (pairs, 3))
TOOL_SHARE = 0.24
COPYING_SHARE = 0.15
MULTI_TURN_SHARE = 0.22


def draw(rng: Random, generator: Generator, held_out: bool = False) -> Exchange:
    """One exchange on the wanted side of the split; keyless ones (fixed facts) are on both sides."""
    while True:
        exchange = generator(rng)
        if not exchange.key or is_held_out(exchange.key) == held_out:
            return exchange


def draw_any(rng: Random, held_out: bool = False, mixture: Mixture = MIXTURE) -> Exchange:
    generators, weights = zip(*mixture, strict=True)
    return draw(rng, rng.choices(generators, weights)[0], held_out)


def dialogue(rng: Random, held_out: bool = False, mixture: Mixture = MIXTURE) -> Conversation:
    """One or several turns; with thinking, earlier turns show their short answers only, as the template does."""
    thinking = rng.random() < 0.7
    turns = 1
    if rng.random() < MULTI_TURN_SHARE:
        turns = rng.choices((2, 3, 4, 6), (6, 4, 2, 1))[0]
    messages: list[Message] = []
    if rng.random() < 0.25:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for index in range(turns):
        exchange = draw_any(rng, held_out, mixture)
        messages.append({"role": "user", "content": exchange.question})
        reply: Message = {"role": "assistant", "content": exchange.answer if thinking else exchange.plain}
        if thinking and index == turns - 1:
            reply["reasoning_content"] = exchange.reasoning
        messages.append(reply)
    return Conversation(messages, [], thinking)


def conversations(
    seed: int, held_out: bool = False, mixture: Mixture = MIXTURE, copying: float = 0.0
) -> Iterator[Conversation]:
    """The stream of a seed; `copying` is the share of conversations that only exercise copying."""
    rng = Random(f"{seed} {held_out}")
    while True:
        if copying and rng.random() < copying:
            yield dialogue(rng, held_out, COPYING_MIXTURE)
        elif rng.random() < TOOL_SHARE:
            yield tool_conversation(rng, held_out)[0]
        else:
            yield dialogue(rng, held_out, mixture)
