"""Arithmetic for the demo corpus: sums and differences with a digit-by-digit scratchpad, tables, comparisons.

The scratchpad is what lets a model of this size be exact: each step depends on a few digits restated just before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

HELD_OUT_PERCENT = 10
COLUMNS = ("ones", "tens", "hundreds", "thousands")


@dataclass(frozen=True)
class Exchange:
    """One question with its reasoning and answer.

    `plain` is the answer when the model may not think; `key` names the operands and decides the held-out split;
    `expect` is what a grader looks for.
    """

    task: str
    key: str
    question: str
    reasoning: str
    answer: str
    plain: str
    expect: str


Generator = Callable[[Random], Exchange]


def is_held_out(key: str) -> bool:
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def operand(rng: Random, width: int = 0) -> int:
    width = width or rng.choices((1, 2, 3), (1, 2, 7))[0]
    return rng.randrange(10 ** (width - 1) if width > 1 else 0, 10**width)


def digits(value: int, width: int) -> list[int]:
    """Digits from the ones up."""
    return [value // 10**i % 10 for i in range(width)]


def add_steps(a: int, b: int) -> str:
    width = max(len(str(a)), len(str(b)))
    steps, carry = [f"{a:0{width}}+{b:0{width}}."], 0
    for i, (x, y) in enumerate(zip(digits(a, width), digits(b, width), strict=True)):
        total = x + y + carry
        carried = f"+{carry}" if i else ""
        steps.append(f"{COLUMNS[i]}: {x}+{y}{carried}={total}, write {total % 10} carry {total // 10}.")
        carry = total // 10
    return " ".join(steps) + f" Total {a + b}."


def compare_steps(a: int, b: int) -> str:
    width = max(len(str(a)), len(str(b)))
    steps = []
    for i in reversed(range(width)):
        x, y = a // 10**i % 10, b // 10**i % 10
        sign = "<" if x < y else ">" if x > y else "="
        steps.append(f"{COLUMNS[i]} {x}{sign}{y}")
        if x != y:
            break
    return ", ".join(steps)


def subtract_steps(a: int, b: int) -> str:
    width = max(len(str(a)), len(str(b)))
    text = f"{a:0{width}}-{b:0{width}}. Compare: {compare_steps(a, b)}."
    if a == b:
        return text + " Equal, so 0."
    big, small = max(a, b), min(a, b)
    text += f" {'Not negative' if a > b else 'Negative'}: {big:0{width}}-{small:0{width}}."
    borrow = 0
    for i, (x, y) in enumerate(zip(digits(big, width), digits(small, width), strict=True)):
        taken = f"-{borrow}" if i else ""
        # The digits come first and their difference keeps its sign: the borrow then only has to be read off.
        left = x - y - borrow
        borrow = int(left < 0)
        text += f" {COLUMNS[i]}: {x}-{y}{taken}={left}, write {left % 10} borrow {borrow}."
    return text + (f" Difference {big - small}." if a > b else f" Difference {big - small}, so {a - b}.")


ADD_FORMS = (
    "What is {a} + {b}?", "{a} + {b} = ?", "{a}+{b}=", "Compute {a} + {b}.", "Add {a} and {b}.", "{a} plus {b}",
    "What is {a} plus {b}?", "What's {a} + {b}?", "Calculate {a} + {b}", "Please add {a} to {b}.", "{a} + {b}",
    "What is the sum of {a} and {b}?", "How much is {a} + {b}?", "Can you work out {a} + {b} for me?", "{a}+{b}",
    "What do I get if I add {a} and {b}?", "what is {a}+{b}", "What is {a}+{b}?", "Sum {a} and {b}.", "{a} + {b} =",
)  # fmt: skip
SUB_FORMS = (
    "What is {a} - {b}?", "{a} - {b} = ?", "{a}-{b}=", "Compute {a} - {b}.", "Subtract {b} from {a}.", "{a} minus {b}",
    "What is {a} minus {b}?", "What's {a} - {b}?", "Calculate {a} - {b}", "Take {b} away from {a}.", "{a} - {b}",
    "How much is {a} - {b}?", "Can you work out {a} - {b} for me?", "{a}-{b}", "what is {a}-{b}", "What is {a}-{b}?",
    "What is the difference when {b} is taken from {a}?", "Please compute {a} minus {b}.", "{a} - {b} =",
)  # fmt: skip
MUL_FORMS = (
    "What is {a} x {b}?", "{a} * {b} = ?", "{a}*{b}=", "Compute {a} * {b}.", "Multiply {a} by {b}.", "{a} times {b}",
    "What is {a} times {b}?", "What is {a} * {b}?", "{a} x {b}", "What's {a} × {b}?",
)  # fmt: skip
MORE_FORMS = (
    "Which is larger, {a} or {b}?", "Which number is bigger: {a} or {b}?", "Is {a} greater than {b}?",
    "Which is smaller, {a} or {b}?", "Compare {a} and {b}.",
)  # fmt: skip


def addition(rng: Random, width: int = 0) -> Exchange:
    a, b = operand(rng, width), operand(rng, width)
    direct = max(a, b) < 100
    answer = f"{a} + {b} = {a + b}"
    steps = add_steps(a, b)
    return Exchange(
        "addition", f"+ {a} {b}", rng.choice(ADD_FORMS).format(a=a, b=b), steps, answer,
        answer if direct else f"{steps}\n{answer}", str(a + b),
    )  # fmt: skip


def subtraction(rng: Random, width: int = 0) -> Exchange:
    a, b = operand(rng, width), operand(rng, width)
    if a < b and rng.random() < 0.3:
        a, b = b, a
    direct = max(a, b) < 100
    answer = f"{a} - {b} = {a - b}"
    steps = subtract_steps(a, b)
    return Exchange(
        "subtraction", f"- {a} {b}", rng.choice(SUB_FORMS).format(a=a, b=b), steps, answer,
        answer if direct else f"{steps}\n{answer}", str(a - b),
    )  # fmt: skip


def multiply_steps(a: int, b: int) -> str:
    """a up to 99 by a single digit b: tens and ones apart."""
    tens, ones = a // 10 * 10, a % 10
    return f"{tens}*{b}={tens * b} and {ones}*{b}={ones * b}. {tens * b}+{ones * b}={a * b}."


def multiplication(rng: Random) -> Exchange:
    if rng.random() < 0.6:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        steps, key = f"From the table: {a}*{b}={a * b}.", ""
    else:
        a, b = rng.randint(11, 99), rng.randint(2, 9)
        steps, key = multiply_steps(a, b), f"* {a} {b}"
    answer = f"{a} * {b} = {a * b}"
    plain = answer if not key else f"{steps}\n{answer}"
    question = rng.choice(MUL_FORMS).format(a=a, b=b)
    return Exchange("multiplication", key, question, steps, answer, plain, str(a * b))


def comparison(rng: Random) -> Exchange:
    a, b = operand(rng), operand(rng)
    if rng.random() < 0.4:
        b = max(0, a + rng.randint(-30, 30))
    form = rng.choice(MORE_FORMS)
    width = max(len(str(a)), len(str(b)))
    steps = f"{a:0{width}} and {b:0{width}}: {compare_steps(a, b)}."
    if a == b:
        answer = expect = f"{a} and {b} are equal."
    elif form.startswith("Is"):
        answer = f"Yes, {a} is greater than {b}." if a > b else f"No, {a} is less than {b}."
        expect = answer.split(",")[0]
    elif "smaller" in form:
        answer, expect = f"{min(a, b)} is smaller than {max(a, b)}.", f"{min(a, b)} is smaller"
    else:
        answer, expect = f"{max(a, b)} is larger than {min(a, b)}.", f"{max(a, b)} is larger"
    return Exchange("comparison", f"<> {a} {b}", form.format(a=a, b=b), steps, answer, answer, expect)
