"""Incremental detokenisation: equal to the one-shot decoding however tokens arrive, cut at the first stop string."""

from __future__ import annotations

import functools
import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsengine.demo import CHECKPOINT_DIR
from dsengine.engine.sampling_params import SamplingParams
from dsengine.tokenizer.detokenizer import IncrementalDetokenizer, StopMatcher
from dsengine.tokenizer.tokenizer import Tokenizer

PROPERTY = settings(max_examples=200, deadline=None)

token_lists = st.lists(st.integers(0, 1050), max_size=30)
# Few letters, so that stop strings overlap themselves, each other and token boundaries.
texts = st.text(st.sampled_from("ab <>é😀"), max_size=40)
stops = st.lists(st.text(st.sampled_from("ab <>é😀"), min_size=1, max_size=5), min_size=1, max_size=4)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(CHECKPOINT_DIR)


def chunked(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


def stream(chunks: list[list[int]], params: SamplingParams, prompt: list[int] | None = None) -> IncrementalDetokenizer:
    detokenizer = IncrementalDetokenizer(tokenizer(), prompt or [], params)
    detokenizer.deltas = [detokenizer.push(chunk) for chunk in chunks]  # type: ignore[attr-defined]
    detokenizer.deltas.append(detokenizer.finish())  # type: ignore[attr-defined]
    return detokenizer


def text_of(detokenizer: IncrementalDetokenizer) -> str:
    return "".join(detokenizer.deltas)  # type: ignore[attr-defined]


def first_stop(text: str, strings: tuple[str, ...]) -> tuple[int, str] | None:
    """End and string of the match that ends first, the longest where several end there: the slow way."""
    for end in range(1, len(text) + 1):
        found = [s for s in strings if text[:end].endswith(s)]
        if found:
            return end, max(found, key=len)
    return None


@PROPERTY
@given(token_lists, st.lists(st.integers(0, 100), max_size=8), st.booleans())
def test_deltas_add_up_to_the_one_shot_decoding(ids: list[int], cuts: list[int], skip: bool) -> None:
    params = SamplingParams(skip_special_tokens=skip, include_stop_str_in_output=True)
    assert text_of(stream(chunked(ids, cuts), params)) == tokenizer().decode(ids, skip)


@PROPERTY
@given(st.text(), st.lists(st.integers(0, 100), max_size=8))
def test_any_unicode_comes_out_as_it_went_in(text: str, cuts: list[int]) -> None:
    ids = tokenizer().encode(text)
    params = SamplingParams(ignore_eos=True, skip_special_tokens=False)
    assert text_of(stream(chunked(ids, cuts), params)) == text


@PROPERTY
@given(texts, stops, st.lists(st.integers(0, 100), max_size=8), st.booleans())
def test_stop_strings_cut_at_the_first_match(text: str, strings: list[str], cuts: list[int], keep: bool) -> None:
    ids = tokenizer().encode(text)
    params = SamplingParams(stop=tuple(strings), include_stop_str_in_output=keep)
    result = stream(chunked(ids, cuts), params)
    expected = first_stop(text, params.stop)
    if expected is None:
        assert result.stop_match is None and text_of(result) == text and result.num_tokens == len(ids)
        return
    end, match = expected
    assert result.stop_match == match
    assert text_of(result) == text[: end if keep else end - len(match)]
    shortest = next(k for k in range(len(ids) + 1) if len(tokenizer().decode(ids[:k]).rstrip("�")) >= end)
    assert result.num_tokens == shortest


@PROPERTY
@given(texts, stops, st.integers(0, 12), st.lists(st.integers(0, 100), max_size=8))
def test_min_tokens_passes_over_early_matches(text: str, strings: list[str], least: int, cuts: list[int]) -> None:
    ids = tokenizer().encode(text)
    result = stream(chunked(ids, cuts), SamplingParams(stop=tuple(strings), min_tokens=least))
    one_by_one = stream([[i] for i in ids], SamplingParams(stop=tuple(strings), min_tokens=least))
    assert (text_of(result), result.stop_match, result.num_tokens) == (
        text_of(one_by_one),
        one_by_one.stop_match,
        one_by_one.num_tokens,
    )
    if result.stop_match is None:
        assert text_of(result) == text
    else:
        assert result.num_tokens > least
        assert text.startswith(text_of(result) + result.stop_match)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    detokenizer = IncrementalDetokenizer(tokenizer(), [], SamplingParams(stop=("END",)))
    ids = {char: tokenizer().encode(char) for char in "xEND"}
    assert [detokenizer.push(ids[c]) for c in "xENxE"] == ["x", "", "", "ENx", ""]
    assert [detokenizer.push(ids[c]) for c in "ND"] == ["", ""]
    assert detokenizer.stop_match == "END" and detokenizer.push(ids["x"]) == "" and detokenizer.finish() == ""
    assert detokenizer.num_tokens == 7


def test_half_a_character_is_held_back_and_given_up_at_the_end() -> None:
    ids = tokenizer().encode("😀")
    detokenizer = IncrementalDetokenizer(tokenizer(), [], SamplingParams())
    assert [detokenizer.push([i]) for i in ids] == [""] * (len(ids) - 1) + ["😀"]
    cut = IncrementalDetokenizer(tokenizer(), [], SamplingParams())
    assert cut.push(ids[:-1]) == "" and cut.finish() == "�"


def test_a_character_begun_by_the_prompt_is_completed() -> None:
    ok, emoji, mark = (tokenizer().encode(text) for text in ("ok", "😀", "!"))
    ids, start = [*ok, *emoji, *mark], len(ok)
    assert len(emoji) > 2
    for cut in range(start, start + len(emoji)):
        assert text_of(stream([ids[cut:]], SamplingParams(), prompt=ids[:cut])) == "😀!"
    assert text_of(stream([ids[start + len(emoji) :]], SamplingParams(), prompt=ids[: start + len(emoji)])) == "!"


@pytest.mark.parametrize(("keep", "expected"), [(False, "ab"), (True, "ab!")])
def test_a_stop_token_counts_but_yields_text_only_if_asked(keep: bool, expected: str) -> None:
    ids = tokenizer().encode("ab")
    stop = tokenizer().encode("!")[0]
    params = SamplingParams(stop_token_ids=(stop,), include_stop_str_in_output=keep)
    result = stream([[*ids, stop]], params)
    assert text_of(result) == expected and result.num_tokens == len(ids) + 1


def test_eos_is_text_only_where_it_is_ignored_and_shown() -> None:
    eos = min(tokenizer().eos_token_ids)
    shown = stream([[eos]], SamplingParams(ignore_eos=True, skip_special_tokens=False))
    assert text_of(shown) == tokenizer().eos_token
    assert text_of(stream([[eos]], SamplingParams(skip_special_tokens=False))) == ""


def test_matching_is_linear_in_the_text() -> None:
    """A text and strings that make a search with restarts quadratic: 16 strings of 256 times the same letter."""
    strings = ["a" * 255 + chr(ord("b") + i) for i in range(16)]

    def seconds(length: int) -> float:
        matcher = StopMatcher(strings)
        started = time.process_time()
        assert matcher.feed("a" * length) is None
        return time.process_time() - started

    seconds(10_000)
    small, large = min(seconds(20_000) for _ in range(3)), min(seconds(200_000) for _ in range(3))
    assert large < 25 * small
