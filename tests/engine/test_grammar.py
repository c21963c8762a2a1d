"""Following a grammar: the masks of rows and of draft trees, from the token on behind which it begins."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence

import pytest
import torch

from dsengine.engine.grammar import GrammarError, GrammarState, GrammarStore, forbid
from dsengine.engine.messages import GRAMMAR_LEFT, GRAMMAR_TOO_SLOW
from dsengine.engine.request import Request
from dsengine.engine.sampling_params import SamplingParams

xgrammar = pytest.importorskip("xgrammar")

# One token per byte, then some longer ones; nothing may produce the last two but as the end of the text and its marker.
TOKENS = [bytes([i]) for i in range(256)] + [b'{"', b'":', b"true", b"12", b'"}', b"", b""]
EOS, END_THINK = len(TOKENS) - 2, len(TOKENS) - 1
VOCAB_SIZE = len(TOKENS) + 5
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def store() -> GrammarStore:
    found = GrammarStore(VOCAB_SIZE)
    found.load_vocabulary(TOKENS, [EOS])
    info = xgrammar.TokenizerInfo(TOKENS, xgrammar.VocabType.RAW, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS])
    compiler = xgrammar.GrammarCompiler(info)
    found.load("json", compiler.compile_json_schema(json.dumps(SCHEMA), any_whitespace=False).serialize_json())
    found.load("regex", compiler.compile_regex("[0-9]{3}(-[0-9]{2})?").serialize_json())
    return found


def request_of(state: GrammarState | None) -> Request:
    return Request("r", [1, 2, 3], SamplingParams(), grammar=state)


def allowed(requests: Sequence[Request], drafts: Sequence[Sequence[Sequence[int]]] | None = None) -> list[set[int]]:
    rows = len(requests) if drafts is None else sum(map(len, drafts))
    logits = torch.zeros(rows, VOCAB_SIZE)
    forbid(logits, requests, drafts)
    assert set(logits.unique().tolist()) <= {0.0, float("-inf")}
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits]


def walk(request: Request, rng: random.Random, steps: int = 400) -> bytes:
    """A random text that the grammar allows."""
    for _ in range(steps):
        (choices,) = allowed([request])
        token = rng.choice(sorted(choices))
        request.output_token_ids.append(token)
        if token == EOS:
            break
    return b"".join(TOKENS[token] for token in request.output_token_ids)


def test_whatever_is_drawn_is_valid(store: GrammarStore) -> None:
    for seed in range(30):
        value = json.loads(walk(request_of(store.start("json", None)), random.Random(seed)))
        assert isinstance(value["a"], int) and all(isinstance(item, bool) for item in value["b"])
        text = walk(request_of(store.start("regex", None)), random.Random(seed)).decode()
        assert re.fullmatch("[0-9]{3}(-[0-9]{2})?", text)


def test_rows_without_a_grammar_are_left_alone(store: GrammarStore) -> None:
    free, bound = request_of(None), request_of(store.start("regex", None))
    everything, digits, again = allowed([free, bound, free])
    assert everything == again == set(range(VOCAB_SIZE))
    assert digits == {*range(ord("0"), ord("9") + 1), TOKENS.index(b"12")}


def test_a_grammar_begins_behind_its_token(store: GrammarStore) -> None:
    request = request_of(store.start("regex", END_THINK))
    for token in (5, EOS, 7):
        request.output_token_ids.append(token)
        assert allowed([request]) == [set(range(VOCAB_SIZE))]
    request.output_token_ids.append(END_THINK)
    assert allowed([request]) == allowed([request_of(store.start("regex", None))])


@pytest.mark.parametrize("after", [None, END_THINK])
def test_every_node_of_a_tree_gets_the_mask_that_it_would_get_as_text(store: GrammarStore, after: int | None) -> None:
    rng = random.Random(1)
    for seed in range(12):
        request = request_of(store.start("json", after))
        if after is None:
            walk(request, random.Random(seed), steps=6)
        else:
            request.output_token_ids.extend([5, 7])
        before = list(request.output_token_ids)
        paths: list[list[int]] = [[]]
        for _ in range(9):
            parent = rng.choice(paths)
            begins = after is not None and END_THINK not in parent and rng.random() < 0.5
            possible = sorted(allowed([as_text(store, after, [*before, *parent])])[0] - {EOS, END_THINK})
            paths.append([*parent, END_THINK if begins else rng.choice(possible)])
        rows = allowed([request, request_of(None)], [paths, [[]]])
        for path, row in zip(paths, rows, strict=False):
            assert row == allowed([as_text(store, after, [*before, *path])])[0]
        assert rows[-1] == set(range(VOCAB_SIZE))
        assert allowed([request]) == rows[:1]  # nothing of the drafts is left


def as_text(store: GrammarStore, after: int | None, output: list[int]) -> Request:
    request = request_of(store.start("json", after))
    request.output_token_ids.extend(output)
    return request


def test_drafts_that_the_grammar_forbids_constrain_nothing(store: GrammarStore) -> None:
    request = request_of(store.start("regex", None))
    digit, letter = ord("1"), ord("x")
    rows = allowed([request], [[[], [digit], [letter], [letter, digit]]])
    assert rows[0] == rows[1] != set(range(VOCAB_SIZE)) and rows[2] == rows[3] == set(range(VOCAB_SIZE))


@pytest.mark.parametrize("token", [END_THINK, VOCAB_SIZE - 1, EOS])
def test_drafts_of_tokens_without_a_spelling_leave_no_line_in_the_log(
    store: GrammarStore, token: int, capfd: pytest.CaptureFixture[str]
) -> None:
    request = request_of(store.start("regex", None))
    assert allowed([request], [[[token]]]) == [set(range(VOCAB_SIZE))]
    assert capfd.readouterr().err == ""


def test_an_output_that_left_its_grammar_can_draw_nothing_more(store: GrammarStore) -> None:
    request = request_of(store.start("regex", None))
    request.output_token_ids.append(ord("x"))
    assert allowed([request]) == [set()]
    assert request.grammar is not None and request.grammar.error == GRAMMAR_LEFT


@pytest.mark.parametrize(
    "bomb",
    [
        'root ::= s\ns ::= s s | "a" | ""',
        'root ::= s "b"\ns ::= s s s | s s | "a" | "aa"',
        'root ::= x\nx ::= "a" x x | ""',
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1} | r{i + 1}\n" for i in range(12)) + 'r12 ::= "a" | ""',
    ],
)
def test_ambiguous_grammars_end_before_they_cost_others_much(store: GrammarStore, bomb: str) -> None:
    info = xgrammar.TokenizerInfo(TOKENS, xgrammar.VocabType.RAW, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS])
    store.load("bomb", xgrammar.GrammarCompiler(info).compile_grammar(bomb).serialize_json())
    state = store.start("bomb", None)
    request, innocent = request_of(state), request_of(store.start("regex", None))
    started = time.process_time()
    for _ in range(2000):
        mine, others = allowed([request, innocent])
        assert others == allowed([innocent])[0] and others
        if not mine:
            break
        request.output_token_ids.append(ord("a"))
    assert state.error == GRAMMAR_TOO_SLOW
    assert time.process_time() - started < 2.5


def test_after_the_end_nothing_is_asked_for(store: GrammarStore) -> None:
    request = request_of(store.start("regex", None))
    request.output_token_ids.extend([*b"123", EOS])
    assert allowed([request]) == [set(range(VOCAB_SIZE))]


def test_grammars_that_were_never_sent_are_refused(store: GrammarStore) -> None:
    with pytest.raises(GrammarError, match="'other'"):
        store.start("other", None)
    store.load("broken", "{}")
    with pytest.raises(GrammarError):
        store.start("broken", None)
    store.load("short", '{"no": "grammar"}')
    store.drop("short")
    store.drop("never there")
