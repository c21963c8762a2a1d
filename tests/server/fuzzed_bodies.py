"""Bodies of every generating route with parts replaced, dropped or doubled: an answer or a 4xx in the route's shape."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import random
from typing import Any

import httpx
import pytest
from server_helpers import CHECKPOINT_DIR, MODEL, ScriptedEngine, client_of, make_app

from dsengine.tokenizer.tokenizer import Tokenizer

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
ROUTES = {
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
CASES_PER_ROUTE = 400


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(CHECKPOINT_DIR)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in items for place in places(item, (*path, key))]


def mutated(body: Any, rng: random.Random) -> Any:
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


def check(path: str, response: httpx.Response, body: Any) -> None:
    shown = json.dumps(body)[:2000]
    assert response.status_code in (200, 400, 404), (response.status_code, response.text, shown)
    if response.status_code == 200:
        return
    error = response.json()
    assert len(response.content) <= 4096 and isinstance(error["error"]["message"], str), shown
    if path.startswith("/v1/messages"):
        assert set(error) == {"type", "error"} and set(error["error"]) == {"type", "message"}, shown
    else:
        assert set(error) == {"error"} and set(error["error"]) == {"message", "type", "param", "code"}, shown


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_no_mutation_makes_a_route_fail(path: str) -> None:
    rng = random.Random(path)

    async def run() -> int:
        engine = ScriptedEngine(tokenizer(), "Well, <｜tool▁calls▁begin｜> no.")
        answered = 0
        async with client_of(make_app(engine)) as client:
            assert (await client.post(path, json=ROUTES[path])).status_code == 200
            for _ in range(CASES_PER_ROUTE):
                body = mutated(ROUTES[path], rng)
                response = await client.post(path, json=body)
                check(path, response, body)
                assert not engine.running
                answered += response.status_code == 200
        return answered

    assert asyncio.run(run()) > 10
