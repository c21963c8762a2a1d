"""OpenAI's Responses API: shapes against a scripted engine, and the real client against a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from pydantic import BaseModel
from server_helpers import MODEL, ScriptedEngine, client_of, make_app
from server_process import DEMO_MODEL, ServerProcess, running_server
from test_answers import tokenizer
from test_bad_input import check_error

TB, TE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CB, CE, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
SCRIPT = f'I think.</think>Let me see.\n{TB}{CB}get_time{SEP}{{"city": "Łódź"}}{CE}{CB}get_time{SEP}{{}}{CE}{TE}'
TOOLS = [{"type": "function", "name": "get_time", "parameters": {"type": "object", "properties": {}}}]
THINK = {"effort": "high"}


def ask(script: str = SCRIPT, status: int = 200, engine: ScriptedEngine | None = None, **body: Any) -> Any:
    async def send() -> Any:
        async with client_of(make_app(engine or ScriptedEngine(tokenizer(), script))) as client:
            response = await client.post("/v1/responses", json={"model": MODEL, "input": "hi"} | body)
        assert response.status_code == status, response.text
        if status != 200:
            return check_error(response)
        if not body.get("stream"):
            return response.json()
        parts = [event.split("\n") for event in response.text.split("\n\n")]
        assert parts.pop() == [""]
        events = [json.loads(data.removeprefix("data: ")) for _, data in parts]
        assert [name.removeprefix("event: ") for name, _ in parts] == [event["type"] for event in events]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        return events

    return asyncio.run(send())


def without_ids(items: list[Any]) -> list[Any]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


def test_answer_in_full() -> None:
    answer = ask(tools=TOOLS, reasoning=THINK)
    assert answer["status"] == "completed" and answer["object"] == "response" and answer["error"] is None
    part = {"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}
    thought = {"type": "reasoning_text", "text": "I think."}
    call = {"type": "function_call", "status": "completed", "name": "get_time"}
    assert without_ids(answer["output"]) == [
        {"type": "reasoning", "status": "completed", "summary": [], "content": [thought]},
        {"type": "message", "status": "completed", "role": "assistant", "content": [part]},
        call | {"arguments": '{"city": "Łódź"}'},
        call | {"arguments": "{}"},
    ]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"]["reasoning_tokens"] > 0


def test_the_stream_adds_up_to_the_answer() -> None:
    whole = ask(tools=TOOLS, reasoning=THINK)
    events = ask(tools=TOOLS, reasoning=THINK, stream=True)
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    final = events[-1]
    assert final["type"] == "response.completed" and final["response"]["usage"] == whole["usage"]
    assert without_ids(final["response"]["output"]) == without_ids(whole["output"])
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == final["response"]["output"]
    for index, item in enumerate(done):
        deltas = [e["delta"] for e in events if e["type"].endswith(".delta") and e["output_index"] == index]
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert "".join(deltas) == text
        kinds = [e["type"] for e in events if e.get("output_index") == index]
        assert kinds[0] == "response.output_item.added" and kinds[-1] == "response.output_item.done"


def test_a_response_that_is_cut_off_is_incomplete() -> None:
    for stream in (False, True):
        answer = ask("one two three four", max_output_tokens=2, reasoning={"effort": "none"}, stream=stream)
        body = answer[-1]["response"] if stream else answer
        assert body["status"] == "incomplete" and body["incomplete_details"] == {"reason": "max_output_tokens"}
        assert body["output"][0]["status"] == "incomplete"
        assert not stream or answer[-1]["type"] == "response.incomplete"


def test_items_become_the_messages_of_a_chat() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "time?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Well:", "annotations": []}],
        },
        {"type": "function_call", "call_id": "a", "name": "get_time", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "b", "name": "get_time", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "b", "output": "two"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "one"}]},
    ]
    engine = ScriptedEngine(tokenizer(), "Fine.")
    ask(engine=engine, input=items, instructions="Be brief.", tools=TOOLS)
    ((prompt, _, _),) = engine.seen.values()
    text = tokenizer().decode(prompt)
    output = "<｜tool▁output▁begin｜>{}<｜tool▁output▁end｜>"
    assert text.startswith("Be brief.\n\n## Tools")
    calls = f'{TB}{CB}get_time{SEP}{{}}{CE}{CB}get_time{SEP}{{"x": 1}}{CE}{TE}'
    assert f"<｜User｜>time?<｜Assistant｜></think>Well:{calls}" in text
    assert text.endswith(output.format("one") + output.format("two"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "messages"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"generate_summary": "concise"}}, "reasoning.generate_summary"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"surprise": 1}}, "stream_options.surprise"),
        ({"include": ["everything"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_refused(fields: dict[str, Any], param: str) -> None:
    error = ask(status=400, **fields)
    assert error["param"] is not None and error["param"].startswith(param), error


def test_the_defaults_of_what_is_not_supported_are_accepted() -> None:
    fields: dict[str, Any] = {
        "text": {"verbosity": "medium"},
        "reasoning": {"effort": "none", "summary": "auto"},
        "stream_options": {"include_obfuscation": False},
        "include": ["reasoning.encrypted_content", "message.output_text.logprobs"],
        "top_logprobs": 1,
        "store": True,
        "max_tool_calls": 3,
    }
    answer = ask("Hello.", **fields)
    assert answer["store"] is False and answer["output"][0]["content"][0]["logprobs"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("server"), "--max-total-tokens", "16384") as process:
        yield process


@pytest.fixture()
def client(server: ServerProcess) -> OpenAI:
    return server.openai()


WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


def test_the_real_client_calls_a_tool(client: OpenAI) -> None:
    items: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked: dict[str, Any] = {"model": DEMO_MODEL, "temperature": 0, "max_output_tokens": 200, "tools": [WEATHER]}
    answer = client.responses.create(input=items, **asked)
    call: Any = answer.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Paris"})
    items += [item.model_dump(exclude_none=True) for item in answer.output]
    result = '{"temperature": 21, "sky": "sunny"}'
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
    assert "sunny" in client.responses.create(input=items, **asked).output_text


def test_the_real_client_streams(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": DEMO_MODEL, "temperature": 0, "max_output_tokens": 200}
    asked |= {"input": "What is 12 + 30?", "reasoning": {"effort": "high"}}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.reasoning_text.delta", "response.output_text.delta", "response.completed"} <= kinds
    assert final.output_text == whole.output_text and "42" in final.output_text
    assert [item.type for item in final.output] == ["reasoning", "message"]


def test_the_real_client_parses(client: OpenAI) -> None:
    class Sum(BaseModel):
        left: int
        right: int

    answer = client.responses.parse(
        model=DEMO_MODEL, input="12 + 30", text_format=Sum, max_output_tokens=200, reasoning={"effort": "none"}
    )
    assert isinstance(answer.output_parsed, Sum)
