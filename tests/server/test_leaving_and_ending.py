"""Clients that leave, clients that do not read, engines that die and servers that stop, one event at a time."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from server_helpers import CHECKPOINT_DIR, MODEL, ScriptedEngine, client_of, make_app
from test_front_door import http_scope

from dsengine.engine.sampling_params import SamplingParams
from dsengine.server import errors, metrics, responses
from dsengine.server.app import App
from dsengine.server.generation import Generation, Job
from dsengine.tokenizer.tokenizer import Tokenizer

SCRIPT = "one two three four five six seven eight nine ten"
JSON_HEADERS = [(b"content-type", b"application/json")]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_checkpoint(CHECKPOINT_DIR)


class Client:
    """Drives the application by hand: decides when to leave and when to read."""

    def __init__(self, app: App, path: str = "/v1/completions", **fields: Any) -> None:
        body = {"model": MODEL, "prompt": "hi", "max_tokens": 100} | fields
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self.sent: list[Any] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.task = asyncio.create_task(app(http_scope(path, headers=JSON_HEADERS), self._messages.get, self._send))

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        self.sent.append(message)

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 20)

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_leaving_aborts_at_once(stream: bool, begun: bool) -> None:
    async def scenario() -> None:
        tasks_before = asyncio.all_tasks()
        engine = ScriptedEngine(tokenizer(), SCRIPT)
        engine.hold_at = 3 if begun else 0
        client = Client(make_app(engine), stream=stream, n=2)
        await until(lambda: engine.num_held == 2)
        client.leave()
        await client.task
        assert not engine.running
        assert asyncio.all_tasks() == tasks_before
        if not stream:
            assert client.status == metrics.CLIENT_CLOSED_REQUEST

    run(scenario)


def test_one_leaver_harms_nobody() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(tokenizer(), SCRIPT)
        engine.hold_at = 3
        app = make_app(engine)
        clients = [Client(app, stream=True) for _ in range(10)]
        await until(lambda: engine.num_held == 10)
        for client in clients[::3]:
            client.leave()
        await asyncio.gather(*(client.task for client in clients[::3]))
        assert len(engine.running) == 6
        engine.resume.set()
        await asyncio.gather(*(client.task for client in clients))
        for index, client in enumerate(clients):
            assert client.body.endswith(b"data: [DONE]\n\n") is (index % 3 != 0)
        assert not engine.running

    run(scenario)


def test_a_client_that_does_not_read_costs_one_delta_and_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "STALL_SECONDS", 0.2)

    async def scenario() -> None:
        engine = ScriptedEngine(tokenizer(), SCRIPT)
        engine.hold_at = 3
        client = Client(make_app(engine), stream=True)
        await until(lambda: engine.num_held == 1)
        client.reads.clear()
        engine.resume.set()
        await asyncio.wait_for(client.task, 5)
        assert not engine.running
        assert not client.body.endswith(b"[DONE]\n\n")

    run(scenario)


def test_unread_updates_are_merged() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(tokenizer(), SCRIPT)
        app = make_app(engine)
        ids = tokenizer().encode("hi")
        params = SamplingParams(logprobs=0)
        generation = Generation(engine, [Job("a", ids, params), Job("b", ids, params)], app.service.metrics)  # type: ignore[arg-type]
        deltas = generation.deltas()
        first = await anext(deltas)
        await until(lambda: not engine.running)
        rest = [delta async for delta in deltas]
        assert len(rest) <= 3
        for index in (0, 1):
            mine = [delta for delta in (first, *rest) if delta.index == index]
            assert "".join(delta.text for delta in mine) == SCRIPT
            assert sum(len(delta.logprobs) for delta in mine) == sum(len(delta.token_ids) for delta in mine)
            assert mine[-1].finish_reason == "stop"

    run(scenario)


@pytest.mark.parametrize("after", [0, 5])
def test_an_engine_that_dies_is_told_to_everyone(after: int) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(tokenizer(), SCRIPT)
        engine.die_at = after
        app = make_app(engine)
        streamed = Client(app, stream=True)
        await streamed.task
        if after == 0:
            assert streamed.status == 503
        else:
            assert streamed.status == 200
            events = streamed.body.decode().split("\n\n")
            assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
            assert "[DONE]" not in events[-2]
        async with client_of(app) as client:
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/server_info")).status_code == 503
            assert (await client.get("/health_generate")).status_code == 503
            assert (await client.post("/flush_cache")).status_code == 503
            assert (await client.get("/metrics")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 200

    run(scenario)


def test_draining_refuses_the_new_and_finishes_the_old() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(tokenizer(), SCRIPT)
        engine.hold_at = 3
        app = make_app(engine)
        old = Client(app, stream=True)
        await until(lambda: engine.num_held == 1)
        app.service.lifecycle.draining = True
        async with client_of(app) as client:
            health = await client.get("/health")
            refused = await client.post("/v1/completions", json={"model": MODEL, "prompt": "hi"})
            assert health.status_code == refused.status_code == 503
            assert refused.headers["retry-after"] and refused.json()["error"]["code"] == "server_shutting_down"
        idle = asyncio.create_task(app.service.lifecycle.wait_idle())
        await asyncio.sleep(0.05)
        assert not idle.done()
        engine.resume.set()
        await idle
        await old.task
        assert old.body.endswith(b"data: [DONE]\n\n")

    run(scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_ending_at_once_tells_the_running(stream: bool) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(tokenizer(), SCRIPT)
        engine.hold_at = 3
        app = make_app(engine)
        client = Client(app, stream=stream)
        await until(lambda: engine.num_held == 1)
        app.service.lifecycle.abort_all(errors.shutting_down())
        await client.task
        assert not engine.running
        assert b"server_shutting_down" in client.body
        assert client.status == (200 if stream else 503)
        late = Client(app, stream=stream)
        await late.task
        assert late.status == 503

    run(scenario)
