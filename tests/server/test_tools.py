"""Function calls through the chat route, against a scripted engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_helpers import ScriptedEngine
from test_answers import chat, tokenizer
from test_bad_input import CHAT, post
from test_bad_input import chat as chat_body

from dsengine.config import ServerConfig
from dsengine.server.conversation import template_messages
from dsengine.server.protocol_messages import ChatMessage
from dsengine.server.service import Service
from dsengine.server.tools.formats import describes_tools, detect_format, with_description
from dsengine.tokenizer.dsml_template import DsmlTemplate

TB, TE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CB, CE, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
SCRIPT = f'Let me see.\n{TB}{CB}get_time{SEP}{{"city": "Łódź 😀"}}{CE}{CB}get_time{SEP}{{}}{CE}{TE}'
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "Local time",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def engine_of(script: str = SCRIPT, tokens_per_update: int = 1) -> ScriptedEngine:
    return ScriptedEngine(tokenizer(), script, tokens_per_update=tokens_per_update)


def fold(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """The message and finish reason that a stream adds up to, as a client does it."""
    result: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            result["content"] += choice["delta"].get("content") or ""
            result["reasoning"] += choice["delta"].get("reasoning_content") or ""
            for call in choice["delta"].get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(result["calls"]) and call["type"] == "function"
                    result["calls"].append([call["function"]["name"], ""])
                result["calls"][call["index"]][1] += call["function"]["arguments"]
            result["finish_reason"] = choice["finish_reason"] or result["finish_reason"]
    return result


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def calls_of(message: dict[str, Any]) -> list[list[str]]:
    return [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])]


@pytest.mark.parametrize("tokens_per_update", [1, 3, 1000])
@pytest.mark.parametrize(
    "extra", [{}, {"n": 2}, {"max_tokens": 25}, {"parallel_tool_calls": False}, {"logprobs": True}]
)
@pytest.mark.parametrize("thinking", [False, True])
def test_stream_adds_up_to_the_answer(tokens_per_update: int, extra: dict[str, Any], thinking: bool) -> None:
    script = "I think.</think>\n" + SCRIPT if thinking else SCRIPT
    body = extra | {"tools": TOOLS, "chat_template_kwargs": {"thinking": thinking}}
    whole = chat(engine_of(script, tokens_per_update), **body)
    chunks = chat(engine_of(script, tokens_per_update), stream=True, **body)
    for choice in whole["choices"]:
        folded = fold(chunks, choice["index"])
        message = choice["message"]
        assert folded["content"] == (message["content"] or "")
        assert folded["reasoning"] == message.get("reasoning_content", "")
        assert folded["calls"] == calls_of(message)
        assert folded["finish_reason"] == choice["finish_reason"]
        ids = [call["id"] for call in message.get("tool_calls", [])]
        assert len(set(ids)) == len(ids) and all(call_id.startswith("call_") for call_id in ids)
        if extra.get("logprobs"):
            assert len(choice["logprobs"]["content"]) == whole["usage"]["completion_tokens"]


def test_answer_with_calls_in_full() -> None:
    choice = chat(engine_of(), tools=TOOLS)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    assert calls_of(choice["message"]) == [["get_time", '{"city": "Łódź 😀"}'], ["get_time", "{}"]]
    silent = chat(engine_of(SCRIPT[SCRIPT.index(TB) :]), tools=TOOLS)["choices"][0]["message"]
    assert silent["content"] is None and len(silent["tool_calls"]) == 2
    one = chat(engine_of(), tools=TOOLS, parallel_tool_calls=False)["choices"][0]["message"]
    assert calls_of(one) == [["get_time", '{"city": "Łódź 😀"}']]


def test_a_call_ends_reasoning_that_was_not_closed() -> None:
    message = chat(engine_of("Hm." + SCRIPT[SCRIPT.index(TB) :]), tools=TOOLS, thinking={"type": "enabled"})
    message = message["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == "Hm."
    assert message["content"] is None and len(message["tool_calls"]) == 2


def test_a_truncated_call_ends_with_length() -> None:
    choice = chat(engine_of(), tools=TOOLS, max_tokens=14)["choices"][0]
    assert choice["finish_reason"] == "length"
    ((name, arguments),) = calls_of(choice["message"])
    assert name == "get_time" and '{"city": "Łódź 😀"}'.startswith(arguments)


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_the_text_is_left_alone(fields: dict[str, Any]) -> None:
    engine = engine_of()
    choice = chat(engine, chat_template_kwargs={"thinking": False}, **fields)["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": SCRIPT, "refusal": None}
    assert choice["finish_reason"] == "stop"
    ((prompt, _, _),) = engine.seen.values()
    assert "get_time" not in tokenizer().decode(prompt)


def test_history_reaches_the_template_whole() -> None:
    def call(call_id: str, city: str) -> dict[str, Any]:
        return {
            "id": call_id,
            "type": "function",
            "function": {"name": "get_time", "arguments": f'{{"city": "{city}"}}'},
        }

    messages = [
        {"role": "user", "content": "time in A and B?"},
        {"role": "assistant", "content": None, "tool_calls": [call("a", "A"), call("b", "B")]},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "two"}]},
        {"role": "tool", "tool_call_id": "a", "content": "one"},
    ]
    engine = engine_of("Fine.")
    assert chat(engine, messages=messages, tools=TOOLS)["choices"][0]["message"]["content"] == "Fine."
    ((prompt, _, _),) = engine.seen.values()
    text = tokenizer().decode(prompt, skip_special_tokens=False)
    output = "<｜tool▁output▁begin｜>{}<｜tool▁output▁end｜>"
    assert text.endswith(
        f'{TB}{CB}get_time{SEP}{{"city": "A"}}{CE}{CB}get_time{SEP}{{"city": "B"}}{CE}{TE}<｜end▁of▁sentence｜>'
        + output.format("one")
        + output.format("two")
    )
    parameters = json.dumps(TOOLS[0]["function"]["parameters"])
    assert f"### get_time\nDescription: Local time\nParameters: {parameters}\n" in text


def assistant(*ids: str | None) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}} | ({"id": i} if i else {}) for i in ids]
    return {"role": "assistant", "tool_calls": calls}


def result(content: str, call_id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": content} | ({"tool_call_id": call_id} if call_id else {})


@pytest.mark.parametrize(
    ("messages", "order"),
    [
        ([assistant("a", "b", "c"), result("3", "c"), result("1", "a"), result("2", "b")], ["1", "2", "3"]),
        ([assistant("a", "b"), result("2", "b")], ["2"]),
        ([assistant(None, None), result("1"), result("2")], ["1", "2"]),
        ([assistant("a", "b"), result("1"), result("2")], ["1", "2"]),
        ([assistant("a"), result("1", "a"), assistant("a"), result("2", "a")], ["1", "2"]),
    ],
)
def test_results_are_put_into_the_order_of_the_calls(messages: list[Any], order: list[str]) -> None:
    rendered = template_messages([ChatMessage(**message) for message in messages])
    assert [m["content"] for m in rendered if m["role"] == "tool"] == order


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [result("x", "a")]}, "messages.0"),
        ({"messages": [assistant("a"), result("x", "b")]}, "messages.1.tool_call_id"),
        ({"messages": [assistant("a", "b"), result("x", "a"), result("y", "a")]}, "messages.2.tool_call_id"),
        ({"messages": [assistant("a"), result("x", "a"), result("y", "a")]}, "messages.2"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": assistant("a")["tool_calls"]}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages.0"),
        ({"tools": TOOLS * 2}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": "all"}, "tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "other")}, "tool_choice"),
        ({"tool_choice": allowed("required", "get_time")}, "tool_choice"),
    ],
)
def test_refused(fields: dict[str, Any], param: str | None) -> None:
    response = post(CHAT, chat_body(**fields))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param, response.text


def test_of_the_tools_allowed_the_model_hears_of_all_and_calls_only_those() -> None:
    other = {"type": "function", "function": {"name": "stop"}}
    tools = [*TOOLS, other]
    prompts = []
    for mode, constrained in (("auto", True), ("required", True), (None, False)):
        engine = engine_of("Fine.")
        chat(engine, tools=tools, **({"tool_choice": allowed(mode, "stop")} if mode else {}))
        [(request_id, (prompt, _, _))] = engine.seen.items()
        prompts.append(prompt)
        constraint = engine.constraints[request_id]
        assert (constraint is not None) == constrained
        if constraint is not None:
            assert "stop" in constraint.grammar.data and "get_time" not in constraint.grammar.data
    assert prompts[0] == prompts[1] == prompts[2]
    engine = engine_of("Fine.")
    chat(engine, tools=tools, tool_choice=allowed("auto", "get_time", "stop"))
    assert list(engine.constraints.values()) == [None], "all are allowed"


def test_formats_are_told_from_the_template() -> None:
    demo = tokenizer()
    assert detect_format(demo) == "deepseekv31"
    assert describes_tools(demo.chat_template.source)
    assert not describes_tools("{{ messages[0]['tool_calls'] }}")
    assert Service(ScriptedEngine(demo), ServerConfig(tool_call_parser="kimi_k2")).tool_format == "kimi_k2"  # type: ignore[arg-type]


def test_templates_that_describe_no_tools_get_a_description() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for number, tool_format in enumerate(("deepseekv3", "deepseekv31")):
        first, *rest = with_description(messages, TOOLS, tool_format)  # type: ignore[arg-type]
        assert first["content"].startswith("Be brief.\n\n## Tools\n") and rest == messages[1:]
        assert f"{TB}{CB}{('function', 'tool_call_name')[number]}{SEP}" in first["content"]
        assert '"city": {"type": "string"}' in first["content"]
        (alone, _) = with_description(messages[1:], TOOLS, tool_format)  # type: ignore[arg-type]
        assert alone["content"].startswith("## Tools\n")
    with pytest.raises(ValueError, match="kimi_k2"):
        with_description(messages, TOOLS, "kimi_k2")


def test_formats_of_other_templates() -> None:
    class Other:
        def __init__(self, source: str, *tokens: str) -> None:
            self.chat_template = type("T", (), {"source": source})
            self._tokens = tokens

        def token_id(self, token: str) -> int | None:
            return 1 if token in self._tokens else None

    cases = [
        (Other(DsmlTemplate.source), "deepseekv32"),
        (Other("<|tool_call_begin|>"), "kimi_k2"),
        (Other(f"'{CB}' + type + '{SEP}' + name + '```json'", TB), "deepseekv3"),
        (Other("no calls", TB), "deepseekv3"),
        (Other("no calls"), None),
    ]
    for other, expected in cases:
        assert detect_format(other) == expected  # type: ignore[arg-type]
    assert describes_tools(DsmlTemplate.source)
