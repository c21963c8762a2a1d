"""The shapes of answers, against a scripted engine: streaming is the same answer in pieces."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any

import pytest
from server_helpers import CHECKPOINT_DIR, MODEL, ScriptedEngine, client_of, make_app

from dsengine.server.errors import ApiError
from dsengine.server.fim import fim_prompt
from dsengine.tokenizer.tokenizer import Tokenizer

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
SCRIPT = "First 1 + 1.</think>\n\nIt is 2 😀, END of it."


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(CHECKPOINT_DIR)


def engine_of(script: str = SCRIPT, tokens_per_update: int = 1) -> ScriptedEngine:
    return ScriptedEngine(tokenizer(), script, tokens_per_update=tokens_per_update)


def ask(path: str, engine: ScriptedEngine | None = None, **body: Any) -> Any:
    """The answer, or the list of events of a streamed one."""
    config = body.pop("config", {})

    async def send() -> Any:
        async with client_of(make_app(engine or engine_of(), **config)) as client:
            response = await client.post(path, json={"model": MODEL} | body)
        assert response.status_code == 200, response.text
        if not body.get("stream"):
            return response.json()
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    return asyncio.run(send())


def chat(engine: ScriptedEngine | None = None, **body: Any) -> Any:
    return ask(CHAT, engine, **({"messages": HELLO} | body))


def complete(engine: ScriptedEngine | None = None, **body: Any) -> Any:
    return ask(COMPLETE, engine, **({"prompt": "hi", "max_tokens": 100} | body))


@pytest.mark.parametrize("tokens_per_update", [1, 3, 100])
@pytest.mark.parametrize(
    "extra", [{}, {"stop": ["END"]}, {"max_tokens": 5}, {"logprobs": True, "top_logprobs": 2}, {"n": 3}]
)
@pytest.mark.parametrize("thinking", [True, False])
def test_chat_stream_adds_up_to_the_answer(tokens_per_update: int, extra: dict[str, Any], thinking: bool) -> None:
    script = SCRIPT if thinking else "It is 2 😀, END of it."
    body = extra | {"chat_template_kwargs": {"thinking": thinking}}
    whole = chat(engine_of(script, tokens_per_update), **body)
    chunks = chat(engine_of(script, tokens_per_update), stream=True, stream_options={"include_usage": True}, **body)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks[:-1])
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    for choice in whole["choices"]:
        pieces = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert pieces[0]["delta"]["role"] == "assistant"
        assert [p["finish_reason"] for p in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        assert pieces[-1]["stop_reason"] == choice["stop_reason"]
        for name in ("content", "reasoning_content"):
            text = "".join(p["delta"].get(name) or "" for p in pieces)
            assert text == (choice["message"].get(name) or "")
        entries = [entry for p in pieces if p["logprobs"] for entry in p["logprobs"]["content"]]
        assert entries == (choice["logprobs"] or {"content": []})["content"]
        if "logprobs" in extra:
            assert len(entries) == whole["usage"]["completion_tokens"]


@pytest.mark.parametrize("route", [chat, complete])
def test_usage_on_every_chunk(route: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    whole, chunks = route(), route(stream=True, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and len(set(counts)) > 3
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == chunks[-2]["usage"] == whole["usage"]
    only = route(stream=True, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in only)


def test_chat_answer_in_full() -> None:
    answer = chat()
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "It is 2 😀, END of it.",
        "refusal": None,
        "reasoning_content": "First 1 + 1.",
        "reasoning": "First 1 + 1.",
    }
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    num_tokens = len(tokenizer().encode(SCRIPT)) + 1
    prompt = len(tokenizer().encode(tokenizer().chat_template.render(HELLO)))
    thought = tokenizer().encode(SCRIPT).index(tokenizer().token_id("</think>") or -1) + 1
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": num_tokens,
        "total_tokens": prompt + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {
            "reasoning_tokens": thought,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def test_reasoning_that_is_cut_off_leaves_no_content() -> None:
    message = chat(max_tokens=3)["choices"][0]["message"]
    assert message["content"] is None and message["reasoning_content"]
    assert chat(max_tokens=3)["choices"][0]["finish_reason"] == "length"
    closed = chat(engine_of("so</think>"))["choices"][0]["message"]
    assert closed["content"] == "" and closed["reasoning_content"] == "so"


def test_without_thinking_there_is_no_reasoning() -> None:
    message = chat(engine_of("Hello."), chat_template_kwargs={"thinking": False})["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Hello.", "refusal": None}


@pytest.mark.parametrize(
    ("config", "request_fields", "expected"),
    [
        ({}, {}, True),
        ({"thinking": False}, {}, False),
        ({"thinking": False}, {"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"thinking": True}, {"thinking": {"type": "disabled"}}, False),
        ({}, {"reasoning_effort": "none"}, False),
        ({"thinking": False}, {"reasoning_effort": "high"}, True),
        ({}, {"chat_template_kwargs": {"thinking": False}, "reasoning_effort": "none"}, False),
    ],
)
def test_who_decides_about_thinking(config: dict[str, Any], request_fields: dict[str, Any], expected: bool) -> None:
    engine = engine_of("x")
    chat(engine, config=config, **request_fields)
    ((prompt, _, _),) = engine.seen.values()
    assert (prompt[-1] == tokenizer().token_id("<think>")) is expected


def test_messages_reach_the_template() -> None:
    engine = engine_of("x")
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "reasoning_content": "old", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "b", "name": "me"},
    ]
    chat(engine, messages=messages)
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "b"},
    ]
    ((prompt, _, _),) = engine.seen.values()
    assert prompt == tokenizer().encode(tokenizer().chat_template.render(plain))


def test_request_goes_before_checkpoint_before_engine_defaults() -> None:
    engine = engine_of("x")
    engine.tokenizer = Tokenizer.from_checkpoint(CHECKPOINT_DIR)
    engine.tokenizer.sampling_defaults = {"temperature": 0.3, "top_p": 0.9}
    complete(engine, top_p=0.5)
    ((_, params, _),) = engine.seen.values()
    assert (params.temperature, params.top_p, params.top_k) == (0.3, 0.5, 0)


def test_stop_string_ends_the_answer_and_the_sequence() -> None:
    engine = engine_of("one two three four")
    answer = complete(engine, stop=["ee", "tw"])
    assert answer["choices"][0]["text"] == "one "
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["choices"][0]["stop_reason"] == "tw"
    assert answer["usage"]["completion_tokens"] < len(tokenizer().encode("one two three four"))
    kept = complete(engine_of("one two three four"), stop="tw", include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == "one tw"
    assert not engine.running


def test_n_choices_have_seeds_of_their_own() -> None:
    engine = engine_of("x")
    answer = complete(engine, n=3, seed=5, prompt=["a", "b"])
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [params.seed for _, params, _ in engine.seen.values()] == [5, 6, 7] * 2
    assert all(params.n == 1 for _, params, _ in engine.seen.values())
    assert answer["usage"]["prompt_tokens"] == 4  # each prompt counts once
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 6


@pytest.mark.parametrize("tokens_per_update", [1, 100])
@pytest.mark.parametrize("extra", [{}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 1}, {"n": 2}])
def test_completion_stream_adds_up_to_the_answer(tokens_per_update: int, extra: dict[str, Any]) -> None:
    body: dict[str, Any] = {"prompt": ["é 😀", "b"]} | extra
    whole = complete(engine_of(tokens_per_update=tokens_per_update), **body)
    chunks = complete(engine_of(tokens_per_update=tokens_per_update), stream=True, **body)
    for choice in whole["choices"]:
        pieces = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"] == "stop"
        if choice["logprobs"] is None:
            assert all(piece["logprobs"] is None for piece in pieces)
            continue
        for name, values in choice["logprobs"].items():
            assert [value for piece in pieces for value in piece["logprobs"][name]] == values


def test_completion_logprobs_and_offsets() -> None:
    answer = complete(engine_of("é 😀!"), echo=True, logprobs=2, prompt="a😀b")
    choice = answer["choices"][0]
    assert choice["text"] == "a😀bé 😀!"
    lists = choice["logprobs"]
    assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
    assert set(lists["token_logprobs"][1:]) == {-0.5}
    num_tokens = answer["usage"]["total_tokens"]
    assert {len(values) for values in lists.values()} == {num_tokens}
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<｜")):
            assert choice["text"][offset : offset + len(token)] == token
    assert all(len(top) == 2 for top in lists["top_logprobs"][1:])


def test_scoring_a_prompt_without_generating() -> None:
    answer = complete(prompt=[5, 6, 7], echo=True, max_tokens=0, logprobs=1)
    (choice,) = answer["choices"]
    assert choice["text"] == tokenizer().decode([5, 6, 7])
    assert len(choice["logprobs"]["tokens"]) == 3 and choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["total_tokens"] == 3


def test_chat_logprobs_carry_bytes() -> None:
    entries = chat(engine_of("x</think>😀"), logprobs=True, top_logprobs=1)["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries[:-1]) == "x</think>😀".encode()
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries)
    assert chat(logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("fields", [{"continue_final_message": True}, {}])
def test_an_answer_may_be_begun_by_the_client(fields: dict[str, Any]) -> None:
    engine = engine_of(" 42.")
    begun = {"role": "assistant", "content": "The answer is "} | ({} if fields else {"prefix": True})
    message = chat(engine, messages=[*HELLO, begun], **fields)["choices"][0]["message"]
    assert message["content"] == " 42."
    ((prompt, _, _),) = engine.seen.values()
    assert tokenizer().decode(prompt).endswith("</think>The answer is")


def test_the_generation_prompt_may_be_left_out() -> None:
    engine = engine_of("x")
    chat(engine, add_generation_prompt=False)
    ((prompt, _, _),) = engine.seen.values()
    assert tokenizer().decode(prompt).endswith("<｜User｜>hi")


def test_the_best_of_several_are_those_of_the_likeliest_tokens() -> None:
    engine = engine_of("x")
    values = dict(zip(range(5, 11), (-3.0, -1.0, -2.0, -5.0, -4.0, -0.5), strict=True))

    def scripted(prompt: list[int], params: Any) -> str:
        return f"{params.seed}"

    engine.script = scripted
    engine.logprob_of = lambda params: values[params.seed or 0]
    asked: dict[str, Any] = {"best_of": 3, "n": 2, "seed": 5}
    choices = complete(engine, **asked)["choices"]
    assert [(c["index"], c["text"], c["logprobs"]) for c in choices] == [(0, "6", None), (1, "7", None)]
    assert len(complete(engine, prompt=["a", "b"], logprobs=1, **asked)["choices"]) == 4


def test_prompts_can_be_scored_in_vllms_shape() -> None:
    prompt = [5, 6, 7]
    (choice,) = complete(engine_of("x"), prompt=prompt, prompt_logprobs=2)["choices"]
    first, *others = choice["prompt_logprobs"]
    assert (
        first is None and [str(token) in entry for token, entry in zip(prompt[1:], others, strict=True)] == [True] * 2
    )
    assert all(set(value) == {"logprob", "rank", "decoded_token"} for entry in others for value in entry.values())
    assert choice["logprobs"] is None
    answer = chat(engine_of("x"), prompt_logprobs=0)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    both = complete(engine_of("x"), prompt=prompt, prompt_logprobs=3, echo=True, logprobs=1)["choices"][0]
    assert all(len(top) <= 2 for top in both["logprobs"]["top_logprobs"][1:3])


def test_filling_in_the_middle() -> None:
    plain = tokenizer()
    words = {"<｜fim▁begin｜>": 1, "<｜fim▁hole｜>": 2, "<｜fim▁end｜>": 3}

    class WithHoles:
        def token_id(self, token: str) -> int | None:
            return words.get(token)

    assert fim_prompt(WithHoles(), "a(", ")") == "<｜fim▁begin｜>a(<｜fim▁hole｜>)<｜fim▁end｜>"  # type: ignore[arg-type]
    with pytest.raises(ApiError, match="filling in"):
        fim_prompt(plain, "a(", ")")
