"""JSON in and out of the server: fast on the way out, strict on the way in.

Python's own parser accepts what no JSON document may contain (NaN, duplicate keys, UTF-16, lone surrogates) or should
(numbers of thousands of digits, nesting without end); each of these has crashed or confused a server of this kind.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import msgspec

MAX_DEPTH = 64


class InvalidJson(ValueError):
    """The bytes are not a JSON document that this server accepts; the message says why."""


def encode_json(value: Any) -> bytes:
    return msgspec.json.encode(value)


def decode_json(data: bytes) -> Any:
    """The value of a JSON document.

    Raises:
        InvalidJson: the document is malformed, or holds what this server refuses.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJson(f"The body is not valid UTF-8 (at byte {error.start}).") from error
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except InvalidJson:
        raise
    except json.JSONDecodeError as error:
        raise InvalidJson(f"The body is not valid JSON: {error.msg} (at character {error.pos}).") from error
    except RecursionError as error:
        raise InvalidJson(f"The body is nested deeper than {MAX_DEPTH} levels.") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise InvalidJson("The body contains a number with too many digits.") from error
    _check(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise InvalidJson("The body contains an object with a duplicate key.")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJson(f"The body contains {name}, which is not valid JSON.")


def _check(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise InvalidJson("The body contains a number that is too large.")
            elif isinstance(item, dict):
                deeper.extend(item)
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
        if not deeper:
            return
        level = deeper
    raise InvalidJson(f"The body is nested deeper than {MAX_DEPTH} levels.")


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidJson("The body contains a lone surrogate, which is not valid Unicode.") from error
