"""OpenAI's own OpenAPI document: the schemas of its requests and answers, and requests that they allow."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

MAX_DEPTH = 6
# Where a schema says only "string", these reach more of a server than random characters do.
TEXTS = ("", "a", "hi", "auto", "none", "required", "text", "é😀", "\x00", "x" * 300, "gpt-4o", "user")


class OpenAIDocument:
    """The document, with what is left in it of OpenAPI 3.0 rewritten for JSON Schema."""

    def __init__(self, path: Path) -> None:
        document = json.loads(path.read_text("utf-8"))
        self._paths = document["paths"]
        self._schemas = {name: _without_nullable(s) for name, s in document["components"]["schemas"].items()}

    def validator(self, name: str) -> Draft202012Validator:
        """Validates against a schema of the document."""
        return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": self._schemas}})

    def answer(self, method: str, path: str, content_type: str = "application/json") -> Draft202012Validator:
        """Validates what the document says about a successful answer."""
        return self.validator(_name(self._paths[path][method]["responses"]["200"]["content"][content_type]["schema"]))

    def request(self, path: str, rng: random.Random, required: dict[str, Any]) -> dict[str, Any]:
        """A body as the document allows it, of some optional fields; `required` replaces what it says about those."""
        schema = self._paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        fields = self._fields(schema)
        chosen = rng.sample(sorted(set(fields) - set(required)), rng.randrange(0, 4))
        body = dict(required)
        for name in chosen:
            body[name] = self._value(fields[name], rng, 0)
        if rng.random() < 0.3:
            replaced = rng.choice(sorted(required))
            if replaced in fields and replaced != "model":
                body[replaced] = self._value(fields[replaced], rng, 0)
        return body

    def _resolve(self, schema: Any) -> Any:
        while isinstance(schema, dict) and "$ref" in schema:
            schema = self._schemas[_name(schema)]
        return schema

    def _fields(self, schema: Any) -> dict[str, Any]:
        schema = self._resolve(schema)
        fields: dict[str, Any] = {}
        for part in schema.get("allOf", ()):
            fields |= self._fields(part)
        fields |= schema.get("properties", {})
        return fields

    def _value(self, schema: Any, rng: random.Random, depth: int) -> Any:
        schema = self._resolve(schema)
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return rng.choice((None, "a", 1))
        for name in ("anyOf", "oneOf"):
            if name in schema:
                return self._value(rng.choice(schema[name]), rng, depth + 1)
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        fields = self._fields(schema)
        kind = schema.get("type", "object" if fields else None)
        if isinstance(kind, list):
            kind = rng.choice(kind)
        return self._of_type(kind, schema, fields, rng, depth)

    def _of_type(self, kind: str | None, schema: Any, fields: dict[str, Any], rng: random.Random, depth: int) -> Any:
        match kind:
            case "object":
                wanted = set(schema.get("required", ()))
                names = [name for name in fields if name in wanted or rng.random() < 0.3]
                return {name: self._value(fields[name], rng, depth + 1) for name in names}
            case "array":
                least = schema.get("minItems", 0)
                count = rng.randrange(least, least + 3)
                return [self._value(schema.get("items", {}), rng, depth + 1) for _ in range(count)]
            case "integer":
                return rng.randint(*_bounds(schema))
            case "number":
                return rng.uniform(*_bounds(schema))
            case "boolean":
                return rng.random() < 0.5
            case "null":
                return None
        return rng.choice(TEXTS)


def _bounds(schema: dict[str, Any]) -> tuple[int, int]:
    low = int(schema.get("minimum", -3))
    return low, max(low, int(schema.get("maximum", low + 100)))


def _name(schema: dict[str, Any]) -> str:
    return str(schema["$ref"]).rsplit("/", 1)[1]


def _without_nullable(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nullable(item) for item in value]
    if not isinstance(value, dict):
        return value
    plain = {name: _without_nullable(item) for name, item in value.items() if name != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if value.get("nullable") is True else plain
