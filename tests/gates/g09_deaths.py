"""G9: processes of a real server are killed, stopped and asked to end, whatever they are doing."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from gate_frame import Findings, Outcome, Scale
from process_figures import children, is_running, shared_memory
from server_process import DEMO_MODEL, ServerProcess, wait_until

TITLE = "kill, stop and terminate every process in every phase"
TARGET = "60 cycles: 0 orphans, a last event for every client <= 2 s after a death or the limit, serving again <= 10 s"
LAST_EVENT_SECONDS = 2.0
AGAIN_SECONDS = 10.0
ORPHAN_SECONDS = 5.0
HANG_SECONDS = 3.0  # --dist-timeout
RANKS = ("--tp-size", "2")


@dataclass(frozen=True)
class Cycle:
    """Who is sent what while the server does something.

    Attributes:
        role: "server", "engine" (rank 0), or "rank" (rank 1 of two).
        ranks: that run the model.
    """

    role: str
    number: signal.Signals
    phase: str
    ranks: int = 1

    def __str__(self) -> str:
        return f"{self.number.name} to the {self.role} in {self.phase} ({self.ranks} rank{'s' * (self.ranks > 1)})"


KILL, TERM, STOP = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP
CYCLES = [
    *[Cycle("engine", KILL, phase) for phase in ("idle", "prefill", "decode") for _ in range(4)],
    *[Cycle("engine", TERM, phase) for phase in ("idle", "prefill", "decode") for _ in range(2)],
    *[Cycle("engine", STOP, phase) for phase in ("prefill", "decode") for _ in range(3)],
    *[Cycle("server", KILL, phase) for phase in ("idle", "prefill", "decode", "load", "drain") for _ in range(2)],
    *[Cycle("server", TERM, phase) for phase in ("idle", "prefill", "decode", "load", "drain") for _ in range(2)],
    *[Cycle("server", STOP, phase) for phase in ("prefill", "decode") for _ in range(2)],
    *[Cycle("engine", KILL, "load") for _ in range(2)],
    *[Cycle(role, KILL, phase, 2) for role in ("engine", "rank") for phase in ("idle", "decode")],
    *[Cycle(role, STOP, "decode", 2) for role in ("engine", "rank")],
    *[Cycle(role, TERM, "decode", 2) for role in ("engine", "rank")],
    *[Cycle("server", KILL, "decode", 2), Cycle("server", TERM, "decode", 2)],
]
QUICK = [Cycle("engine", STOP, "decode"), Cycle("server", KILL, "decode")]


class _Client(threading.Thread):
    """One stream, and when it ended how."""

    def __init__(self, url: str, prompt_tokens: int, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._body: dict[str, Any] = {
            "model": DEMO_MODEL, "prompt": [5 + i % 700 for i in range(prompt_tokens)], "max_tokens": max_tokens,
            "ignore_eos": True, "stream": True, "temperature": 0,
        }  # fmt: skip
        self.sent, self.begun = threading.Event(), threading.Event()
        self.lines: list[str] = []
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        try:
            self.sent.set()
            with httpx.stream("POST", self._url + "/v1/completions", json=self._body, timeout=120) as answer:
                for line in answer.iter_lines():
                    self.lines.append(line)
                    self.begun.set()
        except httpx.HTTPError as error:
            self.lines.append(f"connection: {error!r}")
        finally:
            self.ended_at = time.monotonic()
            self.begun.set()

    @property
    def end(self) -> str:
        """How it ended: "whole", "error" (an event or a refusal), or "connection"."""
        text = "\n".join(self.lines)
        if "[DONE]" in text:
            return "whole"
        return "connection" if "connection: " in text else "error" if '"error"' in text else "cut"


def run(scale: Scale, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        cycles = list(QUICK if scale.quick else CYCLES)
        random.Random(seed).shuffle(cycles)
        return _Deaths(Path(folder), scale.slack).run(cycles)


class _Deaths:
    def __init__(self, folder: Path, slack: float) -> None:
        self._folder = folder
        self._slack = slack
        self._found = Findings("G9")
        self._ends = Counter[str]()
        self._after_deaths: list[float] = []
        self._after_stops: list[float] = []
        self._again: list[float] = []
        self._orphans = 0

    def run(self, cycles: list[Cycle]) -> Outcome:
        before = shared_memory()
        for cycle in cycles:
            self._found.num_cases += 1
            try:
                self._cycle(cycle)
            except AssertionError as error:
                self._found.fail(f"{cycle}: {str(error)[-700:]}")
        if left := shared_memory() - before:
            self._found.fail(f"left in shared memory: {sorted(left)}")
        ends = ", ".join(f"{count} {end}" for end, count in self._ends.items())
        return self._found.outcome(
            f"{self._found.num_cases} cycles: {self._orphans} orphans; streams ended: {ends}; last event after a death "
            f"<= {max(self._after_deaths, default=0):.1f} s, after a standstill with a limit of {HANG_SECONDS:g} s "
            f"<= {max(self._after_stops, default=0):.1f} s; serving again after <= {max(self._again, default=0):.1f} s"
        )

    def _cycle(self, cycle: Cycle) -> None:
        flags = ("--dist-timeout", str(HANG_SECONDS), *(RANKS if cycle.ranks == 2 else ()))
        started = time.monotonic()
        server = ServerProcess(self._folder, "--max-total-tokens", "16384", *flags)
        clients: list[_Client] = []
        pids: list[int] = []
        try:
            if cycle.phase == "load":
                wait_until(lambda: bool(children(server.process.pid)), 60, server.log_text)
            else:
                server.wait_ready()
                clients = self._enter_phase(server, cycle.phase)
            start_seconds = time.monotonic() - started
            pids = [server.process.pid, *children(server.process.pid)]
            os.kill(pids[{"server": 0, "engine": 1, "rank": 2}[cycle.role]], cycle.number)
            self._check(cycle, server, clients, start_seconds)
        finally:
            if server.process.poll() is None:
                pids += children(server.process.pid)  # an engine may have been started again
            server.close()
            self._check_orphans(cycle, pids)

    def _enter_phase(self, server: ServerProcess, phase: str) -> list[_Client]:
        if phase == "idle":
            return []
        clients = [_Client(server.url, 1_500 if phase == "prefill" else 20, 400) for _ in range(3)]
        for client in clients:
            assert (client.sent if phase == "prefill" else client.begun).wait(60)
        if phase == "prefill":
            wait_until(lambda: not server.is_idle(), 30, server.log_text)
        if phase == "drain":
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.health() in (503, None), 5, server.log_text)
        return clients

    def _check(self, cycle: Cycle, server: ServerProcess, clients: list[_Client], start_seconds: float) -> None:
        at, is_death = time.monotonic(), cycle.number == KILL or cycle.role != "server"
        if cycle.role == "server" and cycle.number == STOP:
            time.sleep(1)
            server.process.send_signal(signal.SIGCONT)
        stands_still = cycle.number == STOP and cycle.role != "server"
        limit = (LAST_EVENT_SECONDS + (HANG_SECONDS if stands_still else 0)) * self._slack
        wanted: tuple[str, ...] = ("connection", "cut", "error") if is_death else ("whole",)
        if cycle.role == "server" and cycle.phase == "drain":
            wanted = ("error", "whole") if cycle.number == TERM else ("connection", "cut", "whole")
        for client in clients:
            client.join(60)
            assert not client.is_alive(), "a client waits after 60 s"
            self._ends[client.end] += 1
            assert client.end in wanted, (
                f"a stream ended with {client.end}, expected one of {wanted}: {client.lines[-2:]}"
            )
            if is_death:
                (self._after_stops if stands_still else self._after_deaths).append(client.ended_at - at)
                assert client.ended_at - at <= limit, f"the last event came after {client.ended_at - at:.1f} s"
        if cycle.role == "server" and cycle.number == STOP:
            wait_until(lambda: server.health() == 200, 10, server.log_text)
        elif cycle.role == "server":
            status = server.process.wait(40)
            assert status == (0 if cycle.number == TERM else -KILL), f"the server ended with {status}"
        elif cycle.phase == "load":
            assert server.process.wait(30) not in (0, None), "it ended as if all were well"
        else:
            self._check_again(server, start_seconds)

    def _check_again(self, server: ServerProcess, start_seconds: float) -> None:
        """It serves again, on a machine with time to spare within ten seconds, else in the time that its start took."""
        at, limit = time.monotonic(), max(AGAIN_SECONDS, 2 * start_seconds)

        def serves() -> bool:
            body = {"model": DEMO_MODEL, "prompt": "1, 2,", "max_tokens": 2}
            try:
                return httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(serves, limit, server.log_text)
        self._again.append(time.monotonic() - at)
        assert server.is_idle(), server.stats()

    def _check_orphans(self, cycle: Cycle, pids: list[int]) -> None:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._orphans += len(left)
        for pid in left:
            self._found.fail(f"{cycle}: process {pid} is left behind")
            os.kill(pid, KILL)
