"""Held-out problems and their graders, shared by the evaluation during training and the final one on the engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from dsengine.demo.corpus import conversations, draw
from dsengine.demo.corpus_arithmetic import addition, comparison, multiplication, subtraction
from dsengine.demo.corpus_chat import capital, smalltalk
from dsengine.demo.corpus_everyday import counting, day_span, extraction, letters, units, weekday, word_problem
from dsengine.demo.corpus_tools import call, tool_conversation
from dsengine.demo.template import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    END_THINK,
    SEP,
    Conversation,
    Message,
    prompt_text,
)

Grader = Callable[[str], bool]
OTHER_TASKS = (
    multiplication, comparison, units, weekday, day_span, word_problem, extraction, counting, letters, smalltalk,
    capital,
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A prompt (messages and tools) with what decides whether a completion is right."""

    task: str
    messages: list[Message]
    tools: list[dict[str, Any]]
    thinking: bool
    grade: Grader

    @property
    def prompt(self) -> str:
        return prompt_text(self.messages, self.tools, self.thinking)


def final_answer(completion: str) -> str:
    return completion.split(END_THINK)[-1].strip()


def exact_result(value: str) -> Grader:
    """The last number of the answer is the result."""

    def grade(completion: str) -> bool:
        answer = final_answer(completion)
        tail = answer.split("=")[-1] if "=" in answer else answer
        numbers = re.findall(r"-?\d+", tail)
        return bool(numbers) and numbers[-1] == value

    return grade


def contains(expected: str) -> Grader:
    return lambda completion: expected in final_answer(completion) + " "


def parse_calls(completion: str) -> list[tuple[str, Any]] | None:
    """(name, arguments) of each call, or None where the completion is not exactly a well-formed block of calls."""
    text = completion.strip()
    if not (text.startswith(CALLS_BEGIN) and text.endswith(CALLS_END)):
        return None
    body = text[len(CALLS_BEGIN) : -len(CALLS_END)]
    calls = re.findall(f"{CALL_BEGIN}(.*?){SEP}(.*?){CALL_END}", body, re.DOTALL)
    if "".join(f"{CALL_BEGIN}{name}{SEP}{arguments}{CALL_END}" for name, arguments in calls) != body:
        return None
    try:
        return [(name, json.loads(arguments)) for name, arguments in calls]
    except json.JSONDecodeError:
        return None


def calls_match(expected: list[tuple[str, Any]]) -> Grader:
    return lambda completion: parse_calls(completion) == expected


def three_digit_problems(count: int, seed: int = 0) -> list[Problem]:
    """Held-out additions and subtractions of three-digit numbers, alternating, to be answered with thinking."""
    rng = Random(f"three-digit {seed}")
    problems = []
    for index in range(count):
        generator = (addition, subtraction)[index % 2]
        exchange = draw(rng, lambda r, g=generator: g(r, 3), held_out=True)  # type: ignore[misc]
        messages = [{"role": "user", "content": exchange.question}]
        problems.append(Problem(exchange.task, messages, [], True, exact_result(exchange.expect)))
    return problems


def other_problems(count: int, thinking: bool, seed: int = 0) -> list[Problem]:
    """`count` held-out problems of each of the smaller tasks."""
    rng = Random(f"other {seed}")
    problems = []
    for generator in OTHER_TASKS:
        for _ in range(count):
            exchange = draw(rng, generator, held_out=True)
            messages = [{"role": "user", "content": exchange.question}]
            problems.append(Problem(exchange.task, messages, [], thinking, contains(exchange.expect)))
    return problems


def tool_problems(count: int, seed: int = 0) -> list[Problem]:
    """Held-out requests with a matching tool on offer, one or two calls each."""
    rng = Random(f"tools {seed}")
    problems: list[Problem] = []
    while len(problems) < count:
        conversation, uses = tool_conversation(rng, held_out=True, finish=False)
        if uses:
            functions = [call(use)["function"] for use in uses]
            expected = [(f["name"], f["arguments"]) for f in functions]
            grade = calls_match(expected)
            task = "invented tools" if any(use.invented for use in uses) else "familiar tools"
            problems.append(Problem(task, conversation.messages, conversation.tools, False, grade))
    return problems


def held_out_conversations(count: int, seed: int = 0) -> list[Conversation]:
    stream = conversations(seed, held_out=True)
    return [next(stream) for _ in range(count)]
