"""G3: mutated bodies on every generating route, and every published bound at, below and above itself."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from asgi_calls import call, complaint, tokenizer
from fuzzed_bodies import ROUTES, mangled, mutated
from gate_frame import Findings, Outcome, Scale, saved_cases
from server_helpers import ScriptedEngine, make_app

from dsengine.server.app import App

TITLE = "mutated bodies on all generating routes"
TARGET = "50,000 bodies: 0 x 5xx, errors <= 4 KiB, no path or address in them"
SCRIPT = "Well, <｜tool▁calls▁begin｜> no."
# The context, which is smaller, bounds it first.
MASKED = {"min_tokens"}
# What fields need beside them to be taken.
COMPANIONS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"logprobs": True},
    "/v1/completions": {"prompt": "a", "echo": True},
    "/v1/responses": {"include": ["message.output_text.logprobs"]},
}


def run(scale: Scale, seed: int) -> Outcome:
    return asyncio.run(_run(scale.of(50_000, 1_500), random.Random(seed)))


async def _run(num_bodies: int, rng: random.Random) -> Outcome:
    engine = ScriptedEngine(tokenizer(), SCRIPT, tokens_per_update=8)
    engine.config = dataclasses.replace(engine.config, max_running_requests=128)
    app = make_app(engine)
    found, statuses = Findings("G3"), Counter[int]()
    bounds = list(_bounds(app))
    try:
        for _, case in saved_cases("G3"):
            route, _, saved = case.partition(b"\n")
            await _try(app, found, statuses, route.decode(), saved)
        for path, body, expected in bounds:
            status = await _try(app, found, statuses, path, body)
            if (status == 200) != expected:
                found.fail(f"{path} answers {status} to {body[-120:]!r}, against its own schema")
        while found.num_cases < num_bodies:
            path = rng.choice(list(ROUTES))
            body = mangled(ROUTES[path], rng) if rng.random() < 0.6 else json.dumps(mutated(ROUTES[path], rng)).encode()
            await _try(app, found, statuses, path, body)
            if engine.running:
                found.fail(f"{path} left a request running", _case(path, body), "txt")
                engine.running.clear()
    finally:
        await app.service.close()
    if statuses[200] < found.num_cases // 100:
        found.fail(f"only {statuses[200]} bodies were answered: the mutations reach nothing behind the parser")
    num_5xx = sum(count for status, count in statuses.items() if status >= 500)
    return found.outcome(
        f"{found.num_cases:,} bodies ({len(bounds)} at bounds): {num_5xx} x 5xx, {statuses[200]:,} answered, "
        f"{statuses[400]:,} x 400, {len(found.failures)} complaints"
    )


async def _try(app: App, found: Findings, statuses: Counter[int], path: str, body: bytes) -> int:
    answer = await call(app, "POST", path, body)
    found.num_cases += 1
    statuses[answer.status] += 1
    if wrong := complaint(path, answer):
        found.fail(f"{path}: {wrong}", _case(path, body), "txt")
    return answer.status


def _case(path: str, body: bytes) -> bytes:
    return path.encode() + b"\n" + body


def _bounds(app: App) -> Iterator[tuple[str, bytes, bool]]:
    """Bodies with one number at, below or above a published bound, and whether the route must take it."""
    document = app.routes.openapi()
    for path in ROUTES:
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        fields = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]["properties"]
        for name, field in fields.items():
            if name in MASKED:
                continue
            for kind in field.get("anyOf", [field]):
                for value, taken in _edges(kind):
                    yield path, json.dumps(_plain(path) | {name: value}).encode(), taken


def _edges(schema: dict[str, Any]) -> list[tuple[float, bool]]:
    if schema.get("type") not in ("integer", "number"):
        return []
    step = 1 if schema["type"] == "integer" else 0.001
    edges: list[tuple[float, bool]] = []
    for name, outward in (("minimum", -step), ("maximum", step)):
        if (bound := schema.get(name)) is not None and abs(bound) < 2**53:
            bound = int(bound) if step == 1 else bound
            edges += [(bound, True), (bound + outward, False)]
    if (bound := schema.get("exclusiveMinimum")) is not None:
        edges += [(bound, False), (bound + step, True)]
    return edges


def _plain(path: str) -> dict[str, Any]:
    kept: dict[str, Any] = {
        name: copy.deepcopy(ROUTES[path][name]) for name in ("model", "messages", "input") if name in ROUTES[path]
    }
    needed = {"max_tokens": 5} if path == "/v1/messages" else {}
    return kept | needed | COMPANIONS.get(path, {})
