"""Replays that are requests: what other servers did with them is in the name, what ours must do is in the code."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from asgi_calls import call, tokenizer
from incident_rig import ADMIN_KEY, CHAT, COMPLETE, KEY, RESPONSES, Rig, chat, complete, replay, source
from server_helpers import ScriptedEngine, make_app

from dsengine.server.app import App
from dsengine.server.grammar.compiler import GrammarCompiler
from dsengine.server.tools.formats import PARSERS


def chat_replay(name: str, **fields: Any) -> None:
    """A field of a chat that is refused before the engine hears of it."""

    @replay(name)
    async def refused(rig: Rig) -> None:
        await rig.chat_refused(**fields)


def complete_replay(name: str, **fields: Any) -> None:
    @replay(name)
    async def refused(rig: Rig) -> None:
        await rig.refused(COMPLETE, complete(**fields))


def body_replay(name: str, body: bytes) -> None:
    @replay(name)
    async def refused(rig: Rig) -> None:
        await rig.refused(CHAT, body)


def _with_type(kind: str, value: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, kind: value}]}]


def _schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def _nested(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


# Code of clients, and tensors of theirs.
chat_replay("7 CVE-2026-7304 SGLang: a logit processor in the request", custom_logit_processor='{"callable": "8004"}')
chat_replay("8 CVE-2026-5760 SGLang: a chat template in the request", chat_template="{{ ''.__class__.__mro__ }}")
chat_replay(
    "8 CVE-2024-34359 llama-cpp-python: a template among the switches", chat_template_kwargs={"template": "{{x}}"}
)
chat_replay("12 CVE-2025-62164 vLLM: embeddings as base64", prompt_embeds="UEsDBBQ=")
complete_replay("12 GHSA-33cg-gxv8-3p8g vLLM: embeddings in place of a prompt", prompt_embeds=["UEsDBBQ="])
chat_replay("30 CVE-2026-10300 SGLang: a path of an adapter", lora_path="../../etc/passwd")
chat_replay("30 CVE-2024-37032 Ollama: a path as the model's digest", model="../../../etc/x\x00", digest="sha256:../x")
chat_replay("44 CVE-2025-61620 vLLM: a template of loops", chat_template="{% for i in range(10**9) %}a{% endfor %}")
chat_replay("44 CVE-2025-62426 vLLM: chat_template_kwargs.tokenize", chat_template_kwargs={"tokenize": True})
chat_replay("10 CVE-2025-66448 vLLM: trust_remote_code in the request", trust_remote_code=True)

# URLs: a text model fetches nothing.
METADATA = {"url": "http://169.254.169.254/latest/meta-data/"}
chat_replay("28 CVE-2025-6242 vLLM: an image behind a URL", messages=_with_type("image_url", METADATA))
chat_replay("28 CVE-2026-24779 vLLM: a URL that parsers read differently", messages=_with_type(
    "image_url", {"url": "http://a.example\\@169.254.169.254/"}))  # fmt: skip
chat_replay("28 CVE-2026-33626 LMDeploy: a video behind a URL", messages=_with_type("video_url", METADATA))
chat_replay("28 GHSA-v359-jj2v-j536 vLLM: audio behind a file URL", messages=_with_type(
    "input_audio", {"data": "file:///etc/passwd", "format": "wav"}))  # fmt: skip
chat_replay("49 CVE-2026-22773 vLLM: an image of one pixel", messages=_with_type(
    "image_url", {"url": "data:image/png;base64,iVBORw0KGgo="}))  # fmt: skip
chat_replay("26 CVE-2026-22778 vLLM: a broken image, whose error showed an address", messages=_with_type(
    "image_url", {"url": "data:image/jpeg;base64,AAAA"}))  # fmt: skip


@replay("28 CVE-2026-0599 TGI: a markdown image in the text")
async def _markdown_image(rig: Rig) -> None:
    text = f"![a]({METADATA['url']})"
    answer = await rig.post(CHAT, chat(messages=[{"role": "user", "content": text}]))
    assert answer.status == 200, answer.text  # it is text, and nothing is fetched: see G17


# Numbers without end.
for number in (10**9, 0, -1, 129, 2**63, 16_384):
    chat_replay(f"31 CVE-2026-34756 vLLM: n = {number}", n=number)
complete_replay("32 CVE-2024-8939 vLLM: best_of without end", best_of=10**6)
complete_replay("32 CVE-2024-8768 vLLM: an empty prompt of token ids", prompt=[])
complete_replay("32 CVE-2024-8768 vLLM: a list of empty prompts", prompt=[[]])
complete_replay("15 CVE-2026-21869 llama-server: a negative n_discard", n_discard=-1)
complete_replay("15 llama-server: a negative token id", prompt=[-1])
complete_replay("36 GHSA-8wr5-jm2h-8r4f vLLM: a token id past the vocabulary", prompt=[10**6])
complete_replay("33 vLLM: more prompts than may be", prompt=["a"] * 1025)
chat_replay("33 vLLM: more stop strings than may be", stop=["a"] * 17)
chat_replay("33 vLLM: bad_words without end", bad_words=["a"] * 10**5)
chat_replay("33 vLLM: stop_token_ids without end", stop_token_ids=[5] * 10**5)
chat_replay("33 vLLM: min_tokens beyond the context", min_tokens=2**31 - 1)
chat_replay("33 vLLM: a logit_bias for every token", logit_bias={str(i): 1 for i in range(1025)})
chat_replay("33 vLLM: top_logprobs without end", logprobs=True, top_logprobs=10**6)
for literal in ("NaN", "Infinity", "-Infinity", "1e999"):
    body_replay(f"34 GHSA-7h4p-rffg-7823 vLLM: temperature {literal}", json.dumps(chat()).encode()[:-1]
                + f', "temperature": {literal}}}'.encode())  # fmt: skip

# Documents that parsers read differently, or for ever.
body_replay("F16: ten thousand levels", b'{"messages": ' + b"[" * 10**4)
body_replay("F16: UTF-16", json.dumps(chat()).encode("utf-16"))
body_replay("F16: duplicate keys", json.dumps(chat()).encode()[:-1] + b', "model": "other"}')
body_replay("F16: an integer of 5,000 digits", json.dumps(chat()).encode()[:-1] + b', "seed": ' + b"1" * 5000 + b"}")
body_replay("F16: broken UTF-8", json.dumps(chat()).encode().replace(b"hi", b"\xff\xfe"))
body_replay("46 a lone surrogate", json.dumps(chat()).encode().replace(b"hi", b"\\ud800"))


@replay("27 vLLM: a body of 4 KB that made 12,001 errors of 23 MB")
async def _amplified(rig: Rig) -> None:
    for body in (chat(messages=[{}] * 2000), chat(messages=[1] * 4000), {f"x{i}": 1 for i in range(3000)}):
        assert len((await rig.refused(CHAT, body)).body) <= 4096


@replay("45 vLLM, SGLang: a prompt of 5 MB tokenised on the event loop")
async def _long_prompt(rig: Rig) -> None:
    start = time.process_time()
    answer = await rig.refused(COMPLETE, complete(prompt="a " * 2_500_000))
    assert "context" in answer.text and time.process_time() - start < 1.0


@replay("F15: a body larger than the limit")
async def _large_body(rig: Rig) -> None:
    limit = rig.app.service.config.max_body_bytes
    await rig.refused(COMPLETE, b" " * (limit + 1), 413)


@replay("F15: a compressed body")
async def _compressed(rig: Rig) -> None:
    answer = await rig.post(CHAT, b"\x1f\x8b", **{"content-encoding": "gzip"})
    assert answer.status == 415


@replay("48 CVE-2024-24762 python-multipart: a form")
async def _form(rig: Rig) -> None:
    answer = await rig.post(CHAT, b"a=b", **{"content-type": "multipart/form-data; boundary=" + "x" * 5000})
    assert answer.status == 415


@replay("48 CVE-2025-62727 Starlette: ranges without end")
async def _ranges(rig: Rig) -> None:
    ranges = "bytes=" + ",".join(f"{i}-" for i in range(5000))
    for path in ("/", "/v1/models", "/metrics"):
        assert (await call(rig.app, "GET", path, headers={"range": ranges})).status in (200, 431)


@replay("47 CVE-2025-48956 vLLM: an enormous header")
async def _header(rig: Rig) -> None:
    assert (await call(rig.app, "GET", "/v1/models", headers={"x": "y" * 70_000})).status == 431


# Keys.
@replay("19 CVE-2026-48746 vLLM, CVE-2026-48710 Starlette: a Host that moves the path")
async def _bad_host(rig: Rig) -> None:
    for host in ("localhost/health?x=", "x/health#", "/health"):
        assert (await call(rig.guarded, "GET", "/v1/models", headers={"host": host})).status == 401


@replay("20 CVE-2025-59425 vLLM: keys compared byte by byte")
async def _prefix_of_key(rig: Rig) -> None:
    code = source()[Path("dsengine/server/front_door.py")]
    assert "hmac.compare_digest(given, digest)" in code and "hashlib.sha256(key)" in code
    assert await _status(rig.guarded, KEY[:-1]) == 401


@replay("21 SGLang: a key that is not ASCII")
async def _non_ascii(rig: Rig) -> None:
    assert await _status(rig.guarded, "é") == 401
    assert await _status(rig.guarded, KEY.encode().decode("latin-1")) == 200


@replay("22 vLLM: routes that the key did not guard")
async def _unguarded(rig: Rig) -> None:
    paths = ["/invocations", "/pause", "/update_weights", "/metrics", "/tokenize", "/collective_rpc", "/openapi.json"]
    for path in [*rig.guarded.routes.openapi()["paths"], *paths]:
        for method in ("GET", "POST", "PUT", "DELETE"):
            status = (await call(rig.guarded, method, path)).status
            assert status == (401 if path != "/health" else 200 if method == "GET" else 405), (method, path, status)


@replay("23 SGLang: administration without a key, and by GET")
async def _admin(rig: Rig) -> None:
    for path in ("/abort_request", "/pause", "/continue", "/update_weights_from_disk", "/set_internal_state"):
        assert (await call(rig.app, "POST", path, b"{}")).status == 404
        assert (await call(rig.guarded, "POST", path, b"{}", _bearer(KEY.encode().decode("latin-1")))).status in (
            401,
            404,
        )
        assert (await call(rig.guarded, "GET", path, headers=_bearer(ADMIN_KEY))).status != 200
    assert (await call(rig.app, "GET", "/flush_cache")).status == 405


@replay("16 CVE-2026-27482 Ray: a method that the list forgot")
async def _methods(rig: Rig) -> None:
    for method in ("DELETE", "PATCH", "TRACE", "CONNECT", "get", "PROPFIND"):
        assert (await call(rig.guarded, method, "/v1/models")).status == 401


@replay("24 CVE-2025-46570 vLLM: a shared prefix shows in the time to the first token")
async def _salts(rig: Rig) -> None:
    engine = ScriptedEngine(tokenizer())
    app = make_app(engine, api_key=("one", "two"))
    for key in ("one", "two"):
        body = json.dumps(complete()).encode()
        assert (await call(app, "POST", COMPLETE, body, _bearer(key))).status == 200
    salts = [salt for _, _, salt in engine.seen.values()]
    assert len(set(salts)) == 2 and "" not in salts
    await app.service.close()


@replay("29 CVE-2020-7694 uvicorn: lines of the log in the path")
async def _log_lines(rig: Rig) -> None:
    assert (await call(rig.app, "GET", "/a\r\nHTTP 200 forged\x1b[2J")).status == 404


@replay("29 labels of metrics that clients choose")
async def _labels(rig: Rig) -> None:
    async def series() -> int:
        text = (await call(rig.app, "GET", "/metrics")).text
        return sum(not line.startswith("#") for line in text.splitlines())

    await call(rig.app, "GET", "/nowhere")
    await rig.post(CHAT, chat(model="other"))
    before = await series()
    for number in range(50):
        await call(rig.app, "GET", f"/nowhere{number}")
        await rig.post(CHAT, chat(model=f"other{number}"))
    assert await series() == before


@replay("F19: an id of a request that the client chose")
async def _request_id(rig: Rig) -> None:
    for given, kept in (("a-1", True), ("a\r\nX: y", False), ("x" * 129, False)):
        answer = await call(rig.app, "GET", "/health", headers={"x-request-id": given})
        assert (answer.headers[b"x-request-id"] == given.encode()) is kept
    for _ in range(2):
        assert (await rig.post(CHAT, chat(), **{"x-request-id": "same"})).status == 200


# Grammars.
@replay("37 CVE-2025-48942 vLLM: a schema that is none")
async def _bad_schema(rig: Rig) -> None:
    await rig.chat_refused(response_format=_schema({"type": "frog"}))


@replay("37 CVE-2025-48943 vLLM: a regular expression that is none")
async def _bad_regex(rig: Rig) -> None:
    await rig.chat_refused(response_format={"type": "regex", "pattern": "(["})


@replay("37 CVE-2025-48944 vLLM: a tool whose pattern is none")
async def _bad_tool_pattern(rig: Rig) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string", "pattern": "(["}}}}
    tools = [{"type": "function", "function": function}]
    await rig.chat_refused(tools=tools, tool_choice="required")


for depth in (65, 400, 800):
    chat_replay(f"39 CVE-2026-25048 xgrammar: arrays of {depth} levels", response_format=_schema(_nested(depth)))
for count in (1001, 20_000, 50_000):
    chat_replay(f"39 xgrammar: an enum of {count} values", response_format=_schema(
        {"enum": [f"v{i}" for i in range(count)]}))  # fmt: skip
chat_replay("39 xgrammar: two thousand properties", response_format=_schema(
    {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}}))  # fmt: skip
chat_replay("39 llama.cpp #26600: 60,000 parentheses", response_format={"type": "grammar", "grammar": "(" * 60_000})


@replay("39 CVE-2025-57809 xgrammar: left recursion")
async def _left_recursion(rig: Rig) -> None:
    answer = await rig.post(CHAT, chat(response_format={"type": "grammar", "grammar": 'root ::= root "a" | "b"'}))
    assert answer.status in (200, 400), answer.status


@replay("38 GHSA-rwxx-mrjm-wc2m vLLM: a regular expression whose automaton explodes")
async def _explosion(rig: Rig) -> None:
    start = time.monotonic()
    answer = await rig.post(CHAT, chat(response_format={"type": "regex", "pattern": "(a|b)*a" + "(a|b)" * 400}))
    assert answer.status in (200, 400) and time.monotonic() - start < 30


@replay("40 CVE-2025-29770 vLLM: a cache of grammars without end")
def _grammar_cache(rig: Rig) -> None:
    from dsengine.server.grammar import compiler

    assert 0 < compiler._CACHE_BYTES <= 1024**3 and 0 < compiler._CACHE_ENTRIES <= 10**5
    assert GrammarCompiler._keep.__code__.co_names.count("popitem") == 1


# Parsers of what the model says.
def parser_replay(name: str, text: str) -> None:
    @replay(name)
    def linear(rig: Rig) -> None:
        for parser in PARSERS.values():
            one = parser()
            start = time.process_time()
            one.push(text)
            one.finish()
            assert time.process_time() - start < 1.0, parser


parser_replay("41 CVE-2025-48887 vLLM: calls as Python that backtrack", "[f(a=" + "'" * 200_000)
parser_replay("42 vLLM PR 55473: one beginning and many separators",
              "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>" + "<｜tool▁sep｜>" * 40_000)  # fmt: skip


@replay("43 GHSA-23f4-rc72-636c vLLM: an argument of 32,000 characters, rescanned per token")
def _long_argument(rig: Rig) -> None:
    parser = PARSERS["deepseekv31"]()
    parser.push('<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "')
    start = time.process_time()
    for _ in range(32_000):
        parser.push("x")
    assert time.process_time() - start < 2.0


@replay("13 CVE-2025-9141 vLLM: arguments that were evaluated")
async def _arguments(rig: Rig) -> None:
    code = "__import__('os').system('x')"
    text = f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{code}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    app = make_app(ScriptedEngine(tokenizer(), text))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    answer = await call(app, "POST", CHAT, json.dumps(chat(tools=tools)).encode())
    (tool_call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert tool_call["function"]["arguments"] == code
    await app.service.close()


# Engines that die, and clients that leave.
@replay("51 vLLM 39863: the engine is dead, and the server says it is well")
async def _dead_engine(rig: Rig) -> None:
    engine = ScriptedEngine(tokenizer())
    engine.is_alive = False
    app = make_app(engine)
    assert (await call(app, "GET", "/health")).status == 503
    for path, body in ((CHAT, chat()), (COMPLETE, complete()), (RESPONSES, {"model": "scripted", "input": "a"})):
        answer = await call(app, "POST", path, json.dumps(body).encode())
        assert answer.status == 503 and b"retry-after" in answer.headers, (path, answer.status)
    await app.service.close()


@replay("F7: the engine dies in the middle of a stream")
async def _dies(rig: Rig) -> None:
    engine = ScriptedEngine(tokenizer(), "one two three four five six")
    engine.die_at = 3
    app = make_app(engine)
    answer = await call(app, "POST", CHAT, json.dumps(chat(stream=True)).encode())
    assert re.search(r'"error":\{.*engine_unavailable', answer.text) and "[DONE]" not in answer.text
    await app.service.close()


async def _status(app: App, key: str) -> int:
    return (await call(app, "GET", "/v1/models", headers=_bearer(key))).status


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
