"""Bodies of every generating route, and what becomes of them when parts, bytes or numbers are replaced."""

from __future__ import annotations

import copy
import functools
import json
import random
from typing import Any

from server_helpers import MODEL

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
PART = {"type": "text", "text": "hi"}
CHAT = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [PART]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "a", "content": "x"},
    ],
    "tools": [TOOL],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "stream": False,
    "max_tokens": 5,
    "thinking": {"type": "enabled"},
    "chat_template_kwargs": {"thinking": True},
    "logit_bias": {"5": 1.5},
    "stop": ["a"],
    "response_format": {"type": "text"},
    "prompt_logprobs": 1,
}
COMPLETE = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 3, "n": 2, "best_of": 2, "echo": True, "logprobs": 2}
MESSAGES = {
    "model": MODEL,
    "max_tokens": 5,
    "system": [PART],
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [PART, {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [PART]}, PART]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "disabled"},
    "stop_sequences": ["x"],
    "stream": True,
}
RESPONSES = {
    "model": MODEL,
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "x"},
    ],
    "instructions": "Be brief.",
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}],
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "low"},
    "max_output_tokens": 5,
    "stream": True,
}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETE,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": {k: MESSAGES[k] for k in ("model", "messages", "system", "tools")},
    "/v1/responses": RESPONSES,
}
ODD: list[Any] = [
    None, True, False, 0, -1, 1.0, 1.5, 2**31, 2**63, -(2**70), 1e300, "", "a", "none", "auto", "required", "text",
    "{", "\x00", "é😀", "x" * 300, [], [[]], [None], ["a"], [1], {}, {"type": "text"}, {"a": {}}, {"type": "function"},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in items for place in places(item, (*path, key))]


def mutated(body: Any, rng: random.Random) -> Any:
    """A copy of which up to three parts are replaced, dropped or doubled."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *path, last = rng.choice(places(body))
        parent = functools.reduce(lambda value, key: value[key], path, body)
        match rng.randrange(5):
            case 0:
                del parent[last]
            case 1 if isinstance(parent, list):
                parent.insert(last, copy.deepcopy(parent[last]))
            case 1:
                parent[rng.choice(("extra", "type", "name", "content", "id"))] = copy.deepcopy(rng.choice(ODD))
            case _:
                parent[last] = copy.deepcopy(rng.choice(ODD))
        if not body:
            return body
    return body


NUMBERS = (
    "-0", "0.0", "1e0", "1E400", "-1e400", "1e-400", "9007199254740993", "18446744073709551616", "1" * 5000, "00", "+1",
    "0x10", "NaN", "Infinity", "-Infinity", ".5", "5.", "1_000", "true", "null", '"1"',
)  # fmt: skip
BAD_BYTES = (
    b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\xef\xbb\xbf", b"\x00", b"\x1b[31m",
    b"\\ud800", b"\\udc00\\ud800", b"\\u0000", b"\xe2\x80\xa8", b"\r\n",
)  # fmt: skip


def mangled(body: Any, rng: random.Random) -> bytes:
    """The bytes of a body, of which something is no longer JSON, UTF-8, a sane number or a sane depth."""
    data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode()
    at = rng.randrange(len(data) + 1)
    match rng.randrange(9):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:
            end = rng.randrange(at, len(data) + 1)
            return data[:end] + data[at:]
        case 3:
            return data[:at] + data[rng.randrange(at, len(data) + 1) :]
        case 4:
            return data[:at] + rng.choice(BAD_BYTES) + data[at:]
        case 5:
            return _with_number(data, rng)
        case 6:
            return _nested(body, rng)
        case 7:
            return json.dumps(body).encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-7", "cp037")))
        case _:
            key = rng.choice(list(body))
            return data[:-1] + b", " + json.dumps(key).encode() + b": " + rng.choice((b"1}", b"{}}", b'"a"}'))


def _with_number(data: bytes, rng: random.Random) -> bytes:
    digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    if not digits:
        return data + rng.choice(NUMBERS).encode()
    at = rng.choice(digits)
    return data[:at] + rng.choice(NUMBERS).encode() + data[at + 1 :]


def _nested(body: Any, rng: random.Random) -> bytes:
    depth = rng.choice((10, 62, 63, 64, 65, 66, 500, 5000))
    deep = b"[" * depth + b"]" * depth if rng.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
    marked = copy.deepcopy(body)
    *path, last = rng.choice(places(marked))
    functools.reduce(lambda value, key: value[key], path, marked)[last] = "HERE"
    return json.dumps(marked).encode().replace(b'"HERE"', deep)
