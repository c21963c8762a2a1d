"""G6: clients that leave streams at any byte, stall, reset or half-close, while others read theirs to the end."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from gate_frame import Findings, Outcome, Scale
from process_figures import settled_figures
from raw_streams import Answer, Connection, read_answer, request_bytes
from server_process import DEMO_MODEL, ServerProcess, running_server

TITLE = "streams cut, reset, stalled and half-closed"
TARGET = "5,000 streams at concurrency 128, >= 2,500 of them cut: survivors equal to golden, nothing left behind"
CONCURRENCY = 128
PATH = "/v1/chat/completions"
NUM_PROMPTS = 48
# How a client behaves, and how often. The first two read to the end.
MANNERS = {"reads": 34, "stalls": 10, "closes": 20, "resets": 20, "half-closes": 10, "sends half": 6}


def run(scale: Scale, seed: int) -> Outcome:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), "--max-running-requests", "128") as server,
    ):
        return asyncio.run(_Chaos(server, random.Random(seed), scale).run())


class _Chaos:
    def __init__(self, server: ServerProcess, rng: random.Random, scale: Scale) -> None:
        self._server = server
        self._rng = rng
        self._num_streams = scale.of(5_000, 150)
        self._bodies = [_body(rng) for _ in range(scale.of(NUM_PROMPTS, 8))]
        self._golden: list[Answer] = []
        self._lengths: list[int] = []
        self._found = Findings("G6")
        self._manners = Counter[str]()
        self._num_started = self._num_cut = self._num_equal = 0

    async def run(self) -> Outcome:
        for body in self._bodies:
            connection = await Connection.open(self._server.port)
            await connection.send(request_bytes(PATH, body))
            await connection.read_to(None)
            connection.close()
            self._golden.append(read_answer(bytes(connection.received)))
            self._lengths.append(len(connection.received))
        assert all(golden.is_whole and golden.finish_reason for golden in self._golden)
        before = self._fds()
        started = time.monotonic()
        await asyncio.gather(*(self._client() for _ in range(CONCURRENCY)))
        seconds = time.monotonic() - started
        await self._check_rest(before)
        if self._num_cut < self._num_streams // 2:
            self._found.fail(f"only {self._num_cut} streams were cut")
        manners = ", ".join(f"{count:,} {name}" for name, count in self._manners.items())
        return self._found.outcome(
            f"{self._found.num_cases:,} streams in {seconds:.0f} s ({manners}), {self._num_cut:,} cut: "
            f"{self._num_equal:,} read to the end and equal, {len(self._found.failures)} complaints"
        )

    async def _client(self) -> None:
        while self._num_started < self._num_streams:
            self._num_started += 1
            number = self._rng.randrange(len(self._bodies))
            [manner] = self._rng.choices(list(MANNERS), list(MANNERS.values()))
            self._manners[manner] += 1
            try:
                await asyncio.wait_for(self._stream(number, manner), 120)
            except TimeoutError:
                self._found.fail(f"a client that {manner} had no end after 120 s")
            self._found.num_cases += 1

    async def _stream(self, number: int, manner: str) -> None:
        data = request_bytes(PATH, self._bodies[number])
        connection = await Connection.open(self._server.port)
        try:
            if manner == "sends half":
                await connection.send(data[: self._rng.randrange(len(data))])
                await asyncio.sleep(self._rng.random() * 0.1)
                self._num_cut += 1
                return
            await connection.send(data)
            cut_at = self._rng.randrange(self._lengths[number])
            if manner == "reads":
                await connection.read_to(None)
            elif manner == "stalls":
                await connection.read_to(cut_at)
                await asyncio.sleep(self._rng.random() * 2)
                await connection.read_to(None)
            elif manner == "half-closes":
                await connection.read_to(cut_at)
                connection.half_close()
                await connection.read_to(None)
            else:
                await connection.read_to(cut_at)
            self._judge(number, manner, bytes(connection.received))
        except ConnectionError as error:
            if manner in ("reads", "stalls"):
                self._found.fail(f"a client that {manner}: {error!r}")
        finally:
            connection.close(reset=manner == "resets")

    def _judge(self, number: int, manner: str, raw: bytes) -> None:
        if manner in ("closes", "resets"):
            self._num_cut += 1
            return
        if manner == "half-closes" and not raw.endswith(b"0\r\n\r\n"):  # taken for one that has gone, as it may be
            self._num_cut += 1
            return
        answer = read_answer(raw)
        if answer == self._golden[number]:
            self._num_equal += 1
        else:
            self._found.fail(f"a client that {manner} got {answer}, not {self._golden[number]}")

    async def _check_rest(self, before: tuple[int, int]) -> None:
        """Within ten seconds nothing runs, no block is in use, and the processes hold what they held."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not (self._server.is_idle() and self._fds() <= before):
            await asyncio.sleep(0.2)
        if not self._server.is_idle():
            self._found.fail(f"not idle after 10 s: {self._server.stats()}")
        if (after := self._fds()) > before:
            self._found.fail(f"descriptors of server and engine: {before} before, {after} after")
        flushed = httpx.post(self._server.url + "/flush_cache", timeout=30)
        prompt = {"model": DEMO_MODEL, "prompt": [5] * 40, "max_tokens": 1}
        httpx.post(self._server.url + "/v1/completions", json=prompt, timeout=30).raise_for_status()
        stats = self._server.stats()  # of that request's step: with what it left in the cache and nothing else
        if flushed.status_code != 200 or stats["num_blocks_cached"] > 3 or stats["num_blocks_in_use"]:
            self._found.fail(f"blocks are left after a flush: {flushed.status_code} {flushed.text} {stats}")

    def _fds(self) -> tuple[int, int]:
        return settled_figures(self._server.process.pid).num_fds, settled_figures(self._server.engine_pid()).num_fds


def _body(rng: random.Random) -> dict[str, Any]:
    question = f"What is {rng.randrange(100, 999)} + {rng.randrange(100, 999)}?"
    return {
        "model": DEMO_MODEL,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
        "max_tokens": rng.choice((4, 12, 24, 40)),
    }
