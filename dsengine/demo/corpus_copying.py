"""Copying for the demo corpus: repeat words, look a value up, write pairs as JSON.

Tool calls are mostly copying, but a conversation with tools spends hundreds of tokens on a few copied ones; these short
exchanges teach the same skill densely.
"""

from __future__ import annotations

import json
from random import Random

from dsengine.demo.corpus_arithmetic import Exchange
from dsengine.demo.corpus_everyday import CITIES, JOBS, NAMES, THINGS, WORDS


def invented_word(rng: Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))


def anything(rng: Random) -> str:
    """A word of some kind, known or not, or a number."""
    kind = rng.randrange(5)
    if kind == 0:
        return invented_word(rng)
    if kind == 1:
        return str(rng.randint(0, 999))
    return rng.choice((WORDS, THINGS, NAMES, CITIES, JOBS)[rng.randrange(5)])


def repeat(rng: Random) -> Exchange:
    words = [anything(rng) for _ in range(rng.randint(1, 7))]
    text = rng.choice((" ", " ", ", ")).join(words)
    question = rng.choice(("Repeat: {t}", "Say {t}", "Repeat after me: {t}", "Echo {t}", "Please say {t}"))
    return Exchange("repeat", f"repeat {text}", question.format(t=text), f"Copy: {text}.", text, text, text)


def lookup(rng: Random) -> Exchange:
    keys = rng.sample((*WORDS, *THINGS, *(invented_word(rng) for _ in range(20))), rng.randint(2, 5))
    values = [anything(rng) for _ in keys]
    wanted = rng.randrange(len(keys))
    form, joint = rng.choice((("{k} is {v}", " and "), ("{k} {v}", " and "), ("{k}: {v}", ", "), ("{k}={v}", ", ")))
    listing = joint.join(form.format(k=key, v=value) for key, value in zip(keys, values, strict=True))
    question = rng.choice(("{l}. What is {k}?", "What is {k} in {l}?", "Given {l}, find {k}."))
    answer = f"{keys[wanted]} is {values[wanted]}"
    question = question.format(l=listing, k=keys[wanted])
    return Exchange("lookup", f"lookup {listing}", question, f"{answer}.", answer, answer, answer)


def pairs(rng: Random) -> Exchange:
    keys = rng.sample((*WORDS, *THINGS, "id", "size", "level", "mode", "user", "date", "limit"), rng.randint(1, 4))
    values = [anything(rng) for _ in keys]
    listing = " and ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    record = {key: int(value) if value.isdigit() else value for key, value in zip(keys, values, strict=True)}
    question = rng.choice(("Write as JSON: {l}", "Make JSON with {l}.", "As JSON: {l}")).format(l=listing)
    answer = json.dumps(record)
    return Exchange("pairs", f"pairs {listing}", question, f"{listing}.", answer, answer, answer)
