"""Constrained output end to end: the real client, a real server, with and without draft trees; always valid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel
from server_process import DEMO_MODEL, ServerProcess, running_server

TREES = ("--speculative-algorithm", "NEXTN", "--speculative-eagle-topk", "2")
ASK: dict[str, Any] = {"model": DEMO_MODEL, "max_tokens": 300}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "save_person", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.fixture(scope="module", params=[(), TREES], ids=["plain", "trees"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("server"), "--max-total-tokens", "16384", *request.param) as process:
        yield process


@pytest.fixture()
def client(server: ServerProcess) -> OpenAI:
    return server.openai()


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def check_person(value: Any) -> None:
    assert set(value) == set(SCHEMA["required"])
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert isinstance(value["age"], int) and 0 <= value["age"] <= 150
    assert 1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "b"}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_followed_behind_the_reasoning(client: OpenAI, thinking: bool, temperature: float) -> None:
    for seed in range(2):
        answer = client.chat.completions.create(
            messages=[user("Extract JSON: Anna is 31 years old.")],
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
            temperature=temperature,
            seed=seed,
            extra_body={"chat_template_kwargs": {"thinking": thinking}},
            **ASK,
        ).choices[0]
        reasoning = getattr(answer.message, "reasoning_content", None)
        if answer.finish_reason == "length":
            assert reasoning and not answer.message.content
            continue
        assert answer.finish_reason == "stop" and answer.message.content
        check_person(json.loads(answer.message.content))
        assert bool(reasoning) is thinking


def test_streamed_and_whole_are_the_same_text(client: OpenAI) -> None:
    asked: dict[str, Any] = ASK | {
        "messages": [user("Tell me about Anna.")],
        "response_format": {"type": "json_object"},
        "temperature": 0,
        "max_tokens": 40,
        "extra_body": {"chat_template_kwargs": {"thinking": False}},
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    parts = client.chat.completions.create(stream=True, **asked)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
    assert whole and whole.startswith("{")


def test_parse_gives_objects_back(client: OpenAI) -> None:
    class Light(BaseModel):
        room: Literal["kitchen", "hall"]
        on: bool

    answer = client.chat.completions.parse(
        messages=[user("Turn on the light in the kitchen.")], response_format=Light, reasoning_effort="none", **ASK
    )
    assert isinstance(answer.choices[0].message.parsed, Light)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": "[0-9]{3}-[0-9]{4}"}, r"\d{3}-\d{4}"),
        ({"ebnf": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"guided_regex": "a{2,5}"}, "a{2,5}"),
    ],
)
def test_the_spellings_of_other_servers(client: OpenAI, fields: dict[str, Any], pattern: str) -> None:
    for seed in range(3):
        options: dict[str, Any] = ASK | {"temperature": 1.2, "seed": seed}
        chat = client.chat.completions.create(
            messages=[user("Hi")], extra_body=fields | {"thinking": {"type": "disabled"}}, **options
        )
        assert re.fullmatch(pattern, chat.choices[0].message.content or "")
        text = client.completions.create(prompt="Number:", n=2, extra_body=fields, **options)
        assert all(re.fullmatch(pattern, choice.text) for choice in text.choices)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", [False, True])
def test_required_and_named_calls(client: OpenAI, stream: bool, thinking: bool) -> None:
    named = {"type": "function", "function": {"name": "save_person"}}
    for seed, choice in enumerate(("required", named, named)):
        asked: dict[str, Any] = ASK | {
            "messages": [user("Hello there")],
            "tools": TOOLS,
            "tool_choice": choice,
            "temperature": 1.0,
            "seed": seed,
            "extra_body": {"thinking": {"type": "enabled" if thinking else "disabled"}},
        }
        if stream:
            with client.chat.completions.stream(**asked) as events:
                answer: Any = events.get_final_completion().choices[0]
        else:
            answer = client.chat.completions.create(**asked).choices[0]
        if answer.finish_reason == "length":
            continue
        assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
        for call in answer.message.tool_calls:
            if call.function.name == "save_person":
                check_person(json.loads(call.function.arguments))
            else:
                assert choice == "required" and json.loads(call.function.arguments) == {}


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_of_several_tools_some_are_allowed(client: OpenAI, mode: Literal["auto", "required"]) -> None:
    function = {"type": "function", "function": {"name": "stop"}}
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [function]}}
    text = "Save the person Anna, who is 31."
    for seed in range(2):
        asked: dict[str, Any] = ASK | {"temperature": 1.0, "seed": seed, "reasoning_effort": "none"}
        answer = client.chat.completions.create(messages=[user(text)], tools=TOOLS, tool_choice=choice, **asked)
        calls: Any = answer.choices[0].message.tool_calls or []
        assert {call.function.name for call in calls} <= {"stop"} and (calls or mode == "auto")
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    choice = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "stop"}]}
    response = client.responses.create(
        model=DEMO_MODEL, input=text, tools=tools, tool_choice=choice, temperature=0, max_output_tokens=300
    )
    names = {item.name for item in response.output if item.type == "function_call"}
    assert names == {"stop"} if mode == "required" else names <= {"stop"}
    assert response.tool_choice.model_dump() == choice


def test_strict_tools_under_auto(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["ROME"]}}, "required": ["city"]}
    function = {"name": "get_weather", "description": "Get the weather of a city", "parameters": schema}
    strict: Any = [{"type": "function", "function": function | {"strict": True}}]
    answer = client.chat.completions.create(messages=[user("What is the weather in Paris?")], tools=strict, **ASK)
    assert answer.choices[0].message.tool_calls
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {"city": "ROME"}
    small_talk = client.chat.completions.create(messages=[user("Hello")], tools=strict, temperature=0, **ASK)
    assert small_talk.choices[0].message.content and not small_talk.choices[0].message.tool_calls


def test_constrained_and_free_requests_share_a_batch(client: OpenAI) -> None:
    free: dict[str, Any] = {"prompt": "What is 3 + 4?", "model": DEMO_MODEL, "max_tokens": 24, "temperature": 0}
    alone = client.completions.create(**free).choices[0].text

    def ask(number: int) -> str:
        if number % 2:
            return str(client.completions.create(**free).choices[0].text)
        bound = client.completions.create(prompt="x", extra_body={"regex": "[a-f]{20}"}, seed=number, **ASK)
        return str(bound.choices[0].text)

    with ThreadPoolExecutor(12) as threads:
        texts = list(threads.map(ask, range(24)))
    assert set(texts[1::2]) == {alone}
    assert all(re.fullmatch("[a-f]{20}", text) for text in texts[::2])


def test_what_cannot_be_compiled_is_refused_and_others_go_on(client: OpenAI) -> None:
    for fields in ({"regex": "(a"}, {"ebnf": "root ::= nowhere"}, {"guided_json": {"type": "colour"}}):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(messages=[user("Hi")], extra_body=fields, **ASK)
        assert "cannot be constrained" in str(error.value)


def test_a_client_that_leaves_takes_its_constraint_along(server: ServerProcess) -> None:
    body = {"model": DEMO_MODEL, "prompt": "x", "max_tokens": 8000, "regex": "[a-z]{7000}", "temperature": 1}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", json=body, timeout=1.5)


def test_a_grammar_that_takes_too_long_to_follow_ends_alone(client: OpenAI) -> None:
    free: dict[str, Any] = {"prompt": "What is 3 + 4?", "model": DEMO_MODEL, "max_tokens": 24, "temperature": 0}
    alone = client.completions.create(**free).choices[0].text
    bomb = {"ebnf": 'root ::= s "b"\ns ::= s s s | s s | "a" | "aa"', "logit_bias": None}
    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(lambda: client.completions.create(**free).choices[0].text) for _ in range(3)]
        with pytest.raises(openai.BadRequestError, match="too ambiguous"):
            client.completions.create(prompt="a", extra_body=bomb, model=DEMO_MODEL, max_tokens=2000, temperature=0)
        assert {other.result() for other in others} == {alone}
