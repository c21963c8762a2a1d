"""Jumps over what a grammar leaves no choice about: the same output in fewer steps, whatever else is asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from simulated_device import SimulatedDevice
from tiny_engine import random_prompts, use_queue, write_tiny_checkpoint

from dsengine import LLM, SamplingParams
from dsengine.demo import CHECKPOINT_DIR
from dsengine.engine.grammar import GrammarStore
from dsengine.engine.jump_forward import LONGEST, JumpForward, Speller
from dsengine.engine.messages import AddRequest, GrammarUse, RequestUpdate
from dsengine.engine.request import Request, RequestStatus
from dsengine.server.grammar.vocabulary import vocabulary
from dsengine.specdec.shape import TreeShape
from dsengine.tokenizer.tokenizer import Tokenizer

xgrammar = pytest.importorskip("xgrammar")

SCHEMA = {
    "type": "object",
    "properties": {
        "favourite_colour": {"enum": ["red", "green", "blue"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "number_of_children": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["favourite_colour", "age", "number_of_children"],
    "additionalProperties": False,
}
MARKER = "<｜tool▁sep｜>"
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=90),
    SamplingParams(temperature=1.0, seed=5, max_tokens=90),
    SamplingParams(temperature=0.7, top_p=0.8, top_k=40, seed=6, max_tokens=90, logprobs=2),
    SamplingParams(temperature=0.3, seed=7, max_tokens=90, repetition_penalty=1.3, frequency_penalty=0.7),
    SamplingParams(temperature=0.0, max_tokens=11, logprobs=0, prompt_logprobs=1),
    SamplingParams(temperature=1.0, seed=8, max_tokens=90, stop_token_ids=(300, 301, 302, 303)),
]
TOKENIZER = Tokenizer.from_checkpoint(CHECKPOINT_DIR)


def compiled(vocab_size: int) -> dict[str, str]:
    words = vocabulary(TOKENIZER)
    info = xgrammar.TokenizerInfo(
        words.tokens, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=words.stop_token_ids
    )
    compiler = xgrammar.GrammarCompiler(info)
    fixed = {"type": "const_string", "value": '{"a": 1}'}
    marked = {"type": "sequence", "elements": [fixed, {"type": "token", "token": TOKENIZER.token_id(MARKER)}, fixed]}
    tag = json.dumps({"type": "structural_tag", "format": marked})
    return {
        "schema": compiler.compile_json_schema(json.dumps(SCHEMA), any_whitespace=False).serialize_json(),
        "marked": compiler.compile_structural_tag(tag).serialize_json(),
    }


def engine(checkpoint: Path, **options: Any) -> LLM:
    return LLM(str(checkpoint), progress=False, device="cpu", num_threads=1, **({"max_total_tokens": 4096} | options))


def run(llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> tuple[list[Any], int]:
    """What comes of each prompt, every other one bound by a grammar, and the steps that those took."""
    core, words = llm.core, vocabulary(TOKENIZER)
    core.grammars.load_vocabulary(words.tokens, words.stop_token_ids)
    for key, data in compiled(core.info.vocab_size).items():
        core.grammars.load(key, data)
    for i, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        grammar = None if i % 2 else GrammarUse("marked" if i % 4 else "schema")
        core.add_request(AddRequest(str(i), prompt, each, grammar=grammar), 0.0)
    seen: dict[str, list[RequestUpdate]] = {str(i): [] for i in range(len(prompts))}
    while core.has_work:
        for update in core.step(0.0).updates:
            seen[update.request_id].append(update)
        core.check_integrity()
    assert core.stats().num_blocks_in_use == 0
    answers = [
        (
            [token for update in updates for token in update.new_token_ids],
            [(score.token_id, score.rank, score.logprob, *score.top) for u in updates for score in u.logprobs],
            (updates[-1].finish_reason, updates[-1].stop_reason, updates[-1].error),
        )
        for updates in seen.values()
    ]
    num_steps = sum(len(seen[str(i)]) for i in range(0, len(prompts), 2))
    return answers, num_steps


def check_equal(answers: list[Any], expected: list[Any]) -> None:
    for (tokens, scores, end), (wanted_tokens, wanted_scores, wanted_end) in zip(answers, expected, strict=True):
        assert (tokens, end) == (wanted_tokens, wanted_end) and len(scores) == len(wanted_scores)
        for mine, others in zip(scores, wanted_scores, strict=True):
            assert mine[:2] == others[:2] and mine[2] == pytest.approx(others[2], abs=1e-4)
            assert [i for i, _ in mine[3:]] == [i for i, _ in others[3:]]
            assert [v for _, v in mine[3:]] == pytest.approx([v for _, v in others[3:]], abs=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def workload() -> tuple[list[list[int]], list[SamplingParams]]:
    return random_prompts(4 * len(PARAMS), seed=3, longest=40), [p for each in PARAMS for p in [each] * 4]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, workload: tuple[list[list[int]], list[SamplingParams]]) -> tuple[list[Any], int]:
    with engine(checkpoint, disable_jump_forward=True) as llm:
        assert llm.core.stats().num_jumped_tokens == 0
        return run(llm, *workload)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_total_tokens": 448, "block_size": 8},
        {"chunked_prefill_size": 24},
        {"speculative_algorithm": "NEXTN"},
        {"speculative_algorithm": "NEXTN", "speculative_eagle_topk": 3, "speculative_adaptive": False},
        {"speculative_algorithm": "NGRAM", "speculative_adaptive": False},
        {"speculative_algorithm": "NEXTN", "max_total_tokens": 448, "block_size": 8},
        pytest.param({"tp_size": 2}, marks=pytest.mark.slow),
        pytest.param({"tp_size": 2, "attn_dp_size": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "plain",
)
def test_the_output_is_the_same_in_fewer_steps(
    checkpoint: Path, workload: Any, expected: tuple[list[Any], int], options: dict[str, Any]
) -> None:
    with engine(checkpoint, **options) as llm:
        answers, num_steps = run(llm, *workload)
        check_equal(answers, expected[0])
        assert llm.core.stats().num_jumped_tokens > 30
        assert num_steps < 0.95 * expected[1]


def test_overlapped_steps_jump_too(checkpoint: Path, workload: Any, expected: tuple[list[Any], int]) -> None:
    device = SimulatedDevice()
    with use_queue(engine(checkpoint), checkpoint, device) as llm:
        assert llm.core.info.overlap_schedule
        answers, _ = run(llm, *workload)
        check_equal(answers, expected[0])
        assert llm.core.stats().num_jumped_tokens > 30
    device.close()


def test_whoever_is_bound_gets_what_the_grammar_leaves(expected: tuple[list[Any], int]) -> None:
    for number in (0, 2):
        tokens, _, (finish_reason, _, _) = expected[0][number]
        text = TOKENIZER.decode(tokens, skip_special_tokens=True)
        assert finish_reason == "stop"
        if number:
            assert text == f'{{"a": 1}}{MARKER}{{"a": 1}}'
        else:
            assert list(json.loads(text)) == SCHEMA["required"]


def test_proposals_are_what_must_come_and_leave_the_matcher_alone() -> None:
    words = vocabulary(TOKENIZER)
    store = GrammarStore(len(words.tokens))
    store.load_vocabulary(words.tokens, words.stop_token_ids)
    for key, data in compiled(len(words.tokens)).items():
        store.load(key, data)
    state = store.start("marked", None)
    whole = f'{{"a": 1}}{MARKER}{{"a": 1}}'
    proposal = state.propose([], LONGEST)
    assert TOKENIZER.decode(proposal, skip_special_tokens=True) == whole
    assert proposal[-1] in TOKENIZER.eos_token_ids, "the end is all that is left"
    assert state.propose([], LONGEST) == proposal and state.propose([], 3) == proposal[:3]
    assert state.propose(proposal[:5], LONGEST) == proposal[5:]
    assert state.propose(proposal, LONGEST) == ()
    behind = store.start("schema", 77)
    assert behind.propose([5, 6], LONGEST) == () and behind.propose([5, 6, 77], LONGEST)


@pytest.mark.parametrize(("has_graphs", "length", "chain"), [(False, 1, 1), (True, 3, None), (True, 9, 9)])
def test_beside_captured_steps_short_chains_are_not_worth_it(has_graphs: bool, length: int, chain: int | None) -> None:
    jumps = JumpForward(64, has_graphs=has_graphs)
    state = SimpleNamespace(propose=lambda output, limit: tuple(range(length)))
    jumps.look([Request("r", [1], SamplingParams(), grammar=state)])  # type: ignore[arg-type]
    shape = jumps.chains()
    assert shape == (None if chain is None else TreeShape(chain, 1, chain + 1))


def test_proposals_grow_and_shrink_with_what_is_followed() -> None:
    jumps, limits = JumpForward(64), list[int]()

    def propose(output: Sequence[int], limit: int) -> tuple[int, ...]:
        limits.append(limit)
        return tuple(range(limit))

    request = Request("r", [1], SamplingParams(), grammar=SimpleNamespace(propose=propose))  # type: ignore[arg-type]
    for accepted in (1.0, 1.0, 0.25, 0.0, 1.0):
        jumps.look([request])
        shape = jumps.chains()
        assert shape is not None
        jumps.enter(request, shape, int(accepted * shape.max_depth))
    assert limits == [8, 16, LONGEST, LONGEST // 4 + 2, 2]
    request.status = RequestStatus.FINISHED
    assert jumps.chains() is None


def test_texts_are_spelled_as_the_tokenizer_does() -> None:
    speller = Speller(vocabulary(TOKENIZER).tokens)
    rng = random.Random(0)
    words = ["favourite", "colour", "temperature", "x", "max_tokens", "Łódź", "is", "in"]
    for _ in range(60):
        text = '", "' + "_".join(rng.choices(words, k=rng.randrange(1, 3))) + '": '
        assert b"".join(TOKENIZER.token_bytes(token) for token in speller.spell(text)) == text.encode()
    for word in ("favourite", "colour", "is", "in", "Łódź", "number", "children"):
        assert list(speller.spell(word)) == TOKENIZER.encode(word, add_special_tokens=False)
    assert Speller([b"a", b"b", b"ab"]).spell("abc") == ()
