"""Calls out of text: every wire format, whatever the cuts, malformed or not, in linear time."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsengine.server.tools.events import Arguments, CallStart, Content, Event, merged
from dsengine.server.tools.formats import PARSERS

FORMATS = sorted(PARSERS)
TB, TE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CB, CE, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
KB, KE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
KCB, KCE, KARG = "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>"
D = "｜DSML｜"
DB, DE = f"<{D}function_calls>", f"</{D}function_calls>"

# Pieces that adversarial texts are made of: the markers of the format, parts of them, and what stands between them.
PIECES: dict[str, list[str]] = {
    "deepseekv3": [TB, TE, CB, CE, SEP, "function", "f\n", "```json\n", "```", '{"a": 1}', "{", "\n"],
    "deepseekv31": [TB, TE, CB, CE, SEP, "f", "g h", '{"a": 1}', "{", "}", "\n"],
    "deepseekv32": [
        DB, DE, f"<{D}invoke", ' name="f">', ' name="g"/>', f"</{D}invoke>",
        f"<{D}parameter", ' name="a" string="true">', ' name="b" string="false">', ' name="c">', f"</{D}parameter>",
        "[1, 2", "]", '"', "\\", "\n\n", "{", "}",
    ],
    "kimi_k2": [KB, KE, KCB, KCE, KARG, "functions.f:0", "f", '{"a": 1}', "\n"],
}  # fmt: skip
COMMON = ["<", "<｜", "<|", "</", " ", "text", "é😀", "x" * 200]


def texts(format: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(PIECES[format] + COMMON), max_size=14).map("".join)


def parse(format: str, chunks: list[str], **options: Any) -> list[Event]:
    parser = PARSERS[format](**options)  # type: ignore[index]
    events = [event for chunk in chunks for event in parser.push(chunk)]
    return merged(events + parser.finish())


def summary(events: list[Event]) -> tuple[str, list[tuple[str, str]]]:
    """(content, [(name, arguments)])."""
    content, calls = "", list[list[str]]()
    for event in events:
        match event:
            case Content(text):
                assert not calls, "content behind a call"
                content += text
            case CallStart(name):
                calls.append([name, ""])
            case Arguments(text):
                calls[-1][1] += text
    return content, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_cuts_make_no_difference(format: str, data: st.DataObject) -> None:
    text = data.draw(texts(format))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    whole = parse(format, [text])
    edges = sorted({0, len(text), *cuts})
    assert parse(format, [text[a:b] for a, b in itertools.pairwise(edges)]) == whole
    assert parse(format, list(text)) == whole
    content, calls = summary(whole)
    if not calls and TB + TE not in text:
        markers = [TB, TE, DB, DE, KB, KE]
        kept = content
        for marker in markers:  # empty blocks vanish, and nothing else does
            kept, text = kept.replace(marker, ""), text.replace(marker, "")
        assert "".join(kept.split()) == "".join(text.split())


ARGUMENTS = '{"a": "x\\n`", "b": [1]}'
WELL_FORMED = {
    "deepseekv3": f"Hi.\n\n{TB}{CB}function{SEP}f\n```json\n{ARGUMENTS}\n```{CE}\n"
    f"{CB}function{SEP}g\n```json\n{{}}\n```{CE}{TE}",
    "deepseekv31": f"Hi.\n{TB}{CB}f{SEP}{ARGUMENTS}{CE}{CB}g{SEP}{{}}{CE}{TE}",
    "deepseekv32": f'Hi.\n\n{DB}\n<{D}invoke name="f">\n<{D}parameter name="a" string="true">x\n`</{D}parameter>\n'
    f'<{D}parameter name="b" string="false">[1]</{D}parameter>\n</{D}invoke>\n'
    f'<{D}invoke name="g">\n\n</{D}invoke>\n{DE}',
    "kimi_k2": f"Hi. {KB}{KCB}functions.f:0{KARG}{ARGUMENTS}{KCE}{KCB}functions.g:1{KARG}{{}}{KCE}{KE}",
}


@pytest.mark.parametrize("format", FORMATS)
def test_two_calls_cut_at_every_place(format: str) -> None:
    text = WELL_FORMED[format]
    expected = parse(format, [text])
    content, calls = summary(expected)
    assert content == "Hi."
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", {"a": "x\n`", "b": [1]}), ("g", {})]
    for i in range(len(text) + 1):
        assert parse(format, [text[:i], text[i:]]) == expected
    for i, j in itertools.combinations(range(0, len(text) + 1, 3), 2):
        assert parse(format, [text[:i], text[i:j], text[j:]]) == expected
    assert summary(parse(format, [text], max_calls=1))[1] == calls[:1]


@pytest.mark.parametrize("format", FORMATS)
def test_random_cuts_of_every_prefix(format: str) -> None:
    """A truncated answer, too, is a function of its text."""
    rng = random.Random(format)
    text = WELL_FORMED[format]
    for end in range(len(text)):
        whole = parse(format, [text[:end]])
        for _ in range(6):
            edges = sorted({0, end, *(rng.randint(0, end) for _ in range(6))})
            assert parse(format, [text[a:b] for a, b in itertools.pairwise(edges)]) == whole


@pytest.mark.parametrize("format", FORMATS)
def test_arguments_are_streamed(format: str) -> None:
    text = WELL_FORMED[format].replace("x", "one two three four")
    parser = PARSERS[format]()  # type: ignore[index]
    sizes = [len(e.text) for char in text for e in parser.push(char) if isinstance(e, Arguments)]
    assert len(sizes) > 12 and max(sizes) < 12


def test_call_ids_are_those_on_the_wire() -> None:
    events = parse("kimi_k2", [WELL_FORMED["kimi_k2"]])
    assert [e for e in events if isinstance(e, CallStart)] == [
        CallStart("f", "functions.f:0"),
        CallStart("g", "functions.g:1"),
    ]


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        ("deepseekv31", f"{TB}{CB}f{SEP}{CE}{TE}", ("", [("f", "{}")])),
        ("deepseekv31", f"{CB}f{SEP}{{}}{CE}", ("", [("f", "{}")])),
        ("deepseekv31", f"{TB}\n{CB} f {SEP} {{}} {TE} and so on", ("", [("f", "{}")])),
        ("deepseekv31", f"a {TB}{TE} b", ("a b", [])),
        ("deepseekv31", f"a {TB} b {TB}{CB}f{SEP}1{CE}", (f"a {TB} b", [("f", "1")])),
        ("deepseekv31", f"{TB}{CB}fun", (f"{TB}{CB}fun", [])),
        ("deepseekv31", f"{TB}{CB}{'f' * 300}{SEP}1{CE}", (f"{TB}{CB}{'f' * 300}{SEP}1{CE}", [])),
        ("deepseekv31", f"{TB}{CB}a\nb{SEP}1{CE}", (f"{TB}{CB}a\nb{SEP}1{CE}", [])),
        ("deepseekv31", f"{TB}{CB}f{SEP}{{}}{CE}{CB}a\nb{SEP}1{CE}{CB}g{SEP}2{CE}", ("", [("f", "{}"), ("g", "2")])),
        ("deepseekv31", f'{TB}{CB}f{SEP}{{"a": "x <｜tool', ("", [("f", '{"a": "x <｜tool')])),
        ("deepseekv3", f"{TB}{CB}function{SEP}f{CE}{TE}", ("", [("f", "{}")])),
        ("deepseekv3", f"{TB}{CB}function{SEP}f\n{{}}{CE}{TE}", ("", [("f", "{}")])),
        ("deepseekv3", f"{TB}{CB}function{SEP}f\n```json\n{{}}\n``", ("", [("f", "{}\n``")])),
        ("deepseekv3", f"{TB}{CB}function{SEP}f\n```json\n{{}}\n```", ("", [("f", "{}")])),
        ("kimi_k2", f"{KB}{KCB}functions.a.b:12{KARG}1{KCE}", ("", [("a.b", "1")])),
        ("kimi_k2", f"{KB}{KCB}f{KARG}1{KCE}", ("", [("f", "1")])),
        ("deepseekv32", f'{DB}<{D}invoke name="f"/>{DE}', ("", [("f", "{}")])),
        ("deepseekv32", f'{DB}<{D}invoke name="f">{{"a": 1}}</{D}invoke>{DE}', ("", [("f", '{"a": 1}')])),
        ("deepseekv32", f'{DB}<{D}invoke name="f">nonsense</{D}invoke>{DE}', ("", [("f", "{}")])),
        ("deepseekv32", f'{DB}<{D}invoke nome="f">', (f'{DB}<{D}invoke nome="f">', [])),
    ],
)
def test_tolerated_and_refused(format: str, text: str, expected: Any) -> None:
    assert summary(parse(format, [text])) == expected


@pytest.mark.parametrize(
    ("attributes", "value", "expected"),
    [
        ('string="true"', 'a "q" \\ \n é😀 <b>', 'a "q" \\ \n é😀 <b>'),
        ('string="true"', "1", "1"),
        ('string="false"', "1", 1),
        ('string="false"', ' {"x": [null]} ', {"x": [None]}),
        ('string="false"', "nonsense", "nonsense"),
        ('string="false"', "NaN", "NaN"),
        ('string="false"', "[" * 100_000, "[" * 100_000),
        ('string="false"', "1" * 10_000, "1" * 10_000),
        ("", "true", True),
        ("", "yes", "yes"),
    ],
)
def test_dsml_values_become_valid_json(attributes: str, value: str, expected: Any) -> None:
    text = f'{DB}<{D}invoke name="f"><{D}parameter name="p" {attributes}>{value}</{D}parameter></{D}invoke>{DE}'
    ((_, arguments),) = summary(parse("deepseekv32", [text]))[1]
    assert json.loads(arguments) == {"p": expected}


def test_dsml_keeps_the_first_of_parameters_of_one_name() -> None:
    pairs = (("a", 1), ("a", 2), ("b", 3))
    parameters = "".join(f'<{D}parameter name="{n}" string="false">{v}</{D}parameter>' for n, v in pairs)
    text = f'{DB}<{D}invoke name="f">{parameters}</{D}invoke>{DE}'
    assert summary(parse("deepseekv32", [text]))[1] == [("f", '{"a": 1, "b": 3}')]
