"""Compiling grammars in a process that may be killed: what comes of shapes, mistakes and bombs."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import xgrammar
from server_helpers import CHECKPOINT_DIR

from dsengine.engine.messages import LoadGrammar
from dsengine.server.grammar.compiler import CompilerGone, GrammarCompiler, GrammarRefused
from dsengine.server.grammar.shapes import CallShapes, answer_shape, output_shape
from dsengine.server.grammar.vocabulary import vocabulary
from dsengine.server.protocol import ChatCompletionRequest
from dsengine.server.protocol_messages import Tool
from dsengine.server.tools.formats import PARSERS
from dsengine.tokenizer.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["city", "n"],
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}},
]
TB, TE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CB, CE, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(CHECKPOINT_DIR)


def run(work: Callable[[GrammarCompiler], Awaitable[Any]], **options: Any) -> Any:
    async def inside() -> Any:
        compiler = GrammarCompiler(vocabulary(tokenizer()), tokenizer().vocab_size + 8, **options)
        try:
            return await work(compiler)
        finally:
            await compiler.close()

    return asyncio.run(inside())


def compile_all(*shapes: Any, **options: Any) -> list[LoadGrammar | Exception]:
    async def work(compiler: GrammarCompiler) -> Any:
        await compiler.compile({"type": "const_string", "value": "warm"})
        return await asyncio.gather(*map(compiler.compile, shapes), return_exceptions=True)

    results: list[LoadGrammar | Exception] = run(work, **options)
    return results


@functools.cache
def info() -> Any:
    words = vocabulary(tokenizer())
    return xgrammar.TokenizerInfo(
        words.tokens,
        xgrammar.VocabType.RAW,
        vocab_size=tokenizer().vocab_size + 8,
        stop_token_ids=words.stop_token_ids,
    )


def accepts(grammar: LoadGrammar | Exception, text: str) -> bool:
    """Whether the tokens of a text, and then its end, follow the grammar."""
    assert isinstance(grammar, LoadGrammar), grammar
    matcher = xgrammar.GrammarMatcher(xgrammar.CompiledGrammar.deserialize_json(grammar.data, info()))
    ids = [*tokenizer().encode(text), min(tokenizer().eos_token_ids)]
    return all(matcher.accept_token(token) for token in ids)


def request_of(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}]} | fields)


def shape_of(**fields: Any) -> Any:
    request = request_of(**fields)
    return answer_shape(request, output_shape(request), "deepseekv31", tokenizer())


def json_schema(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def v31_call(name: str, arguments: str) -> str:
    return f"{CB}{name}{SEP}{arguments}{CE}"


F, G = v31_call("f", '{"city": "é", "n": 1}'), v31_call("g", "{}")
CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"response_format": {"type": "json_object"}}, ['{"a": [1]}', "{}"], ["[1]", "x", f'{{"a": "{TB}"}}', '{"a": 1']),
    ({"response_format": json_schema(SCHEMA)}, ['{"city": "x", "n": 3}'], ['{"city": "x"}', '{"city": 1, "n": 3}']),
    ({"regex": "[a-c]{2}"}, ["ab"], ["ad", "a"]),
    ({"ebnf": 'root ::= "yes" | "no"'}, ["yes", "no"], ["maybe"]),
    ({"guided_choice": ["red", "green"]}, ["red", "green"], ["blue", "redgreen"]),
    ({"guided_json": json.dumps(SCHEMA)}, ['{"city": "x", "n": 3}'], ["{}"]),
    ({"structured_outputs": {"json": SCHEMA}}, ['{"city": "x", "n": 3}'], ["{}"]),
    ({"structured_outputs": {"json_object": True}}, ["{}"], ["[1]"]),
    ({"structured_outputs": {"choice": ["red", "green"]}}, ["red"], ["blue"]),
    (
        {"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "ok"}}},
        ["ok"],
        ["no"],
    ),
    (
        {"tools": TOOLS, "tool_choice": "required"},
        [TB + F + TE, TB + G + F + TE],
        [TB + TE, "text", f"text {TB}{G}{TE}"],
    ),
    ({"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}, [TB + F + TE], [TB + G + G + TE]),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, [TB + G + TE], [TB + F + TE]),
    ({"tools": TOOLS, "response_format": json_schema(SCHEMA)}, ['{"city": "", "n": 0}', TB + G + TE], ["text"]),
]


def test_shapes_hold_what_was_asked_for() -> None:
    grammars = compile_all(*(shape_of(**fields) for fields, _, _ in CASES))
    for grammar, (fields, good, bad) in zip(grammars, CASES, strict=True):
        assert [text for text in good if not accepts(grammar, text)] == [], fields
        assert [text for text in bad if accepts(grammar, text)] == [], fields


def test_strict_tools_constrain_only_calls() -> None:
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]  # type: ignore[operator]
    (grammar,) = compile_all(shape_of(tools=strict))
    for text in ("text", "", f"text {TB}{F}{TE}", f"{TB}{F}{F}{TE}"):
        assert accepts(grammar, text), text
    for text in (f"{TB}{G}{TE}", f"{TB}{v31_call('f', '{}')}{TE}", f"{TB}{F}{TE} more"):
        assert not accepts(grammar, text), text
    assert shape_of(tools=TOOLS) is None


@pytest.mark.parametrize("tool_format", sorted(PARSERS))
def test_calls_of_every_format_can_be_parsed_back(tool_format: Any) -> None:
    """A grammar of the texts alone (no tokenizer has all formats' markers): a random walk is a call that parses."""
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    shape = CallShapes(tool_format, _NoTokens()).block(tools, several=True)  # type: ignore[arg-type]
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([bytes([i]) for i in range(256)], stop_token_ids=[0]))
    compiled = compiler.compile_structural_tag(json.dumps({"type": "structural_tag", "format": shape}))
    mark = PARSERS[tool_format]
    text = {
        "deepseekv3": f'{TB}{CB}function{SEP}f\n```json\n{{"city": "x", "n": 1}}\n```{CE}\n'
        f"{CB}function{SEP}g\n```json\n{{}}\n```{CE}{TE}",
        "deepseekv31": f'{TB}{CB}f{SEP}{{"city": "x", "n": 1}}{CE}{CB}g{SEP}{{}}{CE}{TE}',
        "deepseekv32": f'\n\n{mark.block_begin}\n{mark.call_begin} name="f">\n'
        '<｜DSML｜parameter name="city" string="true">x</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">1</｜DSML｜parameter>\n'
        f'</｜DSML｜invoke>\n{mark.call_begin} name="g">\n</｜DSML｜invoke>\n{mark.block_end}',
        "kimi_k2": f"{mark.block_begin}{mark.call_begin}functions.f:0<|tool_call_argument_begin|>"
        '{"city": "x", "n": 1}'
        f"<|tool_call_end|>{mark.call_begin}functions.g:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>{mark.block_end}",
    }[tool_format]
    matcher = xgrammar.GrammarMatcher(compiled)
    assert matcher.accept_string(text) and matcher.is_completed()
    parser = mark()
    parser.push(text)
    assert parser.num_calls == 2


class _NoTokens:
    def token_id(self, token: str) -> None:
        return None


MISTAKES = [
    {"type": "regex", "pattern": "(a"},
    {"type": "grammar", "grammar": "root ::= nowhere"},
    {"type": "json_schema", "json_schema": {"type": "colour"}},
    {"type": "json_schema", "json_schema": {"$ref": "#/nowhere"}},
    {"type": "nonsense"},
    {},
]


def test_mistakes_are_named_without_places() -> None:
    for shape, error in zip(MISTAKES, compile_all(*MISTAKES), strict=True):
        assert isinstance(error, GrammarRefused), shape
        assert str(error) and not re.search(r"\.cc|/project|0x[0-9a-f]{6}|\.py", str(error)), shape


def nested(depth: int) -> Any:
    schema: Any = {"type": "array"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_bombs_end_in_time_and_are_remembered() -> None:
    bombs = [
        {"type": "json_schema", "json_schema": nested(700)},
        {"type": "json_schema", "json_schema": {"enum": [f"value {i}" for i in range(30_000)]}},
        {"type": "json_schema", "json_schema": nested(900)},
    ]

    async def work(compiler: GrammarCompiler) -> None:
        await compiler.compile({"type": "const_string", "value": "warm"})
        for bomb in bombs:
            started = time.monotonic()
            with pytest.raises(GrammarRefused, match=r"complex|large"):
                await compiler.compile(bomb)
            assert time.monotonic() - started < 2.0
            started = time.monotonic()
            with pytest.raises(GrammarRefused):
                await compiler.compile(bomb)
            assert time.monotonic() - started < 0.2
        assert isinstance(await compiler.compile({"type": "regex", "pattern": "x"}), LoadGrammar)

    run(work, seconds=0.5)


def test_one_of_many_askers_may_leave() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        shape = {"type": "json_schema", "json_schema": SCHEMA}
        first, second = (asyncio.create_task(compiler.compile(shape)) for _ in range(2))
        await asyncio.sleep(0.1)
        first.cancel()
        assert isinstance(await second, LoadGrammar)
        assert await compiler.compile(shape) is second.result()

    run(work)


def test_a_worker_that_dies_is_replaced() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        await compiler.compile({"type": "regex", "pattern": "x"})
        process = compiler._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(compiler.compile({"type": "regex", "pattern": "y"}))
        await asyncio.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(CompilerGone):
            await waiting
        assert isinstance(await compiler.compile({"type": "regex", "pattern": "y"}), LoadGrammar)

    run(work)
