"""The corpus is reproducible, its split is clean, and its own answers are right."""

import json
import re
from itertools import islice
from random import Random

import pytest

from dsengine.demo.corpus import COPYING_MIXTURE, MIXTURE, conversations, draw
from dsengine.demo.corpus_arithmetic import addition, is_held_out, subtraction
from dsengine.demo.corpus_tools import tool_conversation
from dsengine.demo.problems import (
    calls_match,
    contains,
    exact_result,
    other_problems,
    parse_calls,
    three_digit_problems,
    tool_problems,
)
from dsengine.demo.template import assistant_text, segments


def test_a_seed_fixes_the_stream():
    first, second = (list(islice(conversations(5), 200)) for _ in range(2))
    assert first == second
    assert first != list(islice(conversations(6), 200))


@pytest.mark.parametrize("generator", [generator for generator, _ in (*MIXTURE, *COPYING_MIXTURE)])
def test_split_is_disjoint_and_a_tenth(generator):
    rng = Random(0)
    drawn = [generator(rng).key for _ in range(2000)]
    train = {draw(rng, generator).key for _ in range(500)} - {""}
    held_out = {draw(rng, generator, held_out=True).key for _ in range(200)} - {""}
    assert not train & held_out
    keys = {key for key in drawn if key}
    if len(keys) > 800:
        assert 0.06 < sum(map(is_held_out, keys)) / len(keys) < 0.14


@pytest.mark.parametrize("generator", [addition, subtraction])
def test_scratchpads_compute_what_they_claim(generator):
    rng = Random(1)
    for _ in range(2000):
        exchange = generator(rng)
        for left, right in re.findall(r"([\d+-]+)=(-?\d+)", exchange.reasoning):
            assert sum(map(int, re.findall(r"-?\d+", left))) == int(right)
        assert exchange.answer.endswith(f"= {exchange.expect}")
        assert exchange.expect in exchange.reasoning


def test_graders_accept_the_corpus_own_answers():
    rng = Random(2)
    for generator, _ in (*MIXTURE, *COPYING_MIXTURE):
        for _ in range(100):
            exchange = generator(rng)
            assert contains(exchange.expect)(f"{exchange.reasoning}</think>{exchange.answer}"), exchange
            assert contains(exchange.expect)(exchange.plain), exchange


def test_exact_result_grader():
    grade = exact_result("-62")
    assert grade("285-347... -99</think>285 - 347 = -62")
    assert not grade("x</think>285 - 347 = 62")
    assert not grade("-62</think>")


def test_tool_calls_parse_and_match():
    rng = Random(3)
    for _ in range(300):
        conversation, uses = tool_conversation(rng)
        for message in conversation.messages:
            if message.get("tool_calls"):
                text = assistant_text(message).removesuffix("<｜end▁of▁sentence｜>")
                expected = [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
                assert parse_calls(text) == expected
                assert calls_match(expected)(text)
        names = [tool["function"]["name"] for tool in conversation.tools]
        assert len(names) == len(set(names))
        assert all(use.tool["function"]["name"] in names for use in uses)


@pytest.mark.parametrize("text", ["", "Hello", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁begin｜>x<｜tool▁calls▁end｜>"])
def test_ill_formed_calls_are_refused(text):
    assert parse_calls(text) is None


def test_problem_sets_are_held_out_and_reproducible():
    problems = three_digit_problems(40)
    assert [p.prompt for p in problems] == [p.prompt for p in three_digit_problems(40)]
    assert {p.task for p in problems} == {"addition", "subtraction"}
    for problem in problems:
        numbers = re.findall(r"\d+", problem.messages[-1]["content"])
        assert all(len(number) == 3 for number in numbers)
    assert all(p.tools and not p.thinking for p in tool_problems(10))
    assert len(other_problems(2, thinking=True)) == 22


def test_copying_share_is_heeded():
    first = [c.messages[-2]["content"] for c in islice(conversations(4, copying=1.0), 50) if len(c.messages) == 2]
    assert first and all(re.search(r"Repeat|Say|say|Echo|JSON|What is|Given", text) for text in first)


def test_only_what_the_assistant_wrote_is_supervised():
    for conversation in islice(conversations(9), 200):
        for text, written in segments(conversation):
            assert written == text.endswith("<｜end▁of▁sentence｜>") or not written
            if written:
                assert "<｜User｜>" not in text
        json.dumps(conversation.messages)
