"""The admin routes: absent unless asked for, behind a key of their own, acting on what runs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from server_helpers import ScriptedEngine, client_of, make_app
from server_process import DEMO_MODEL, ServerProcess, running_server, wait_until
from test_answers import tokenizer

from dsengine.config import ServerConfig

PATHS = ("/abort_request", "/pause", "/continue", "/sleep", "/wake_up", "/update_weights_from_disk")
ADMIN = {"Authorization": "Bearer boss"}


def statuses(headers: dict[str, str], method: str = "POST", **options: Any) -> set[int]:
    async def ask() -> set[int]:
        async with client_of(make_app(ScriptedEngine(tokenizer()), **options)) as client:
            answers = [await client.request(method, path, headers=headers, json={}) for path in PATHS]
        return {answer.status_code for answer in answers}

    return asyncio.run(ask())


def test_absent_unless_asked_for() -> None:
    assert statuses({}) == {404}
    assert statuses({"Authorization": "Bearer key"}, api_key="key") == {404}
    assert statuses({}, api_key="key") == {401}


@pytest.mark.parametrize("api_key", [(), "key"])
def test_only_the_admin_key_opens_them(api_key: Any) -> None:
    options: dict[str, Any] = {"enable_admin": True, "admin_api_key": "boss", "api_key": api_key}
    for headers in ({}, {"Authorization": "Bearer key"}, {"Authorization": "Bearer bos"}, {"Authorization": "boss"}):
        assert statuses(headers, **options) == {401}
    assert 401 not in statuses(ADMIN, **options)
    assert statuses(ADMIN, "GET", **options) == {405}


def test_flags_that_make_no_sense_are_refused() -> None:
    several: list[dict[str, Any]] = [{"enable_admin": True}, {"admin_api_key": "x"}]
    for fields in several:
        with pytest.raises(ValueError, match="go together"):
            ServerConfig(**fields)
    with pytest.raises(ValueError, match="of their own"):
        ServerConfig(enable_admin=True, admin_api_key="x", api_key=("x",))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = ("--max-total-tokens", "16384", "--enable-admin", "--admin-api-key", "boss")
    with running_server(tmp_path_factory.mktemp("server"), *flags) as process:
        yield process


def admin(server: ServerProcess, path: str, **body: Any) -> Any:
    answer = httpx.post(server.url + path, json=body, headers=ADMIN, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


LONG: dict[str, Any] = {"model": DEMO_MODEL, "prompt": "x", "max_tokens": 8000, "extra_body": {"ignore_eos": True}}


def test_one_request_is_ended_and_another_goes_on(server: ServerProcess) -> None:
    client = server.openai(strict=False)
    first, second = (client.completions.create(stream=True, **LONG) for _ in range(2))
    response_id = next(iter(first)).id
    next(iter(second))
    assert admin(server, "/abort_request", request_id=response_id) == {"aborted": 1}
    assert admin(server, "/abort_request", request_id=response_id) == {"aborted": 0}
    with pytest.raises(openai.APIError, match="administrator"):
        for _ in first:
            pass
    next(iter(second))
    assert admin(server, "/abort_request", abort_all=True)["aborted"] == 1
    wait_until(server.is_idle, 5.0)
    for body in ({}, {"abort_all": False}, {"request_id": "x", "abort_all": True}):
        assert httpx.post(server.url + "/abort_request", json=body, headers=ADMIN).status_code == 400


def test_a_paused_engine_stands_still_and_goes_on_as_if_nothing_had_been(server: ServerProcess) -> None:
    client = server.openai()
    asked: dict[str, Any] = {"model": DEMO_MODEL, "prompt": "1 + 2 =", "max_tokens": 12, "temperature": 0}
    expected = client.completions.create(**asked).choices[0].text
    assert admin(server, "/pause") == {"paused": True}
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(client.completions.create(**asked).choices[0].text))
    thread.start()
    time.sleep(1.0)
    assert not texts and server.health() == 200
    assert admin(server, "/continue") == {"paused": False}
    thread.join(20)
    assert texts == [expected]
