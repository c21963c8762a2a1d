"""G2: requests made from OpenAI's own document; every answer and every error is valid against it."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

from asgi_calls import Answer, call, tokenizer
from fuzzed_bodies import mangled, mutated
from gate_frame import Findings, Outcome, Scale, saved_cases
from openai_document import OpenAIDocument
from server_helpers import MODEL, ScriptedEngine, make_app

from dsengine.server.app import App

TITLE = "requests from OpenAI's own document"
TARGET = ">= 1,500 cases: 0 x 5xx, every answer and every error valid against it"
REQUIRED: dict[str, dict[str, Any]] = {
    "/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
    "/completions": {"model": MODEL, "prompt": "hi"},
}
SCRIPT = "Well, <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"


def run(scale: Scale, seed: int) -> Outcome:
    if scale.openai_spec is None:
        return Outcome("no document: give --openai-spec FILE or set OPENAI_OPENAPI_JSON", None)
    document = OpenAIDocument(scale.openai_spec)
    return asyncio.run(_run(document, scale.of(1_600, 200), random.Random(seed)))


async def _run(document: OpenAIDocument, num_cases: int, rng: random.Random) -> Outcome:
    found, statuses = Findings("G2"), Counter[int]()
    apps = [make_app(ScriptedEngine(tokenizer(), text, tokens_per_update=4)) for text in ("Well.", SCRIPT)]
    judge = _Judge(document, found, statuses)
    try:
        for _, case in saved_cases("G2"):
            route, _, saved = case.partition(b"\n")
            await judge.post(apps[0], route.decode(), saved)
        for path in ("/models", f"/models/{MODEL}", "/models/other"):
            await judge.get(apps[0], path)
        while found.num_cases < num_cases:
            path = rng.choice(list(REQUIRED))
            made = document.request(path, rng, REQUIRED[path])
            body = json.dumps(made).encode()
            if (kind := rng.random()) < 0.15:
                body = mangled(made, rng)
            elif kind < 0.3:
                body = json.dumps(mutated(made, rng)).encode()
            await judge.post(rng.choice(apps), path, body)
    finally:
        for app in apps:
            await app.service.close()
    if statuses[200] < found.num_cases // 20:
        found.fail(f"only {statuses[200]} requests were answered: the answers prove nothing")
    num_5xx = sum(count for status, count in statuses.items() if status >= 500)
    num_errors = sum(statuses.values()) - statuses[200]
    return found.outcome(
        f"{found.num_cases:,} cases: {num_5xx} x 5xx, {statuses[200]} answers and {num_errors} errors, "
        f"{len(found.failures)} not valid"
    )


class _Judge:
    def __init__(self, document: OpenAIDocument, found: Findings, statuses: Counter[int]) -> None:
        self._found = found
        self._statuses = statuses
        self._error = document.validator("ErrorResponse")
        self._answers = {path: document.answer("post", path) for path in REQUIRED}
        self._events = {
            "/chat/completions": document.answer("post", "/chat/completions", "text/event-stream"),
            # The document does not describe a stream of completions; its chunks are completions.
            "/completions": document.answer("post", "/completions"),
        }
        self._models = document.answer("get", "/models")
        self._model = document.answer("get", "/models/{model}")

    async def get(self, app: App, path: str) -> None:
        answer = await call(app, "GET", "/v1" + path)
        validator = self._models if path == "/models" else self._model
        self._count(answer, self._problem(answer, validator), path.encode())

    async def post(self, app: App, path: str, body: bytes) -> None:
        answer = await call(app, "POST", "/v1" + path, body)
        self._count(answer, self._problem(answer, self._answers[path], path), path.encode() + b"\n" + body)

    def _count(self, answer: Answer, problem: str | None, case: bytes) -> None:
        self._found.num_cases += 1
        self._statuses[answer.status] += 1
        if problem is not None:
            self._found.fail(f"{case[:200]!r}: {answer.status}: {problem[:600]}", case, "txt")

    def _problem(self, answer: Answer, validator: Any, path: str = "") -> str | None:
        if answer.status >= 500:
            return answer.text
        if answer.status >= 400:
            return _first_error(self._error, answer.json())
        if answer.headers[b"content-type"].startswith(b"text/event-stream"):
            lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
            events = (_completion(json.loads(line)) if path == "/completions" else json.loads(line) for line in lines)
            return next(filter(None, (_first_error(self._events[path], event) for event in events)), None)
        return _first_error(validator, answer.json())


def _completion(chunk: dict[str, Any]) -> dict[str, Any]:
    """A chunk with the reason for its end, which it has only when it is the last."""
    return chunk | {"choices": [c | {"finish_reason": c["finish_reason"] or "stop"} for c in chunk["choices"]]}


def _first_error(validator: Any, value: Any) -> str | None:
    error = next(iter(validator.iter_errors(value)), None)
    return None if error is None else f"{error.json_path}: {error.message}"
