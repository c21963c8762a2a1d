"""Schemas, regular expressions and grammars of a few kilobytes that keep a compiler busy, or try to."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

Format = dict[str, Any]


def bombs(rng: random.Random, count: int) -> Iterator[Format]:
    """`response_format`s, no two alike."""
    seen: set[str] = set()
    makers = [*_SCHEMAS, *_PATTERNS, *_GRAMMARS, *_TAGS]
    while len(seen) < count:
        bomb = makers[len(seen) % len(makers)](rng)
        if repr(bomb) not in seen:
            seen.add(repr(bomb))
            yield bomb


def _schema(schema: Any) -> Format:
    return {"type": "json_schema", "json_schema": {"name": "bomb", "schema": schema, "strict": False}}


def _nested(depth: int, wrap: Callable[[Any], Any], inner: Any) -> Any:
    for _ in range(depth):
        inner = wrap(inner)
    return inner


def _string(rng: random.Random) -> Any:
    return {"type": "string", "maxLength": rng.randrange(10**9)}


def _doubling(count: int) -> str:
    return "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(count)), f'r{count} ::= "a"'])


def _parentheses(depth: int) -> str:
    return "root ::= " + "(" * depth + '"a"' + ")" * depth


_SCHEMAS: list[Callable[[random.Random], Format]] = [
    lambda r: _schema(_nested(r.randrange(5, 58), lambda s: {"type": "array", "items": s}, _string(r))),
    lambda r: _schema(_nested(r.randrange(5, 28), lambda s: {"type": "object", "properties": {"a": s}}, _string(r))),
    lambda r: _schema(_nested(r.randrange(3, 9), lambda s: {"anyOf": [s, s]}, _string(r))),
    lambda r: _schema({"enum": [f"{i:05}{r.random()}" for i in range(r.randrange(100, 1200))]}),
    lambda r: _schema({"type": "object", "additionalProperties": False, "properties": {
        f"p{i}_{r.randrange(10**6)}": {"type": "integer"} for i in range(r.randrange(50, 600))}}),
    lambda r: _schema({"type": "array", "items": {"type": "integer"}, "minItems": r.randrange(10**3, 10**9)}),
    lambda r: _schema({"type": "array", "items": {}, "maxItems": r.randrange(10**3, 10**9)}),
    lambda r: _schema({"type": "string", "minLength": r.randrange(10**3, 10**9)}),
    lambda r: _schema({"type": "integer", "minimum": -r.randrange(10**15), "maximum": r.randrange(10**15)}),
    lambda r: _schema({"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": r.randrange(999)}},
                       "$ref": "#/$defs/n"}),
    lambda r: _schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a",
                       "title": str(r.random())}),
    lambda r: _schema({"allOf": [{"properties": {f"a{i}": _string(r)}} for i in range(r.randrange(2, 60))]}),
    lambda r: _schema({"type": "object", "patternProperties": {"^(a+)+" * r.randrange(1, 60): _string(r)}}),
    lambda r: _schema({"type": "string", "pattern": f"^(a|aa){{{r.randrange(10, 3000)}}}$"}),
    lambda r: _schema({"type": "object", "required": [f"k{i}" for i in range(r.randrange(5, 400))],
                       "additionalProperties": _string(r)}),
    lambda r: _schema({"const": "c" * r.randrange(1000, 60_000)}),
]  # fmt: skip

_PATTERNS: list[Callable[[random.Random], Format]] = [
    lambda r, p=pattern: {"type": "regex", "pattern": p(r)}  # type: ignore[misc]
    for pattern in (
        lambda r: f"(a{{{r.randrange(1, 1000)}}}){{{r.randrange(1, 1000)}}}",
        lambda r: f"(((x+x+)+y){{1,{r.randrange(2, 99)}}})+" * r.randrange(1, 20),
        lambda r: f"(.*a){{{r.randrange(5, 500)}}}",
        lambda r: f"(a|b)*a(a|b){{{r.randrange(8, 400)}}}",
        lambda r: f"[a-z]{{0,{r.randrange(1000, 10**9)}}}",
        lambda r: "(" * r.randrange(10, 4000) + "a" + ")" * r.randrange(10, 4000),
        lambda r: "|".join(f"w{r.randrange(10**8)}" for _ in range(r.randrange(50, 800))),
        lambda r: f"(a?){{{r.randrange(20, 2000)}}}a{{{r.randrange(20, 2000)}}}",
        lambda r: f"(?=.*{r.randrange(10**9)})\\1(?<n>a)" * r.randrange(1, 9),
        lambda r: "[" + "".join(chr(r.randrange(0x4E00, 0x9FFF)) for _ in range(r.randrange(10, 900))) + "]+",
        lambda r: "\\p{L}" * r.randrange(2, 300),
        lambda r: "(" + "|".join("ab"[i % 2] * i for i in range(r.randrange(10, 100))) + "){9,99}",
    )
]

_GRAMMARS: list[Callable[[random.Random], Format]] = [
    lambda r, g=grammar: {"type": "grammar", "grammar": g(r)}  # type: ignore[misc]
    for grammar in (
        lambda r: f'root ::= root root | "{r.randrange(10**6)}"',
        lambda r: f'root ::= a*\na ::= b*\nb ::= root* | "{r.randrange(10**6)}"',
        lambda r: _doubling(r.randrange(5, 900)),
        lambda r: _parentheses(r.randrange(50, 30_000)),
        lambda r: f"root ::= [a-z]{{{r.randrange(100, 10**6)}}}",
        lambda r: "root ::= " + " | ".join(f'"x{r.randrange(10**9)}"' for _ in range(r.randrange(50, 2500))),
        lambda r: f'root ::= ("a"? ){{{r.randrange(10, 3000)}}}',
        lambda r: f"start ::= nothing{r.randrange(10**6)}",
        lambda r: 'root ::= "' + "a" * r.randrange(1000, 60_000),
        lambda r: 'root ::= ((("a"*)*)*)*' + ' "b"' * r.randrange(1, 2000),
    )
]  # fmt: skip

_TAGS: list[Callable[[random.Random], Format]] = [
    lambda r, t=tag: {"type": "structural_tag", "format": t(r)}  # type: ignore[misc]
    for tag in (
        lambda r: _nested(r.randrange(5, 28), lambda t: {"type": "sequence", "elements": [t, t] if r.random() < 0.3
                                                         else [t]}, {"type": "any_text"}),
        lambda r: _nested(r.randrange(5, 28), lambda t: {"type": "star", "content": t},
                          {"type": "const_string", "value": str(r.random())}),
        lambda r: {"type": "or", "elements": [{"type": "const_string", "value": str(r.random())}
                                              for _ in range(r.randrange(10, 900))]},
        lambda r: {"type": f"unknown{r.randrange(10**6)}"},
        lambda r: {"type": "tag", "begin": "<a>",
                   "content": {"type": "regex", "pattern": f"(a+){{{r.randrange(999)}}}"}, "end": "</a>" * 9},
    )
]  # fmt: skip
