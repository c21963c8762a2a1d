"""Splitting reasoning from the answer: the same whatever the cuts, nothing lost, markers dropped."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsengine.server.reasoning import ReasoningSplitter

PIECES = st.sampled_from(["<think>", "</think>", "<", "</", "</thin", "think>", "\n", "\n\n", "a", "é", " "])
texts = st.lists(PIECES, max_size=8).map("".join)


def split(chunks: list[str], inside: bool) -> tuple[str, str, bool]:
    splitter = ReasoningSplitter(inside)
    parts = [splitter.push(chunk) for chunk in chunks]
    parts.append(splitter.finish())
    return "".join(r for r, _ in parts), "".join(c for _, c in parts), splitter.in_reasoning


def expected(text: str, inside: bool) -> tuple[str, str, bool]:
    """The definition, on the whole text."""
    if text.startswith("<think>"):
        text, inside = text.removeprefix("<think>").removeprefix("\n"), True
    if not inside:
        return "", text, False
    reasoning, end, content = text.partition("</think>")
    return reasoning, content.lstrip("\n"), not end


@settings(max_examples=500, deadline=None)
@given(texts, st.booleans(), st.lists(st.integers(0, 60), max_size=8))
def test_cuts_make_no_difference(text: str, inside: bool, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    chunks = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert split(chunks, inside) == expected(text, inside)


@settings(max_examples=200, deadline=None)
@given(texts, st.booleans())
def test_one_character_at_a_time(text: str, inside: bool) -> None:
    assert split(list(text), inside) == expected(text, inside)


@pytest.mark.parametrize(
    ("text", "inside", "outcome"),
    [
        ("because</think>\n\nanswer", True, ("because", "answer", False)),
        ("<think>\nbecause</think>answer", True, ("because", "answer", False)),
        ("<think>because</think>answer", False, ("because", "answer", False)),
        ("answer", False, ("", "answer", False)),
        ("never closed </thi", True, ("never closed </thi", "", True)),
        ("a</think>b</think>c", True, ("a", "b</think>c", False)),
        ("</think>\n", True, ("", "", False)),
        ("1 < 2 <think>", False, ("", "1 < 2 <think>", False)),
        ("", True, ("", "", True)),
    ],
)
def test_examples(text: str, inside: bool, outcome: tuple[str, str, bool]) -> None:
    assert split([text], inside) == outcome == expected(text, inside)


def test_certain_text_is_not_held_back() -> None:
    splitter = ReasoningSplitter(True)
    assert splitter.push("so ") == ("so ", "")
    assert splitter.push("x <") == ("x ", "")
    assert splitter.push("/thin") == ("", "")
    assert splitter.push("g") == ("</thing", "")
    assert splitter.push("</think>") == ("", "") and not splitter.in_reasoning
    assert splitter.push("\n") == ("", "")
    assert splitter.push("\nyes\n") == ("", "yes\n")
    assert splitter.push("</think>") == ("", "</think>")
