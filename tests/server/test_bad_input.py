"""What clients get wrong, by mistake or on purpose: a 4xx in OpenAI's shape, and no work for the engine."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_helpers import CHECKPOINT_DIR, CONTEXT_LENGTH, MODEL, QueueFullError, ScriptedEngine, client_of, make_app

from dsengine.tokenizer.tokenizer import Tokenizer

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
MAX_ERROR_BYTES = 4096
# What an error must never show: addresses, paths, names of Python things.
LEAKS = re.compile(r"0x[0-9a-f]{6,}|/(root|home|opt|usr|work|tmp)/|\.py\b|Traceback|object at")


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(CHECKPOINT_DIR)


def post(path: str, body: Any = None, *, raw: bytes | None = None, **options: Any) -> httpx.Response:
    """One request to a fresh application; checks what holds for every answer."""

    async def ask() -> httpx.Response:
        engine = options.pop("engine", None) or ScriptedEngine(tokenizer())
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        async with client_of(make_app(engine, **options)) as client:
            content = raw if raw is not None else json.dumps(body).encode()
            response = await client.post(path, content=content, headers=headers)
        assert not engine.running
        if response.status_code >= 400:
            assert not engine.seen
        return response

    response = asyncio.run(ask())
    if response.status_code >= 400:
        check_error(response)
    return response


@pytest.mark.parametrize("name", ["\0" * 200, "漢" * 300, "😀" * 300, '"\\' * 200])
def test_errors_are_short_whatever_they_name(name: str) -> None:
    assert post(CHAT, chat(**{f"{name[:50]}{i}{name}": 1 for i in range(12)})).status_code == 400
    assert post(CHAT, chat(model=name)).status_code in (400, 404)


def check_error(response: httpx.Response) -> dict[str, Any]:
    assert len(response.content) <= MAX_ERROR_BYTES
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert not LEAKS.search(response.text), response.text
    return error


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO} | fields


def complete(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hi"} | fields


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        (CHAT, chat(messages=[]), "messages"),
        (CHAT, chat(messages=None), "messages"),
        (CHAT, chat(messages="hi"), "messages"),
        (CHAT, {"model": MODEL}, "messages"),
        (CHAT, {"messages": HELLO}, "model"),
        (CHAT, chat(model=""), "model"),
        (CHAT, chat(model=3), "model"),
        (CHAT, chat(messages=[{"role": "wizard", "content": "x"}]), "messages.0.role"),
        (CHAT, chat(messages=[{"role": "tool", "content": "x"}]), "messages.0"),
        (CHAT, chat(messages=[{"role": "function", "content": "x"}]), "messages.0.role"),
        (CHAT, chat(messages=[{"role": "user"}]), "messages.0"),
        (CHAT, chat(messages=[{"role": "user", "content": 5}]), "messages.0.content"),
        (CHAT, chat(messages=[{"role": "user", "content": "x", "evil": 1}]), "messages.0.evil"),
        (CHAT, chat(messages=[{"role": "assistant", "tool_calls": [{}]}]), "messages.0.tool_calls"),
        (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages.0.content"),
        (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages.0.content"),
        (CHAT, chat(messages=HELLO * 4097), "messages"),
        (CHAT, chat(temperature=-0.1), "temperature"),
        (CHAT, chat(temperature=2.1), "temperature"),
        (CHAT, chat(temperature="1"), "temperature"),
        (CHAT, chat(temperature=True), "temperature"),
        (CHAT, chat(top_p=0), "top_p"),
        (CHAT, chat(top_p=1.01), "top_p"),
        (CHAT, chat(min_p=-1), "min_p"),
        (CHAT, chat(top_k=-2), "top_k"),
        (CHAT, chat(top_k=1.5), "top_k"),
        (CHAT, chat(top_k=10**30), "top_k"),
        (CHAT, chat(n=0), "n"),
        (CHAT, chat(n=-1), "n"),
        (CHAT, chat(n=129), "n"),
        (CHAT, chat(n=10**9), "n"),
        (CHAT, chat(n=True), "n"),
        (CHAT, chat(n=65), "n"),
        (CHAT, chat(max_tokens=0), "max_tokens"),
        (CHAT, chat(max_tokens=2**31), "max_tokens"),
        (CHAT, chat(max_completion_tokens=-1), "max_completion_tokens"),
        (CHAT, chat(max_tokens=3, max_completion_tokens=4), None),
        (CHAT, chat(min_tokens=CONTEXT_LENGTH), "min_tokens"),
        (CHAT, chat(min_tokens=5, max_tokens=4), None),
        (CHAT, chat(presence_penalty=2.5), "presence_penalty"),
        (CHAT, chat(frequency_penalty=-2.5), "frequency_penalty"),
        (CHAT, chat(repetition_penalty=0), "repetition_penalty"),
        (CHAT, chat(seed=2**63), "seed"),
        (CHAT, chat(seed=1.5), "seed"),
        (CHAT, chat(stop=["a"] * 17), "stop"),
        (CHAT, chat(stop=["a"] * 5000), "stop"),
        (CHAT, chat(stop=[""]), "stop"),
        (CHAT, chat(stop=["a" * 257]), "stop"),
        (CHAT, chat(stop="a" * 257), "stop"),
        (CHAT, chat(stop=[1]), "stop"),
        (CHAT, chat(stop_token_ids=[-1]), "stop_token_ids.0"),
        (CHAT, chat(stop_token_ids=[5000]), "stop_token_ids"),
        (CHAT, chat(stop_token_ids=list(range(129))), "stop_token_ids"),
        (CHAT, chat(logit_bias={"x": 1}), "logit_bias"),
        (CHAT, chat(logit_bias={"-1": 1}), "logit_bias"),
        (CHAT, chat(logit_bias={"5": 101}), "logit_bias.5"),
        (CHAT, chat(logit_bias={"5000": 1}), "logit_bias"),
        (CHAT, chat(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias"),
        (CHAT, chat(logprobs=5), "logprobs"),
        (CHAT, chat(top_logprobs=2), None),
        (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (CHAT, chat(stream="yes"), "stream"),
        (CHAT, chat(stream_options={"include_usage": True}), None),
        (CHAT, chat(stream=True, stream_options={"evil": True}), "stream_options.evil"),
        (CHAT, chat(stream=True, stream_options={"include_obfuscation": True}), "stream_options.include_obfuscation"),
        (CHAT, chat(verbosity="low"), "verbosity"),
        (CHAT, chat(verbosity="{loud}"), "verbosity"),
        (CHAT, chat(chat_template="{{ 1 }}"), "chat_template"),
        (CHAT, chat(chat_template_kwargs={"tokenize": True}), "chat_template_kwargs.tokenize"),
        (CHAT, chat(chat_template_kwargs={"thinking": "yes"}), "chat_template_kwargs.thinking"),
        (CHAT, chat(chat_template_kwargs={"thinking": True}, reasoning_effort="none"), None),
        (CHAT, chat(reasoning_effort="huge"), "reasoning_effort"),
        (CHAT, chat(tools=[{"type": "function"}]), "tools"),
        (CHAT, chat(tool_choice="required"), "tool_choice"),
        (CHAT, chat(functions=[{}]), "functions"),
        (CHAT, chat(response_format={"type": "yaml"}), "response_format.type"),
        (CHAT, chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
        (CHAT, chat(response_format={"type": "json_schema", "json_schema": {"name": "x"}}), "response_format"),
        (CHAT, chat(response_format={"type": "json_object", "pattern": "a"}), "response_format.pattern"),
        (CHAT, chat(response_format={"type": "json_object"}, regex="a"), None),
        (CHAT, chat(response_format={"type": "json_object"}, ignore_eos=True), None),
        (CHAT, chat(response_format={"type": "json_object"}, min_tokens=2), None),
        (CHAT, chat(regex=""), "regex"),
        (CHAT, chat(continue_final_message=True), "messages"),
        (CHAT, chat(messages=[{"role": "user", "content": "x", "prefix": True}]), "messages.0"),
        (CHAT, chat(messages=[*HELLO, {"role": "assistant", "content": " ", "prefix": True}]), "messages"),
        (CHAT, chat(regex="a" * 8193), "regex"),
        (CHAT, chat(ebnf="a" * 65537), "ebnf"),
        (CHAT, chat(guided_choice=[]), "guided_choice"),
        (CHAT, chat(guided_json="[1"), "guided_json"),
        (CHAT, chat(guided_json={"enum": ["a"] * 1001}), "guided_json"),
        (CHAT, chat(guided_json={"properties": {str(i): {} for i in range(501)}}), "guided_json"),
        (CHAT, chat(guided_json={"const": "a" * 70_000}), "guided_json"),
        (COMPLETE, complete(guided_regex=5), "guided_regex"),
        (CHAT, chat(modalities=["text", "audio"]), "modalities"),
        (CHAT, chat(audio={"voice": "x"}), "audio"),
        (CHAT, chat(custom_logit_processor="x"), "custom_logit_processor"),
        (CHAT, chat(priority=1001), "priority"),
        (CHAT, chat(cache_salt="x" * 257), "cache_salt"),
        (CHAT, chat(**{"list[evil]": 1}), "list[evil]"),
        (CHAT, chat(str=1), "str"),
        (CHAT, chat(body=1), None),
        (CHAT, [], None),
        (CHAT, "text", None),
        (CHAT, None, None),
        (COMPLETE, complete(prompt=""), "prompt"),
        (COMPLETE, complete(prompt=[]), "prompt"),
        (COMPLETE, complete(prompt=[""]), "prompt"),
        (COMPLETE, complete(prompt=[[]]), "prompt"),
        (COMPLETE, complete(prompt=[1, "a"]), "prompt"),
        (COMPLETE, complete(prompt=[-1]), "prompt"),
        (COMPLETE, complete(prompt=[5000]), "prompt"),
        (COMPLETE, complete(prompt=[2**40]), "prompt"),
        (COMPLETE, complete(prompt=[True]), "prompt"),
        (COMPLETE, complete(prompt={"a": 1}), "prompt"),
        (COMPLETE, complete(prompt=["a"] * 257), "prompt"),
        (COMPLETE, complete(prompt=["a"] * 200, n=64), "prompt"),
        (COMPLETE, complete(max_tokens=0), None),
        (COMPLETE, complete(logprobs=21), "logprobs"),
        (COMPLETE, complete(logprobs=True), "logprobs"),
        (COMPLETE, complete(best_of=2, n=3), "best_of"),
        (COMPLETE, complete(best_of=2, stream=True), "best_of"),
        (COMPLETE, complete(best_of=65), "n"),
        (COMPLETE, complete(suffix="x"), "suffix"),
        (COMPLETE, complete(prompt=[5, 6], suffix="x"), "suffix"),
        (COMPLETE, complete(prompt_logprobs=21), "prompt_logprobs"),
        (COMPLETE, complete(prompt_logprobs=1, stream=True), "prompt_logprobs"),
        (COMPLETE, complete(echo=1), "echo"),
        (COMPLETE, complete(prompt_embeds="AAAA"), "prompt_embeds"),
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, None),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {}, "tokens"),
    ],
)  # fmt: skip
def test_refused_with_400(path: str, body: Any, param: str | None) -> None:
    response = post(path, body)
    assert response.status_code == 400, response.text
    error = check_error(response)
    assert error["type"] == "invalid_request_error"
    if param is None:
        return
    assert error["param"] is not None and error["param"].startswith(param), error


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0}, {"temperature": 2}, {"top_p": 1}, {"top_k": -1}, {"n": 1.0}, {"n": 64}, {"seed": -(2**63)},
        {"max_tokens": 2**31 - 1}, {"stop": []}, {"stop": "x" * 256}, {"stop": ["x"] * 16}, {"logprobs": None},
        {"logit_bias": {"5": -100, "1031": 100}}, {"stop_token_ids": [7, 7]}, {"stream": None}, {"user": "me"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_the_bounds_themselves_are_accepted(path: str, fields: dict[str, Any]) -> None:
    body = chat(**fields) if path == CHAT else complete(**fields)
    assert post(path, body).status_code == 200


def test_fields_of_openai_that_change_nothing_are_accepted() -> None:
    ignored = {
        "store": True, "metadata": {"a": "b"}, "user": "x", "service_tier": "auto", "parallel_tool_calls": True,
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"],
    }  # fmt: skip
    assert post(CHAT, chat(**ignored)).status_code == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETE, "/tokenize"])
def test_unknown_models_get_404(path: str) -> None:
    body = {
        CHAT: chat(model="gpt-4"),
        COMPLETE: complete(model="gpt-4"),
        "/tokenize": {"model": "gpt-4", "prompt": "a"},
    }
    response = post(path, body[path])
    assert response.status_code == 404
    assert check_error(response)["code"] == "model_not_found"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"nonsense", b'{"model": "scripted", "prompt": "\xff\xfe"}', b'{"model": NaN}', b'{"a":1,"a":2}',
     b'{"model": "scripted", "prompt": "\\ud800"}', b'{"model": "scripted", "seed": ' + b"1" * 5000 + b"}",
     b"[" * 100_000, '{"model": "scripted"}'.encode("utf-16"), b"\x00" * 10],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, COMPLETE, "/tokenize", "/detokenize"])
def test_malformed_bodies_get_400(path: str, raw: bytes) -> None:
    assert post(path, raw=raw).status_code == 400


def test_prompts_that_fill_the_context() -> None:
    fits, too_long = [5] * (CONTEXT_LENGTH - 1), [5] * CONTEXT_LENGTH
    assert post(COMPLETE, complete(prompt=fits, max_tokens=100)).json()["usage"]["completion_tokens"] == 1
    error = check_error(post(COMPLETE, complete(prompt=too_long)))
    assert error["code"] == "context_length_exceeded" and str(CONTEXT_LENGTH) in error["message"]
    for content in ("x " * CONTEXT_LENGTH, "x" * 1_000_000):
        error = check_error(post(CHAT, chat(messages=[{"role": "user", "content": content}])))
        assert error["code"] == "context_length_exceeded" and error["param"] == "messages"


def test_errors_stay_small_whatever_is_sent() -> None:
    """4 KB of request once made a peer answer 23 MB."""
    body = chat(**{f"field{i}" * 20: i for i in range(2000)})
    error = check_error(post(CHAT, body))
    assert error["message"].count("unrecognized field") == 10 and "more" in error["message"]
    check_error(post(CHAT, chat(model="m" * 200 + "é😀")))
    check_error(post(CHAT, chat(messages=[{"role": "r" * 10_000, "content": "x"}] * 100)))
    check_error(post(CHAT, chat(logit_bias={f"{i}x": 1 for i in range(1000)})))
    check_error(post(COMPLETE, complete(prompt=[1] * 10_000 + ["x"])))


def test_a_full_queue_gets_429() -> None:
    engine = ScriptedEngine(tokenizer())
    engine.refusal = QueueFullError("full")
    for body in (chat(), chat(stream=True), chat(n=3)):
        response = post(CHAT, body, engine=engine)
        assert response.status_code == 429 and response.headers["retry-after"]
        assert check_error(response)["code"] == "rate_limit_exceeded"


def test_a_dead_engine_gets_503() -> None:
    engine = ScriptedEngine(tokenizer())
    engine.is_alive = False
    for path, body in ((CHAT, chat()), (CHAT, chat(stream=True)), (COMPLETE, complete())):
        response = post(path, body, engine=engine)
        assert response.status_code == 503 and response.headers["retry-after"]
        assert check_error(response)["code"] == "engine_unavailable"


def test_what_the_engine_refuses_gets_400() -> None:
    engine = ScriptedEngine(tokenizer())
    engine.refusal = ValueError("the prompt is not to my taste")
    assert "not to my taste" in check_error(post(CHAT, chat(), engine=engine))["message"]


def test_a_bug_shows_nothing_of_itself() -> None:
    engine = ScriptedEngine(tokenizer())
    engine.refusal = RuntimeError("secret at 0xdeadbeef in /root/x.py")
    response = post(CHAT, chat(), engine=engine)
    assert response.status_code == 500 and check_error(response)["code"] == "internal_error"


numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=6)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3))
fields = st.sampled_from(
    ["messages", "prompt", "model", "n", "stop", "temperature", "logit_bias", "stream", "stream_options", "top_k", "x",
     "tools", "seed", "max_tokens", "thinking", "chat_template_kwargs", "logprobs", "echo", "response_format", "user"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([CHAT, COMPLETE]), st.dictionaries(fields, values, max_size=4))
def test_no_body_makes_the_server_fail(path: str, changes: dict[str, Any]) -> None:
    body = (chat() if path == CHAT else complete()) | changes
    assert post(path, body).status_code in (200, 400, 404)
