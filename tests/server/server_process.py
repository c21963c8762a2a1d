"""A real server in a process of its own, for tests that want everything: sockets, signals, the engine's process."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
from openai import OpenAI

from dsengine.server.service import DEMO_MODEL

ROOT = Path(__file__).resolve().parents[2]
STARTUP_SECONDS = 180.0  # it takes five; where many share few cores, a minute
IDLE_SECONDS = 5.0


class ServerProcess:
    """`dsengine serve` on a free port."""

    running: ClassVar[weakref.WeakSet[ServerProcess]] = weakref.WeakSet()
    key = ""  # of its clients

    def __init__(self, folder: Path, *flags: str) -> None:
        self.running.add(self)
        if "--api-key" in flags:
            self.key = flags[flags.index("--api-key") + 1]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"server-{self.port}.log"
        command = [sys.executable, "-m", "dsengine", "serve", "--port", str(self.port), "--num-threads", "1", *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def wait_ready(self) -> None:
        wait_until(lambda: self.process.poll() is not None or self.health() == 200, STARTUP_SECONDS, self.log_text)
        assert self.process.poll() is None, self.log_text()

    def health(self) -> int | None:
        try:
            return httpx.get(self.url + "/health", timeout=10).status_code
        except httpx.HTTPError:
            return None

    def openai(self, **options: Any) -> OpenAI:
        return OpenAI(
            base_url=self.url + "/v1",
            api_key=options.pop("api_key", "none"),
            max_retries=0,
            timeout=120,
            _strict_response_validation=options.pop("strict", True),
            **options,
        )

    def stats(self) -> dict[str, int]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        body: dict[str, Any] = httpx.get(self.url + "/server_info", headers=headers, timeout=30).json()
        stats: dict[str, int] = body["stats"]
        return stats

    def is_idle(self) -> bool:
        stats = self.stats()
        return stats["num_running"] == stats["num_waiting"] == stats["num_blocks_in_use"] == 0

    def check_idle(self) -> None:
        """If it serves, then nobody: every block of its cache is free or cached, nothing runs or waits, soon."""
        if self.process.poll() is None and self.health() == 200:
            wait_until(lambda: self.health() != 200 or self.is_idle(), IDLE_SECONDS, lambda: str(self.stats()))

    def engine_pid(self) -> int:
        """The one child process of the server."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def log_text(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)


@contextlib.contextmanager
def running_server(folder: Path, *flags: str) -> Iterator[ServerProcess]:
    server = ServerProcess(folder, *flags)
    try:
        server.wait_ready()
        yield server
        server.check_idle()
    finally:
        server.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], seconds: float, describe: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s. {describe()}"
        time.sleep(0.05)


__all__ = ["DEMO_MODEL", "ServerProcess", "free_port", "running_server", "wait_until"]
