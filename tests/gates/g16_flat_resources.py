"""G16: after 20,000 requests of every kind, server and engine hold what they held after the first thousands."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from gate_frame import Findings, Outcome, Scale
from process_figures import settled_figures, slope
from raw_streams import Connection, read_answer, request_bytes
from server_process import DEMO_MODEL, ServerProcess, running_server

TITLE = "memory, descriptors, threads and metric series stay flat"
TARGET = "20,000 requests after a warm-up: < 1 KiB a request, descriptors and series constant"
CONCURRENCY = 32
ROUNDS = 20
MAX_SLOPE_KIB = 1.0
# Of large buffers that come and go with the largest step the allocator keeps now more, now less: tens of megabytes.
SMALL = ("--max-total-tokens", "8192", "--chunked-prefill-size", "256")


def run(scale: Scale, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), *SMALL) as server:
        return asyncio.run(_Load(server, random.Random(seed), scale).run())


class _Load:
    def __init__(self, server: ServerProcess, rng: random.Random, scale: Scale) -> None:
        self._server = server
        self._rng = rng
        self._scale = scale
        self._found = Findings("G16")
        self._statuses = Counter[int]()

    async def run(self) -> Outcome:
        per_round = self._scale.of(1_000, 20)
        await self._send(self._scale.of(4_000, 200))  # allocators, pools and the prefix cache fill
        self._statuses.clear()
        pids = {"server": self._server.process.pid, "engine": self._server.engine_pid()}
        curves: dict[str, list[tuple[float, float]]] = {name: [] for name in pids}
        kept = Counter[tuple[object, ...]]()
        for number in range(ROUNDS):
            await self._send(per_round)
            await self._come_to_rest()
            looks = {name: settled_figures(pid) for name, pid in pids.items()}
            for name, look in looks.items():
                curves[name].append(((number + 1) * per_round, look.rss_kib))
            counts = tuple((look.num_fds, look.num_threads) for look in looks.values())
            kept[(*counts, await self._num_series())] += 1
        slopes = {name: slope(curve) for name, curve in curves.items()}
        for name, value in slopes.items():
            if value >= MAX_SLOPE_KIB and not self._scale.quick:  # a few requests say nothing of a slope
                self._found.fail(f"the {name} grows by {value:.2f} KiB a request: {curves[name]}")
        if len(kept) > 1:
            self._found.fail(f"(descriptors, threads) of server and engine, and series, change: {dict(kept)}")
        shown = ", ".join(f"{name} {value:+.2f} KiB a request" for name, value in slopes.items())
        return self._found.outcome(
            f"{ROUNDS * per_round:,} requests ({dict(sorted(self._statuses.items()))}; 0: the client left): {shown}; "
            f"(descriptors, threads) of server and engine and series: {next(iter(kept))}"
        )

    async def _send(self, count: int) -> None:
        waiting = iter(range(count))

        async def client() -> None:
            for _ in waiting:
                self._statuses[await self._one()] += 1

        await asyncio.gather(*(client() for _ in range(CONCURRENCY)))

    async def _one(self) -> int:
        """One request of a random kind; its status, or 0 where the client left."""
        connection = await Connection.open(self._server.port)
        leaves = self._rng.random() < 0.1
        try:
            await connection.send(request_bytes(*self._request()))
            await connection.read_to(self._rng.randrange(1, 600) if leaves else None)
            return 0 if leaves else read_answer(bytes(connection.received)).status
        except ConnectionError:
            return 0
        finally:
            connection.close(reset=self._rng.random() < 0.5 and leaves)

    def _request(self) -> tuple[str, dict[str, Any] | None]:
        rng = self._rng
        content = " ".join(str(rng.randrange(1000)) for _ in range(rng.randrange(1, 40)))
        messages = [{"role": "user", "content": content}]
        common = {"model": DEMO_MODEL, "max_tokens": rng.randint(1, 4), "stream": rng.random() < 0.5, "seed": 1}
        return rng.choices(
            (
                ("/v1/chat/completions", common | {"messages": messages}),
                ("/v1/completions", common | {"prompt": content, "logprobs": 2}),
                ("/v1/chat/completions", common | {"messages": messages, "temperature": -1}),
                ("/v1/completions", {"prompt": [content] * 3}),
                (f"/nothing/{rng.randrange(10**9)}", common),
                ("/tokenize", {"model": DEMO_MODEL, "prompt": content}),
                ("/health", None),
            ),
            (10, 10, 2, 1, 2, 2, 2),
        )[0]

    async def _come_to_rest(self) -> None:
        for _ in range(100):
            if self._server.is_idle():
                return
            await asyncio.sleep(0.1)
        self._found.fail(f"not idle after 10 s: {self._server.stats()}")

    async def _num_series(self) -> int:
        text = httpx.get(self._server.url + "/metrics", timeout=30).text
        return sum(not line.startswith("#") for line in text.splitlines())
