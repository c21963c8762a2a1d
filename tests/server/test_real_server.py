"""The real `openai` client against a real server on the demo checkpoint, on every route."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from server_process import DEMO_MODEL, ServerProcess, running_server, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "What is 12 + 30?"}]
GREEDY: dict[str, Any] = {"model": DEMO_MODEL, "temperature": 0, "extra_body": {"ignore_eos": True}}
MAX_SECONDS_TO_ABORT = 5.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("server"), "--max-total-tokens", "32768") as process:
        yield process


@pytest.fixture()
def client(server: ServerProcess) -> OpenAI:
    return server.openai()


def fold(chunks: Any) -> tuple[dict[int, dict[str, str]], Any]:
    """Texts and finish reasons by choice, and the usage."""
    texts: dict[int, dict[str, str]] = {}
    usage = None
    for chunk in chunks:
        for choice in chunk.choices:
            text = texts.setdefault(choice.index, {"content": "", "reasoning_content": "", "finish_reason": ""})
            for name in ("content", "reasoning_content"):
                text[name] += getattr(choice.delta, name, None) or ""
            text["finish_reason"] += choice.finish_reason or ""
        usage = chunk.usage or usage
    return texts, usage


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [DEMO_MODEL]
    assert client.models.retrieve(DEMO_MODEL).owned_by == "dsengine"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4o")
    assert error.value.code == "model_not_found" and error.value.param == "model"


@pytest.mark.parametrize("thinking", [True, False])
def test_chat_streams_what_it_answers_whole(client: OpenAI, thinking: bool) -> None:
    asked = GREEDY | {"extra_body": {"chat_template_kwargs": {"thinking": thinking}, "ignore_eos": True}}
    whole = client.chat.completions.create(messages=QUESTION, max_completion_tokens=24, **asked)
    assert whole.usage and whole.usage.completion_tokens == 24 and whole.choices[0].finish_reason == "length"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 24
    texts, usage = fold(
        client.chat.completions.create(
            messages=QUESTION, max_tokens=24, stream=True, stream_options={"include_usage": True}, **asked
        )
    )
    message = whole.choices[0].message
    assert texts[0]["content"] == (message.content or "")
    assert texts[0]["reasoning_content"] == (getattr(message, "reasoning_content", None) or "")
    assert texts[0]["finish_reason"] == "length"
    assert usage.completion_tokens == 24 and usage.prompt_tokens == whole.usage.prompt_tokens
    if thinking:
        assert usage.completion_tokens_details.reasoning_tokens > 0 and texts[0]["reasoning_content"]
    else:
        assert usage.completion_tokens_details.reasoning_tokens == 0 and texts[0]["content"]


def test_seed_decides_the_draws_and_n_draws_differ(client: OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        answer = client.completions.create(
            model=DEMO_MODEL,
            prompt="Once",
            max_tokens=12,
            n=3,
            seed=seed,
            temperature=1.5,
            extra_body={"ignore_eos": True},
        )
        return [choice.text for choice in answer.choices]

    first = draw(7)
    assert draw(7) == first
    assert len(set(first)) > 1
    assert draw(8) != first


def test_stop_string(server: ServerProcess, client: OpenAI) -> None:
    text = client.completions.create(prompt="1 + 2 =", max_tokens=24, **GREEDY).choices[0].text
    start = len(text) // 2
    stop = text[start : start + 3]
    answer = client.completions.create(prompt="1 + 2 =", max_tokens=24, stop=[stop, "never in there"], **GREEDY)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(stop)]
    # The client's own model of a streamed completion does not know that finish_reason is null until the end.
    lenient = server.openai(strict=False)
    parts = lenient.completions.create(prompt="1 + 2 =", max_tokens=24, stop=stop, stream=True, **GREEDY)
    assert "".join(part.choices[0].text for part in parts) == text[: text.index(stop)]


def test_chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(messages=QUESTION, max_tokens=8, logprobs=True, top_logprobs=3, **GREEDY)
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 8
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy takes the likeliest
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
    streamed = client.chat.completions.create(
        messages=QUESTION, max_tokens=8, logprobs=True, top_logprobs=3, stream=True, **GREEDY
    )
    tokens = [e.token for part in streamed for c in part.choices if c.logprobs for e in c.logprobs.content or []]
    assert tokens == [entry.token for entry in entries]


def test_completions_echo_and_logprobs_score_a_prompt(server: ServerProcess) -> None:
    client = server.openai(strict=False)  # its model does not know that a prompt's first logprob is null
    prompt = "What is 3 + 4?"
    answer = client.completions.create(prompt=prompt, max_tokens=2, echo=True, logprobs=2, **GREEDY).choices[0]
    assert answer.text.startswith(prompt) and answer.logprobs
    lists = answer.logprobs
    assert lists.tokens and lists.token_logprobs and lists.top_logprobs and lists.text_offset
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset)
    assert lists.token_logprobs[0] is None and all(value <= 0 for value in lists.token_logprobs[1:])
    assert all(lists.tokens[i] in lists.top_logprobs[i] for i in range(1, len(lists.tokens)))
    assert "".join(lists.tokens[1:]) == answer.text  # BOS is in the tokens, not in the text
    only = client.completions.create(prompt=prompt, max_tokens=0, echo=True, logprobs=2, **GREEDY)
    assert only.choices[0].text == prompt and only.usage and only.usage.completion_tokens == 0
    assert only.choices[0].logprobs and only.choices[0].logprobs.token_logprobs == lists.token_logprobs[:-2]


def test_completions_take_prompts_in_every_form(server: ServerProcess, client: OpenAI) -> None:
    texts = ["2 + 2 =", "Hello"]
    token_ids = [httpx.post(server.url + "/tokenize", json={"prompt": text}).json()["tokens"] for text in texts]
    forms: list[Any] = [texts, token_ids]
    answers = [client.completions.create(prompt=form, max_tokens=6, n=2, **GREEDY) for form in forms]
    assert [c.index for c in answers[0].choices] == [0, 1, 2, 3]
    assert [c.text for c in answers[0].choices] == [c.text for c in answers[1].choices]
    assert answers[0].usage == answers[1].usage
    singles: list[Any] = [texts[0], token_ids[0]]
    for form in singles:
        answer = client.completions.create(prompt=form, max_tokens=6, **GREEDY)
        assert [c.text for c in answer.choices] == [answers[0].choices[0].text]


def test_a_repeated_prompt_is_found_in_the_cache(client: OpenAI) -> None:
    prompt = "The numbers are " + ", ".join(str(i) for i in range(100, 160)) + "."
    for expected in (False, True):
        answer = client.completions.create(prompt=prompt, max_tokens=1, **GREEDY)
        assert answer.usage and answer.usage.prompt_tokens_details
        assert bool(answer.usage.prompt_tokens_details.cached_tokens) is expected
    salted = GREEDY | {"extra_body": {"cache_salt": "mine"}}
    answer = client.completions.create(prompt=prompt, max_tokens=1, **salted)
    assert answer.usage and answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_prompts_that_do_not_fit(client: OpenAI) -> None:
    for prompt in ("x " * 9000, "x" * 2_000_000):
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(prompt=prompt, **GREEDY)
        assert error.value.code == "context_length_exceeded" and error.value.param == "prompt"
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **GREEDY)
        assert error.value.code == "context_length_exceeded" and error.value.param == "messages"


def test_state_routes(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/health_generate").json() == {"status": "ok"}
        info = http.get("/server_info").json()
        assert info["model"] == DEMO_MODEL and info["engine"]["kernels"] and info["stats"]["num_blocks"] > 0
        text = "What is 1 + 1? 😀"
        tokens = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
        assert tokens["count"] == len(tokens["tokens"])
        assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
        assert http.post("/flush_cache").json()["flushed"] is not False
        assert server.stats()["num_blocks_cached"] == 0
        metrics = dict(
            line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if not line.startswith("#")
        )
        assert float(metrics["dsengine_num_requests_running"]) == 0
        assert float(metrics["dsengine_generation_tokens_total"]) > 0
        assert float(metrics["dsengine_time_to_first_token_seconds_count"]) > 0


def test_64_streams_of_which_a_third_leave(server: ServerProcess) -> None:
    """Survivors get what they get alone; those who leave free their blocks."""
    rng = random.Random(3)
    prompts = [f"What is {i} + {i + 1}?" for i in range(8)]
    alone = {
        prompt: server.openai().completions.create(prompt=prompt, max_tokens=16, **GREEDY).choices[0].text
        for prompt in prompts
    }
    leavers = set(rng.sample(range(64), 22))

    async def stream(client: AsyncOpenAI, index: int) -> str:
        text = ""
        budget = 400 if index in leavers else 16
        patience = rng.randint(0, 5)
        answer = await client.completions.create(prompt=prompts[index % 8], max_tokens=budget, stream=True, **GREEDY)
        async for chunk in answer:
            text += chunk.choices[0].text
            patience -= 1
            if index in leavers and patience < 0:
                await answer.close()
                break
        return text

    async def everyone() -> list[str]:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=200) as client:
            return await asyncio.gather(*(stream(client, i) for i in range(64)))

    texts = asyncio.run(everyone())
    for index, text in enumerate(texts):
        if index not in leavers:
            assert text == alone[prompts[index % 8]], index
    wait_until(server.is_idle, MAX_SECONDS_TO_ABORT, lambda: str(server.stats()))
    assert httpx.post(server.url + "/flush_cache").status_code == 200
    assert server.stats()["num_blocks_cached"] == server.stats()["num_blocks_in_use"] == 0


def raw_exchange(server: ServerProcess, *parts: bytes) -> bytes:
    """What comes back, until the server closes the connection."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=15) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.05)
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(65536):
                received += data
    return received


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_broken_http_is_refused(server: ServerProcess, request_bytes: bytes) -> None:
    assert raw_exchange(server, request_bytes).split(b" ")[1][:1] == b"4"


def test_bodies_that_are_too_large_are_cut_off(server: ServerProcess) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    announced = raw_exchange(server, head + b"Content-Length: 99999999\r\n\r\n")
    assert announced.startswith(b"HTTP/1.1 413") and b"body_too_large" in announced
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        streamed = raw_exchange(server, head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 9)
        assert streamed.startswith(b"HTTP/1.1 413")
    assert server.health() == 200


@pytest.mark.slow
@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_headers_that_do_not_end_are_given_up(server: ServerProcess, first: bytes) -> None:
    started = time.monotonic()
    raw_exchange(server, first, b"GET /health HTTP/1.1\r\nHost: ")
    assert 5 < time.monotonic() - started < 14


def test_leaving_an_unstreamed_request_aborts_it(server: ServerProcess) -> None:
    body = GREEDY["extra_body"] | {"model": DEMO_MODEL, "prompt": "Hello", "max_tokens": 8000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", json=body, timeout=0.5)
    wait_until(server.is_idle, MAX_SECONDS_TO_ABORT, lambda: str(server.stats()))
