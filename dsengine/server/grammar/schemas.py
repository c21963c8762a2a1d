"""What a grammar would not hold an output to, although a JSON schema demands it.

The compiler passes over what no context-free grammar can say, and over some that one could. An output may then end well
and still break its schema, which nobody would notice in time; so such schemas are refused, by the name of the keyword.
Unknown keywords are annotations, as JSON Schema has it. A schema is a client's: no step here may take long or deep.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NUMBER = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_STRING = frozenset({"minLength", "maxLength", "pattern", "format"})
_ARRAY = frozenset({"items", "prefixItems", "minItems", "maxItems"})
_PROPERTIES = frozenset({"properties", "additionalProperties", "patternProperties"})
_OBJECT = _PROPERTIES | {"required", "propertyNames", "minProperties", "maxProperties"}
_HEADS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # the first of them is all that the compiler looks at
_NEVER = frozenset({"not", "if", "then", "else", "contains", "minContains", "maxContains", "additionalItems"}) | {
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
    *("$dynamicRef", "$recursiveRef"),
}
_ASSERTIONS = _NUMBER | _STRING | _ARRAY | _OBJECT | _NEVER | set(_HEADS)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}
_MAX_DISCRIMINATORS = 8
_MAX_CONSTANTS = 64
_MAX_REQUIRED = 64


def unenforced(schema: Any) -> str | None:
    """A demand of a JSON schema that its grammar does not make, in words; None if it makes them all."""
    level: list[tuple[str, Any]] = [("", schema)]
    while level:
        for where, item in level:
            if isinstance(item, dict) and (what := next(_own(item, schema), None)) is not None:
                return f"{what} at {where}" if where else what
        level = [(f"{where}.{name}" if where else name, m) for where, item in level for name, m in _members(item)]
    return None


def _members(schema: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(schema, dict):
        return
    for keyword in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(members := schema.get(keyword), dict):
            yield from ((f"{keyword}.{name}", member) for name, member in members.items())
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(members := schema.get(keyword), list):
            yield from ((f"{keyword}.{number}", member) for number, member in enumerate(members))
    yield from ((keyword, schema.get(keyword)) for keyword in ("items", "additionalProperties", "propertyNames"))


def _own(schema: dict[str, Any], root: Any) -> Iterator[str]:
    """What one schema demands in vain, its members left aside."""
    asserted = _ASSERTIONS.intersection(schema)
    yield from sorted(asserted & _NEVER)
    if schema.get("uniqueItems"):
        yield "uniqueItems"
    head = next((name for name in _HEADS if name in schema), None)
    if head is not None:
        yield from _of_head(schema, head, asserted - {head}, root)
    elif asserted and "type" not in schema and not _tells_type(asserted):
        yield f"{min(asserted)} without type"
    elif "pattern" in asserted and asserted & {"minLength", "maxLength", "format"}:
        yield "pattern beside minLength, maxLength or format"
    elif "format" in asserted and asserted & {"minLength", "maxLength"}:
        yield "format beside minLength or maxLength"
    elif "multipleOf" in asserted and (schema["type"] != "integer" or len(asserted & _NUMBER) > 1):
        yield "multipleOf of other than integers without bounds"
    elif "propertyNames" in asserted and asserted & _PROPERTIES:
        yield "propertyNames beside other demands on properties"
    else:
        yield from _of_object(schema)


def _tells_type(asserted: frozenset[str]) -> bool:
    return ("properties" in asserted and asserted <= _OBJECT) or ("items" in asserted and asserted <= _ARRAY)


def _of_head(schema: dict[str, Any], head: str, others: frozenset[str], root: Any) -> Iterator[str]:
    value = schema[head]
    if others:
        yield f"{min(others)} beside {head}"
    elif "type" in schema and (head not in ("const", "enum") or not _are_of_type(schema["type"], head, value)):
        yield f"type beside {head}"
    elif head == "$ref" and not (isinstance(value, str) and re.fullmatch(r"#(/[^~%]*)?", value)):
        yield "a $ref that is no plain path from the schema's top"
    elif head == "allOf" and isinstance(value, list) and len(value) > 1:
        yield "allOf with several members"
    elif head == "oneOf" and isinstance(value, list) and not _are_disjoint([_resolve(v, root) for v in value]):
        yield "oneOf whose members may overlap (anyOf's may)"


def _are_of_type(wanted: Any, head: str, value: Any) -> bool:
    names = [wanted] if isinstance(wanted, str) else wanted
    values = [value] if head == "const" else value
    if not isinstance(names, list) or not isinstance(values, list):
        return True  # the compiler says what is wrong with them
    types = tuple(kind for name in names if isinstance(name, str) for kind in _TYPES.get(name, ()))
    return all(isinstance(item, types) and (bool in types or not isinstance(item, bool)) for item in values)


def _of_object(schema: dict[str, Any]) -> Iterator[str]:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return  # the compiler says what is wrong with them
    undeclared = [name for name in required if isinstance(name, str) and name not in properties]
    if undeclared:
        yield f"required with {json.dumps(undeclared[0][:64])}, which properties lacks,"
    if properties and schema.get("patternProperties"):
        yield "patternProperties beside properties"
    least = schema.get("minProperties")
    if isinstance(least, int) and least > len(required):
        yield "minProperties above the number of required ones"  # one name may be written twice


def _resolve(schema: Any, root: Any) -> Any:
    if not isinstance(schema, dict) or not isinstance(reference := schema.get("$ref"), str):
        return schema
    found = root
    for part in reference.split("/")[1:]:
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _are_disjoint(members: Sequence[Any]) -> bool:
    """Whether no value satisfies two of the schemas, as far as their types and constant properties tell."""
    if all(isinstance(member, dict) for member in members):
        if _have_own_constants(members):
            return True
        groups: dict[str, list[dict[str, Any]]] = {}
        for member in members:
            name = member.get("type")
            groups.setdefault("number" if name == "integer" else name if isinstance(name, str) else "", []).append(
                member
            )
        return "" not in groups and all(len(group) == 1 or _are_told_apart(group) for group in groups.values())
    return False


def _are_told_apart(members: Sequence[dict[str, Any]]) -> bool:
    """Whether the objects have a required property whose constants tell which of the schemas they follow."""
    for name in _required(members[0])[:_MAX_DISCRIMINATORS]:
        if all(name in _required(m) for m in members) and _have_own_constants([m["properties"][name] for m in members]):
            return True
    return False


def _required(schema: dict[str, Any]) -> list[str]:
    required, properties = schema.get("required"), schema.get("properties")
    if schema.get("type") != "object" or not isinstance(required, list) or not isinstance(properties, dict):
        return []
    if len(required) > _MAX_REQUIRED:
        return []
    return [name for name in required if isinstance(name, str) and name in properties]


def _have_own_constants(schemas: Sequence[Any]) -> bool:
    """Whether every schema is of constants that no other has."""
    seen: set[tuple[bool, Any]] = set()
    for schema in schemas:
        values = _constants(schema)
        own = {(isinstance(value, bool), value) for value in values}
        if not own or own & seen:
            return False
        seen |= own
    return True


def _constants(schema: Any) -> list[str | int | float | None]:
    """The values that a schema of constants names; none if it is another, or has many values or composed ones."""
    if not isinstance(schema, dict):
        return []
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or len(values) > _MAX_CONSTANTS:
        return []
    return values if all(value is None or isinstance(value, str | int | float) for value in values) else []
