"""What replays of incidents are made with: a server over a scripted engine, and the source of the engine."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from asgi_calls import Answer, call, complaint, tokenizer
from gate_frame import GATES_DIR
from server_helpers import MODEL, ScriptedEngine, make_app

ROOT = GATES_DIR.parents[1]
CHAT, COMPLETE, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
KEY, ADMIN_KEY = "sk-tést", "sk-admin"
REFUSED = (400, 404, 413, 415, 431)


class Rig:
    """An application with a key and an administrator, and one without."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine(tokenizer(), "Well.", tokens_per_update=4)
        self.app = make_app(self.engine)
        self.guarded = make_app(
            ScriptedEngine(tokenizer(), "Well."), api_key=KEY, admin_api_key=ADMIN_KEY, enable_admin=True
        )

    async def post(self, path: str, body: Any, **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await call(self.app, "POST", path, data, headers)

    async def refused(self, path: str, body: Any, code: int = 400) -> Answer:
        """The body is refused in words, with nothing given away, and the engine never hears of it."""
        before = len(self.engine.seen)
        answer = await self.post(path, body)
        problem = complaint(path, answer, (code,))
        assert problem is None, problem
        assert len(self.engine.seen) == before, "the engine heard of it"
        return answer

    async def chat_refused(self, **fields: Any) -> Answer:
        return await self.refused(CHAT, chat(**fields))


Replay = Callable[[Rig], Awaitable[object] | None]
REPLAYS: dict[str, Replay] = {}


def replay(name: str) -> Callable[[Replay], Replay]:
    """Registers a replay under the row and the name of its incident."""

    def register(function: Replay) -> Replay:
        assert name not in REPLAYS, name
        REPLAYS[name] = function
        return function

    return register


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | fields


def complete(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hi"} | fields


@functools.cache
def source() -> dict[Path, str]:
    """Every Python file of the engine; the rooms behind its links once."""
    files = (path for folder in ("dsengine", "kernels", "quant", "specdec") for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT): path.read_text("utf-8") for path in files}


def absent(pattern: str, allowed: Iterable[str] = ()) -> None:
    """No line of the engine's source matches, except in the files named."""
    expression = re.compile(pattern)
    hits = [
        f"{path}: {line.strip()}"
        for path, text in source().items()
        if str(path) not in allowed
        for line in text.splitlines()
        if expression.search(line)
    ]
    assert not hits, hits
