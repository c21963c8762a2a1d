"""Keys, limits, headers, ids, logs and counters: what every request passes, on every route."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from server_helpers import CHECKPOINT_DIR, MODEL, ScriptedEngine, client_of, make_app
from starlette.routing import Route
from test_bad_input import check_error

from dsengine.config import ServerConfig
from dsengine.server import front_door
from dsengine.server.app import App
from dsengine.server.web.page import PAGE_PATHS
from dsengine.tokenizer.tokenizer import Tokenizer

KEY = "sk-tést"
BODY = {"model": MODEL, "prompt": "hi"}


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(CHECKPOINT_DIR)


def app_of(**options: Any) -> App:
    return make_app(ScriptedEngine(tokenizer()), **options)


def send(app: App, method: str, path: str, **options: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client_of(app) as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


def every_route(app: App) -> list[tuple[str, str]]:
    routes = [route for route in app.routes.routes if isinstance(route, Route)]
    assert len(routes) == len(app.routes.routes) >= 12
    return [(method, route.path.replace("{model:path}", MODEL)) for route in routes for method in route.methods or ()]


def test_every_route_but_health_and_the_page_needs_the_key() -> None:
    app = app_of(api_key=KEY)
    wrong = [
        None, b"", b"Bearer", b"Bearer ", b"Bearer nope", f"Basic {KEY}".encode(), KEY.encode(),
        f"Bearer {KEY}x".encode(), "Bearer é".encode("latin-1"), b"Bearer " + b"k" * 60_000,
    ]  # fmt: skip
    elsewhere = [
        ("GET", "/nowhere"),
        ("GET", "http://test//health"),
        ("GET", "/health/"),
        ("GET", "/web/"),
        ("GET", "/web"),
    ]
    for method, path in every_route(app) + elsewhere:
        for value in wrong:
            headers = [] if value is None else [(b"authorization", value)]
            response = send(app, method, path, headers=headers)
            if path == "/health" or path in PAGE_PATHS:
                assert response.status_code == 200
                continue
            assert response.status_code == 401, (method, path, value)
            if path.startswith("/v1/messages"):
                assert response.json()["error"]["type"] == "authentication_error"
            elif method != "HEAD":
                assert check_error(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        if path.startswith("/v1/models"):
            right = [(b"authorization", f"bearer {KEY}".encode())]
            assert send(app, method, path, headers=right).status_code == 200
            assert send(app, method, path, headers=[*right, (b"authorization", b"Bearer x")]).status_code == 401


@pytest.mark.parametrize("host", ["localhost/health?x=", "localhost/health#", "x@/health", "/health", ""])
def test_the_host_header_opens_nothing(host: str) -> None:
    assert send(app_of(api_key=KEY), "GET", "/v1/models", headers={"host": host}).status_code == 401


def test_routes_are_the_ones_that_are_counted() -> None:
    from dsengine.server.metrics import ROUTES

    everything = app_of(enable_admin=True, admin_api_key="x")
    paths = {path for _, path in every_route(everything)} - {"/openapi.json", f"/v1/models/{MODEL}"} - PAGE_PATHS
    assert paths == set(ROUTES)


def test_openapi_describes_the_requests() -> None:
    document = send(app_of(), "GET", "/openapi.json").json()
    schema = document["components"]["schemas"]["ChatCompletionRequest"]
    assert schema["additionalProperties"] is False
    assert any(option.get("maximum") == 128 for option in schema["properties"]["n"]["anyOf"])


async def pieces(count: int, size: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b" " * size


def test_large_bodies_are_refused_before_and_while_they_arrive() -> None:
    app = app_of(max_body_bytes=1000)
    json_type = {"content-type": "application/json"}
    for options in (
        {"content": b" " * 1001},
        {"content": pieces(20, 100)},
        {"content": b"{}", "headers": json_type | {"content-length": "9" * 30}},
    ):
        response = send(app, "POST", "/v1/completions", **({"headers": json_type} | options))
        assert response.status_code == 413
        assert check_error(response)["code"] == "body_too_large"
    exact = json.dumps(BODY).encode().ljust(1000)
    assert send(app, "POST", "/v1/completions", content=exact, headers=json_type).status_code == 200


def test_slow_bodies_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_door, "BODY_SECONDS", 0.1)
    app = app_of()
    sent: list[Any] = []

    async def scenario() -> None:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": b"{", "more_body": True})

        async def collect(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
        await asyncio.wait_for(app(http_scope("/v1/completions", headers=headers), messages.get, collect), 5)

    asyncio.run(scenario())
    assert sent[0]["status"] == 408


def http_scope(path: str, *, method: str = "POST", headers: list[tuple[bytes, bytes]] | None = None) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers or [],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json; charset=UTF-8"}, 200),
        ({"content-type": "application/json", "content-encoding": "identity"}, 200),
        ({"content-type": "application/json", **{f"x-{i}": "y" for i in range(100)}}, 431),
        ({"content-type": "application/json", "x": "y" * 65536}, 431),
    ],
)
def test_headers(headers: dict[str, str], status: int) -> None:
    response = send(app_of(), "POST", "/v1/completions", content=json.dumps(BODY), headers=headers)
    assert response.status_code == status
    if status != 200:
        check_error(response)


def test_unknown_routes_and_methods_in_openais_shape() -> None:
    app = app_of()
    assert check_error(send(app, "GET", "/v1/nothing"))["code"] == "route_not_found"
    response = send(app, "GET", "/v1/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert check_error(response)["code"] == "method_not_allowed"
    assert send(app, "POST", "/v1/completions/", json=BODY).status_code == 404  # no redirect built from a Host header


def test_request_ids_are_echoed_only_if_harmless() -> None:
    app = app_of()
    assert send(app, "GET", "/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for evil in ("a" * 129, "a b", "é".encode("latin-1"), ""):
        answered = send(
            app, "GET", "/health", headers=[(b"x-request-id", evil if isinstance(evil, bytes) else evil.encode())]
        )
        assert len(answered.headers["x-request-id"]) == 32


def test_log_lines_cannot_be_forged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsengine.access")
    path = '/x"\r\n2026 INFO fake\x1b[31m'

    async def scenario() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def drop(message: Any) -> None:
            pass

        await app_of()(http_scope(path, method="GET"), receive, drop)

    asyncio.run(scenario())
    line = next(r.getMessage() for r in caplog.records if r.name == "dsengine.access")
    assert "\n" not in line and "\r" not in line and "\x1b" not in line
    assert json.loads(line)["path"] == path and json.loads(line)["status"] == 404


def test_clients_create_no_series() -> None:
    app = app_of()

    def series() -> set[str]:
        lines = send(app, "GET", "/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")}

    before = series()
    for i in range(20):
        send(app, "GET", f"/path{i}")
        send(app, "GET", f"/v1/models/model{i}")
        send(app, "POST", "/v1/completions", json=BODY | {"model": f"m{i}"})
        send(app, "POST", "/v1/completions", json=BODY)
    assert series() == before


def test_counters_add_up() -> None:
    app = app_of()
    answer = send(app, "POST", "/v1/completions", json=BODY | {"max_tokens": 3}).json()
    send(app, "POST", "/v1/completions", json=BODY | {"n": 0})
    text = send(app, "GET", "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["dsengine_prompt_tokens_total"]) == answer["usage"]["prompt_tokens"]
    assert float(values["dsengine_generation_tokens_total"]) == 3
    assert float(values['dsengine_sequences_total{finish_reason="length"}']) == 1
    assert float(values['dsengine_http_responses_total{route="/v1/completions",status="2xx"}']) == 1
    assert float(values['dsengine_http_responses_total{route="/v1/completions",status="4xx"}']) == 1
    assert float(values["dsengine_time_to_first_token_seconds_count"]) == 1
    assert float(values["dsengine_inter_token_latency_seconds_count"]) == 2


def test_keys_are_not_shown() -> None:
    app = app_of(api_key=KEY)
    right = [(b"authorization", f"Bearer {KEY}".encode())]
    assert KEY not in send(app, "GET", "/server_info", headers=right).text


def test_salts_of_different_keys_never_meet() -> None:
    def salt(**fields: Any) -> str:
        engine = ScriptedEngine(tokenizer())
        key = fields.pop("api_key")
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        response = send(
            make_app(engine, api_key=(key,) if key else ()),
            "POST",
            "/v1/completions",
            json=BODY | fields,
            headers=headers,
        )
        assert response.status_code == 200
        ((_, _, used),) = engine.seen.values()
        return used

    assert salt(api_key=None) == "" and salt(api_key=None, cache_salt="s") == "s"
    salts = [salt(api_key=key, cache_salt=s) for key in ("a", "b") for s in ("", "s")]
    assert len(set(salts)) == 4 and not {"", "s", "a", "b"} & set(salts)


def test_of_several_keys_each_has_a_salt_of_its_own() -> None:
    engine = ScriptedEngine(tokenizer())
    app = make_app(engine, api_key=("one", "two"))
    bodies = {
        "/v1/completions": BODY,
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "model": MODEL},
        "/v1/responses": {"input": "Hi", "model": MODEL},
        "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "model": MODEL, "max_tokens": 4},
    }
    salts: dict[str, set[str]] = {}
    for key, status in (("one", 200), ("two", 200), ("onetwo", 401), ("", 401)):
        for path, body in bodies.items():
            engine.seen.clear()
            assert send(app, "POST", path, json=body, headers={"Authorization": f"Bearer {key}"}).status_code == status
            salts.setdefault(key, set()).update(used for _, _, used in engine.seen.values())
    assert [len(found) for found in salts.values()] == [1, 1, 0, 0] and salts["one"] != salts["two"]
    with pytest.raises(ValueError, match="api_key is empty"):
        ServerConfig(api_key=("one", ""))
    with pytest.raises(ValueError, match="of their own"):
        ServerConfig(enable_admin=True, admin_api_key="two", api_key=("one", "two"))
