"""How clients say what the output must look like: OpenAI's `response_format`, and the spellings of other servers."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dsengine.server.grammar.schemas import unenforced
from dsengine.server.protocol_base import Strict, contradiction

MAX_REGEX_CHARS = 8 * 1024
MAX_GRAMMAR_CHARS = 64 * 1024
MAX_SCHEMA_CHARS = 64 * 1024
MAX_CHOICES = 1000
MAX_CHOICE_CHARS = 1024
MAX_ENUM = 1000
MAX_PROPERTIES = 500

Regex = Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARS)]
Grammar = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
Choice = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARS)]
Choices = Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]

# What is asked for, in one word, and the schema, pattern, grammar … that goes with it.
OutputFormat = tuple[Literal["text", "json", "regex", "grammar", "choice", "tag"], Any]


class NamedSchema(Strict):
    """`response_format.json_schema` of chat completions."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar", "structural_tag"]
    json_schema: NamedSchema | None = None
    pattern: Regex | None = None
    grammar: Grammar | None = None
    format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        needed = {"json_schema": "json_schema", "regex": "pattern", "grammar": "grammar", "structural_tag": "format"}
        for name in needed.values():
            given, wanted = getattr(self, name) is not None, needed.get(self.type) == name
            if wanted and not given:
                raise contradiction(f"a response_format of type {self.type} needs {name}", name)
            if given and not wanted:
                raise contradiction(f"a response_format of type {self.type} has no {name}", name)
        if self.json_schema is not None and self.json_schema.schema_ is None:
            raise contradiction("json_schema needs a schema", "json_schema.schema")
        return self

    @property
    def output_format(self) -> OutputFormat:
        match self.type:
            case "text":
                return "text", None
            case "json_object":
                return "json", {"type": "object"}
            case "json_schema":
                assert self.json_schema is not None
                return "json", self.json_schema.schema_
            case "regex":
                return "regex", self.pattern
            case "grammar":
                return "grammar", self.grammar
        return "tag", self.format


class StructuredOutputs(Strict):
    """vLLM's name for all of them, one of which is to be given."""

    json_: dict[str, Any] | Annotated[str, Field(max_length=MAX_SCHEMA_CHARS)] | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: Regex | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None


class OutputOptions(Strict):
    """At most one of them; `regex` and `ebnf` are SGLang's, `structured_outputs` and `guided_…` are vLLM's."""

    response_format: ResponseFormat | None = None
    regex: Regex | None = None
    ebnf: Grammar | None = None
    guided_json: dict[str, Any] | Annotated[str, Field(max_length=MAX_SCHEMA_CHARS)] | None = None
    guided_regex: Regex | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def output_format(self) -> OutputFormat:
        """What is asked for; any text if nothing is."""
        return next(iter(self._formats().values()), ("text", None))

    def _formats(self) -> dict[str, OutputFormat]:
        found: dict[str, OutputFormat] = {}
        if self.response_format is not None and self.response_format.type != "text":
            found["response_format"] = self.response_format.output_format
        structured = self.structured_outputs or StructuredOutputs.model_construct()
        others: dict[str, OutputFormat] = {
            "regex": ("regex", self.regex),
            "ebnf": ("grammar", self.ebnf),
            "guided_json": ("json", _read(self.guided_json)),
            "guided_regex": ("regex", self.guided_regex),
            "guided_choice": ("choice", self.guided_choice),
            "guided_grammar": ("grammar", self.guided_grammar),
            "structured_outputs.json": ("json", _read(structured.json_)),
            "structured_outputs.json_object": ("json", {"type": "object"} if structured.json_object else None),
            "structured_outputs.regex": ("regex", structured.regex),
            "structured_outputs.choice": ("choice", structured.choice),
            "structured_outputs.grammar": ("grammar", structured.grammar),
        }
        return found | {name: value for name, value in others.items() if value[1] is not None}

    @model_validator(mode="after")
    def _check_formats(self) -> Self:
        if isinstance(self.guided_json, str) and not _is_json_object(self.guided_json):
            raise contradiction("guided_json is no JSON object", "guided_json")
        structured = self.structured_outputs
        if structured is not None and isinstance(structured.json_, str) and not _is_json_object(structured.json_):
            raise contradiction("structured_outputs.json is no JSON object", "structured_outputs.json")
        formats = self._formats()
        if structured is not None and not any(name.startswith("structured_outputs.") for name in formats):
            raise contradiction("structured_outputs names no structure", "structured_outputs")
        if len(formats) > 1:
            raise contradiction(f"{' and '.join(formats)} exclude each other")
        for name, (kind, value) in formats.items():
            if kind in ("json", "tag"):
                check_schema(value, name)
            if kind == "json" and not self._is_lax:
                check_enforced(value, name)
        return self

    @property
    def _is_lax(self) -> bool:
        named = None if self.response_format is None else self.response_format.json_schema
        return named is not None and named.strict is False


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Refuse what is known to keep grammar compilers busy, before one sees it.

    Raises:
        PydanticCustomError: the schema is too long, or an enumeration or object in it has too many members.
    """
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
        raise contradiction(f"the schema is longer than {MAX_SCHEMA_CHARS} characters", param)
    level: list[Any] = [schema]
    while level:
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for name, limit in (("enum", MAX_ENUM), ("properties", MAX_PROPERTIES)):
                    if isinstance(item.get(name), (list, dict)) and len(item[name]) > limit:
                        raise contradiction(
                            f"the schema has {len(item[name])} members of {name}; {limit} may be", param
                        )
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
        level = deeper


def check_enforced(schema: dict[str, Any], param: str) -> None:
    """Refuse a schema that an output might break although it was constrained to it.

    Raises:
        PydanticCustomError: it names what the grammar would pass over.
    """
    if (what := unenforced(schema)) is not None:
        raise contradiction(
            f"the schema demands what cannot be enforced: {what}; strict: false passes over that", param
        )


def _read(schema: dict[str, Any] | str | None) -> Any:
    return json.loads(schema) if isinstance(schema, str) else schema


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
