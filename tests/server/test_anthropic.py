"""Anthropic's Messages API: shapes against a scripted engine, and its own client against a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from server_helpers import MODEL, ScriptedEngine, client_of, make_app
from server_process import DEMO_MODEL, ServerProcess, running_server
from test_answers import tokenizer

TB, TE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CB, CE, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
SCRIPT = f'I think.</think>Let me see.\n{TB}{CB}get_time{SEP}{{"city": "Łódź"}}{CE}{CB}get_time{SEP}{{}}{CE}{TE}'
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS = [{"name": "get_time", "description": "Local time", "input_schema": {"type": "object", "properties": {}}}]
THINK = {"type": "enabled", "budget_tokens": 1024}


def ask(engine: ScriptedEngine, path: str = "/v1/messages", status: int = 200, **body: Any) -> Any:
    """The answer, or the (name, body) pairs of a stream's events."""

    async def send() -> Any:
        async with client_of(make_app(engine)) as client:
            response = await client.post(path, json={"model": MODEL, "max_tokens": 200, "messages": HELLO} | body)
        assert response.status_code == status, response.text
        if not body.get("stream"):
            return response.json()
        parts = [event.split("\n") for event in response.text.split("\n\n")]
        assert parts.pop() == [""]
        return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]

    return asyncio.run(send())


def engine_of(script: str = SCRIPT) -> ScriptedEngine:
    return ScriptedEngine(tokenizer(), script)


def test_answer_in_full() -> None:
    answer = ask(engine_of(), tools=TOOLS, thinking=THINK)
    assert [block.pop("id")[:5] for block in answer["content"] if block["type"] == "tool_use"] == ["call_"] * 2
    assert answer["content"] == [
        {"type": "thinking", "thinking": "I think.", "signature": ""},
        {"type": "text", "text": "Let me see.", "citations": None},
        {"type": "tool_use", "name": "get_time", "input": {"city": "Łódź"}},
        {"type": "tool_use", "name": "get_time", "input": {}},
    ]
    assert answer["type"] == "message" and answer["role"] == "assistant" and answer["id"].startswith("msg")
    assert answer["stop_reason"] == "tool_use" and answer["stop_sequence"] is None
    assert answer["usage"]["cache_read_input_tokens"] == 3 and answer["usage"]["output_tokens"] > 10


def test_the_stream_adds_up_to_the_answer() -> None:
    whole = ask(engine_of(), tools=TOOLS, thinking=THINK)
    events = ask(engine_of(), tools=TOOLS, thinking=THINK, stream=True)
    assert all(name == body["type"] for name, body in events)
    assert [events[0][0], *(name for name, _ in events[-2:])] == ["message_start", "message_delta", "message_stop"]
    blocks: list[Any] = []
    is_open = False
    for name, body in events[1:-2]:
        if name == "content_block_start":
            assert not is_open and body["index"] == len(blocks)
            blocks.append(body["content_block"] | {"partial": ""})
        elif name == "content_block_delta":
            assert is_open and body["index"] == len(blocks) - 1
            delta = dict(body["delta"])
            blocks[-1]["partial"] += next(value for key, value in delta.items() if key != "type")
        is_open = name != "content_block_stop"
    for block, expected in zip(blocks, whole["content"], strict=True):
        field = {"thinking": "thinking", "text": "text", "tool_use": "input"}[block["type"]]
        value = block["partial"] if field != "input" else json.loads(block["partial"])
        assert value == expected[field] and block["type"] == expected["type"]
    assert events[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2][1]["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 2}, "max_tokens", None),
        ({"stop_sequences": ["two"]}, "stop_sequence", "two"),
    ],
)
def test_stop_reasons(fields: dict[str, Any], reason: str, sequence: str | None) -> None:
    answer = ask(engine_of("one two three"), thinking={"type": "disabled"}, **fields)
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)


def test_the_history_is_that_of_a_chat() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "time?", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "a", "name": "get_time", "input": {"city": "A"}},
                {"type": "tool_use", "id": "b", "name": "get_time", "input": {"city": "B"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "two"}]},
                {"type": "tool_result", "tool_use_id": "a", "content": "one"},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    engine = engine_of("Fine.")
    ask(engine, messages=messages, system=[{"type": "text", "text": "Be brief."}], tools=TOOLS)
    ((prompt, _, _),) = engine.seen.values()
    text = tokenizer().decode(prompt)
    assert text.startswith("Be brief.\n\n## Tools")
    output = "<｜tool▁output▁begin｜>{}<｜tool▁output▁end｜>"
    assert output.format("one") + output.format("two") + "<｜User｜>Well?<｜Assistant｜>" in text
    assert f'Let me see.{TB}{CB}get_time{SEP}{{"city": "A"}}{CE}' in text


def test_an_answer_may_be_begun_by_the_client() -> None:
    engine = engine_of(" 42.")
    ask(engine, messages=[*HELLO, {"role": "assistant", "content": "The answer is"}])
    ((prompt, _, _),) = engine.seen.values()
    assert tokenizer().decode(prompt).endswith("</think>The answer is")


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"messages": []},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "x"}]}]},
        {"tool_choice": {"type": "any"}},
        {"tools": TOOLS, "tool_choice": {"type": "tool"}},
        {"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}},
        {"surprise": 1},
    ],
)
def test_errors_have_anthropics_shape(fields: dict[str, Any]) -> None:
    body = ask(engine_of(), status=400, **fields)
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error" and body["error"]["message"]


def test_count_tokens() -> None:
    engine = engine_of("x")
    counted = ask(engine, "/v1/messages/count_tokens", max_tokens=5, status=400)
    assert counted["error"]["type"] == "invalid_request_error"

    async def send() -> Any:
        async with client_of(make_app(engine)) as client:
            body = {"model": MODEL, "messages": HELLO, "tools": TOOLS}
            counted = await client.post("/v1/messages/count_tokens", json=body)
            answer = await client.post("/v1/messages", json=body | {"max_tokens": 1})
        return counted.json()["input_tokens"], answer.json()["usage"]

    count, usage = asyncio.run(send())
    assert count == usage["input_tokens"] + usage["cache_read_input_tokens"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = ("--max-total-tokens", "16384", "--api-key", "secret")
    with running_server(tmp_path_factory.mktemp("server"), *flags) as process:
        yield process


@pytest.fixture()
def client(server: ServerProcess) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0)


WEATHER: Any = {
    "name": "get_weather",
    "description": "Get the weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def test_the_real_client_calls_a_tool(client: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked: dict[str, Any] = {
        "model": DEMO_MODEL,
        "max_tokens": 100,
        "tools": [WEATHER],
        "extra_body": {"temperature": 0},
    }
    answer = client.messages.create(messages=messages, **asked)
    assert answer.stop_reason == "tool_use"
    call: Any = answer.content[-1]
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"temperature": 21, "sky": "sunny"}'}
    messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    final: Any = client.messages.create(messages=messages, **asked)
    assert final.stop_reason == "end_turn" and "sunny" in final.content[0].text


def test_the_real_client_streams_reasoning(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {
        "model": DEMO_MODEL,
        "max_tokens": 200,
        "thinking": THINK,
        "extra_body": {"temperature": 0},
    }
    asked["messages"] = [{"role": "user", "content": "What is 12 + 30?"}]
    with client.messages.stream(**asked) as stream:
        texts = list(stream.text_stream)
        final: Any = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.content[0].thinking and "".join(texts) == final.content[1].text and "42" in final.content[1].text
    count = client.messages.count_tokens(model=DEMO_MODEL, messages=asked["messages"], thinking=asked["thinking"])
    assert count.input_tokens == final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0)


def test_the_real_client_understands_errors(server: ServerProcess, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=1, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=DEMO_MODEL, max_tokens=0, messages=HELLO)
    stranger = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(model=DEMO_MODEL, max_tokens=1, messages=HELLO)
