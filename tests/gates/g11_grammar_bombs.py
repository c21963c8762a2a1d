"""G11: grammar bombs end in time, and nobody else's stream notices."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import httpx
from asgi_calls import LEAKS
from gate_frame import Findings, Outcome, Scale
from grammar_bombs import Format, bombs
from server_process import DEMO_MODEL, running_server

TITLE = "grammar bombs (schema, regex, EBNF, tags)"
TARGET = "500 bombs: each ended <= 2 s while another stream goes on"
MAX_SECONDS = 2.0
# Another stream may wait this long between two tokens: much less than a bomb takes.
MAX_GAP_SECONDS = 1.0
# As many as the compiler works on at a time: more would wait for each other.
LANES = 2
CHAT = {"model": DEMO_MODEL, "messages": [{"role": "user", "content": "Count."}], "temperature": 0}


def run(scale: Scale, seed: int) -> Outcome:
    found = Findings("G11")
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as server:
        return asyncio.run(_run(found, server.url, list(bombs(random.Random(seed), scale.of(500, 12))), scale.slack))


async def _run(found: Findings, url: str, formats: list[Format], slack: float) -> Outcome:
    gaps: list[float] = []
    took: list[float] = []
    statuses: list[int] = []

    async def lane(mine: list[Format]) -> None:
        for bomb in mine:
            seconds, status, problem = await _ask(client, bomb)
            found.num_cases += 1
            took.append(seconds)
            statuses.append(status)
            if problem or seconds > MAX_SECONDS * slack:
                found.fail(f"{seconds:.2f} s, {problem or status}: {str(bomb)[:200]}", json.dumps(bomb).encode())

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        # The first grammar starts the compiler, which is no bomb's doing.
        await _ask(client, {"type": "json_object"})
        stream = asyncio.create_task(_stream(client, gaps))
        await asyncio.gather(*(lane(formats[i::LANES]) for i in range(LANES)))
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
    if not gaps or max(gaps) > MAX_GAP_SECONDS * slack:
        found.fail(f"the other stream stood still for {max(gaps, default=float('inf')):.2f} s")
    slow = sum(seconds > 0.5 for seconds in took)
    return found.outcome(
        f"{found.num_cases} bombs: longest {max(took):.2f} s, {slow} took more than 0.5 s, {statuses.count(200)} were "
        f"followed; the other stream: {len(gaps)} chunks, median gap {statistics.median(gaps) * 1000:.0f} ms, longest "
        f"{max(gaps) * 1000:.0f} ms"
    )


async def _ask(client: httpx.AsyncClient, bomb: Format) -> tuple[float, int, str | None]:
    """Seconds, status, and what is wrong with the answer."""
    start = time.monotonic()
    answer = await client.post("/v1/chat/completions", json=CHAT | {"response_format": bomb, "max_tokens": 1})
    seconds = time.monotonic() - start
    if answer.status_code not in (200, 400):
        return seconds, answer.status_code, f"status {answer.status_code}: {answer.text[:200]}"
    leak = LEAKS.search(answer.text) if answer.status_code == 400 else None
    return seconds, answer.status_code, f"the error shows {leak[0]!r}" if leak else None


async def _stream(client: httpx.AsyncClient, gaps: list[float]) -> None:
    """Streams one answer behind the other, noting the time between chunks of the same answer."""
    while True:
        last = None
        body = CHAT | {"stream": True, "max_tokens": 200, "ignore_eos": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                now = time.monotonic()
                if line.startswith("data: {"):
                    if last is not None:
                        gaps.append(now - last)
                    last = now
