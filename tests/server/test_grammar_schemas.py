"""Schemas whose demands a grammar would pass over are refused, and what is not refused is enforced."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
import xgrammar
from pydantic import ValidationError

from dsengine.server.grammar.schemas import unenforced
from dsengine.server.protocol import ChatCompletionRequest
from dsengine.server.protocol_responses import ResponsesRequest, as_chat

INTEGER = {"type": "integer"}


def tagged(kind: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "items": INTEGER, "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"not": INTEGER}}}, "not at properties.a"),
        ({"allOf": [INTEGER, {"type": "number"}]}, "allOf with several members"),
        ({"oneOf": [INTEGER, {"type": "number"}]}, "oneOf whose members may overlap"),
        ({"oneOf": [tagged("a"), tagged("a")]}, "oneOf whose members may overlap"),
        ({"$defs": {"i": INTEGER}, "$ref": "#/$defs/i", "minimum": 5}, "minimum beside $ref"),
        ({"$ref": "http://127.0.0.1/schema"}, "a $ref that is no plain path"),
        ({"type": "integer", "enum": [1, "a"]}, "type beside enum"),
        ({"type": "integer", "const": True}, "type beside const"),
        ({"minimum": 5}, "minimum without type"),
        ({"type": "string", "pattern": "a+", "maxLength": 2}, "pattern beside minLength"),
        ({"type": "integer", "multipleOf": 3, "minimum": 0}, "multipleOf of other"),
        ({"type": "number", "multipleOf": 3}, "multipleOf of other"),
        ({"type": "object", "properties": {"a": INTEGER}, "required": ["b"]}, 'required with "b"'),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        (
            {"type": "object", "propertyNames": {"maxLength": 1}, "additionalProperties": INTEGER},
            "propertyNames beside",
        ),
        ({"type": "array", "items": {"anyOf": [{"if": True}]}}, "if at items.anyOf.0"),
    ],
)
def test_what_would_be_passed_over_is_named(schema: Any, words: str) -> None:
    assert words in (unenforced(schema) or "")


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"title": "T", "description": "not a demand", "default": {"not": 1}, "enum": [{"not": 1}], "x-if": 3},
        {"type": "object", "properties": {"not": INTEGER, "if": INTEGER}, "required": ["if"]},
        {"oneOf": [tagged("a"), tagged("b"), {"type": "null"}]},
        {"$defs": {"a": tagged("a"), "b": tagged("b")}, "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]},
        {"allOf": [INTEGER]},
        {"type": "array", "items": INTEGER, "uniqueItems": False, "minItems": 1},
        {"type": ["string", "null"], "enum": ["a", None]},
    ],
)
def test_what_is_enforced_is_allowed(schema: Any) -> None:
    assert unenforced(schema) is None


def test_deep_and_repetitive_schemas_take_no_time() -> None:
    deep: Any = {}
    for _ in range(900):
        deep = {"items": deep}
    assert unenforced(deep) is None
    wide = {"type": "object", "properties": {f"p{i}": {"const": i} for i in range(60)}, "required": ["p0"] * 5000}
    assert unenforced({"$defs": {"x": wide}, "oneOf": [{"$ref": "#/$defs/x"}] * 3000}) is not None


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}]} | fields)


def test_requests_are_refused_unless_they_are_lax() -> None:
    schema: dict[str, Any] = {"type": "array", "items": INTEGER, "uniqueItems": True}

    def response_format(**options: Any) -> Any:
        return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema} | options}

    def tools(**options: Any) -> list[Any]:
        parameters = {"type": "object", "properties": {"a": schema}}
        return [{"type": "function", "function": {"name": "f", "parameters": parameters} | options}]

    refused: list[dict[str, Any]] = [
        {"response_format": response_format()},
        {"response_format": response_format(strict=True)},
        {"guided_json": schema},
        {"tools": tools(strict=True)},
    ]
    for fields in refused:
        with pytest.raises(ValidationError, match="cannot be enforced: uniqueItems"):
            chat(**fields)
    chat(response_format=response_format(strict=False))
    chat(tools=tools())
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": False}}
    as_chat(ResponsesRequest.model_validate({"model": "m", "input": "x", "text": text}))


class _Texts:
    """Random schemas, and random texts that follow their grammars."""

    WORDS = (b'": ', b'"a"', b'"b"', b'{"', b'", "', b"12", b"true", b"null")

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._tokens = [*(bytes([byte]) for byte in range(32, 127)), *self.WORDS, b""]
        self._end = len(self._tokens) - 1
        info = xgrammar.TokenizerInfo(self._tokens, xgrammar.VocabType.RAW, stop_token_ids=[self._end])
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, schema: Any) -> Any:
        shape = {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 2}
        try:
            return self._compiler.compile_structural_tag(json.dumps({"type": "structural_tag", "format": shape}))
        except RuntimeError:
            return None  # it cannot be satisfied

    def text(self, grammar: Any) -> str | None:
        """A whole text; None if it becomes long."""
        matcher = xgrammar.GrammarMatcher(grammar)
        mask = xgrammar.allocate_token_bitmask(1, len(self._tokens))
        text = b""
        for _ in range(120):
            matcher.fill_next_token_bitmask(mask)
            allowed = [i for i in range(len(self._tokens)) if int(mask[0, i // 32]) >> (i % 32) & 1]
            closing = [i for i in allowed if self._tokens[i] in (b'"', b"}", b"]", b"")]
            token = self.random.choice(closing if closing and self.random.random() < 0.4 else allowed)
            if token == self._end:
                return text.decode()
            matcher.accept_token(token)
            text += self._tokens[token]
        return None

    def schema(self, depth: int) -> dict[str, Any]:
        pick = self.random.choice
        makers = [self._scalar] if depth == 0 else [self._scalar, self._array, self._object, self._object, self._head]
        schema = pick(makers)(depth - 1)
        if self.random.random() < 0.05:
            schema |= pick([{"minimum": 3}, {"type": "integer"}, {"required": ["a"]}, {"not": {"type": "null"}}])
        return schema

    def _some(self, **options: Any) -> dict[str, Any]:
        return {name: value for name, value in options.items() if self.random.random() < 0.3}

    def _scalar(self, depth: int) -> dict[str, Any]:
        pick = self.random.choice
        number = self._some(minimum=pick([-4, 1]), maximum=7, exclusiveMinimum=pick([-2, 3]), multipleOf=3)
        string = self._some(minLength=1, maxLength=pick([1, 2]), pattern=pick(["^[ab]+$", "a"]))
        fixed: dict[str, Any] = pick(
            [{"const": 1}, {"enum": [1, "a"]}, {"type": "boolean"}, {"type": ["null", "integer"], "minimum": 3}]
        )
        return pick([{"type": pick(["integer", "number"])} | number, {"type": "string"} | string, fixed])

    def _array(self, depth: int) -> dict[str, Any]:
        options = {"items": self.schema(depth), "prefixItems": [self.schema(depth)], "minItems": 1, "uniqueItems": True}
        return {"type": "array", "maxItems": 2} | self._some(**options)

    def _object(self, depth: int) -> dict[str, Any]:
        names = self.random.sample("abc", self.random.randint(0, 2))
        options = {
            "required": names[:1],
            "additionalProperties": self.random.choice([False, self.schema(depth)]),
            "maxProperties": 2,
            "minProperties": 1,
            "patternProperties": {"^a": self.schema(depth)},
            "propertyNames": {"enum": ["a", "b"]},
        }
        return {"type": "object", "properties": {name: self.schema(depth) for name in names}} | self._some(**options)

    def _head(self, depth: int) -> dict[str, Any]:
        members = [self.schema(depth), self.schema(depth)]
        return self.random.choice([{"anyOf": members}, {"oneOf": members}, {"allOf": members[:1]}, {"allOf": members}])


@pytest.mark.parametrize("seed", range(2))
def test_texts_of_allowed_schemas_are_valid(seed: int) -> None:
    texts = _Texts(seed)
    num_checked = 0
    while num_checked < 100:
        schema = texts.schema(3)
        if unenforced(schema) is not None or (grammar := texts.compile(schema)) is None:
            continue
        for _ in range(3):
            if (text := texts.text(grammar)) is not None:
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
                num_checked += 1
