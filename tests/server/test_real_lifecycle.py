"""Deaths, signals and mistakes, on real processes: what open requests, /health and the exit status say."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from server_process import DEMO_MODEL, ROOT, ServerProcess, free_port, running_server, wait_until

LONG: dict[str, Any] = {"model": DEMO_MODEL, "prompt": "Hello", "temperature": 0, "extra_body": {"ignore_eos": True}}


class Reader(threading.Thread):
    """Reads one stream to its end, in the background."""

    def __init__(self, server: ServerProcess, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._client = server.openai(strict=False)
        self._max_tokens = max_tokens
        self.chunks: list[Any] = []
        self.error: Exception | None = None
        self.begun = threading.Event()
        self.start()
        assert self.begun.wait(60)

    def run(self) -> None:
        try:
            for chunk in self._client.completions.create(max_tokens=self._max_tokens, stream=True, **LONG):
                self.chunks.append(chunk)
                self.begun.set()
        except Exception as error:
            self.error = error
        finally:
            self.begun.set()

    @property
    def finish_reason(self) -> str | None:
        return self.chunks[-1].choices[0].finish_reason if self.chunks else None


def test_engine_killed_and_restarted_then_drained(tmp_path: Path) -> None:
    with running_server(tmp_path, "--max-total-tokens", "8192") as server:
        stream = Reader(server, 8000)
        os.kill(server.engine_pid(), signal.SIGKILL)
        stream.join(10)
        assert isinstance(stream.error, openai.APIError) and not isinstance(stream.error, openai.APIConnectionError)
        assert stream.error.code == "engine_unavailable"
        wait_until(lambda: server.health() == 503, 5)
        with pytest.raises(openai.InternalServerError) as refused:
            server.openai().completions.create(max_tokens=1, **LONG)
        assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"]
        wait_until(lambda: server.health() == 200, 60, server.log_text)
        assert server.is_idle()

        # The restarted engine works, and the server lets what it runs finish.
        stream = Reader(server, 150)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.health() == 503, 5)
        with pytest.raises(openai.InternalServerError) as refused:
            server.openai().completions.create(max_tokens=1, **LONG)
        assert refused.value.code == "server_shutting_down" and refused.value.response.headers["retry-after"]
        stream.join(60)
        assert stream.error is None and stream.finish_reason == "length"
        assert server.process.wait(20) == 0


def test_second_signal_ends_streams_with_an_error(tmp_path: Path) -> None:
    with running_server(tmp_path, "--max-total-tokens", "8192") as server:
        engine = server.engine_pid()
        stream = Reader(server, 8000)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.health() == 503, 5)
        assert stream.is_alive()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        stream.join(5)
        assert isinstance(stream.error, openai.APIError) and stream.error.code == "server_shutting_down"
        wait_until(lambda: not Path(f"/proc/{engine}").exists(), 10)


def test_engine_failure_may_end_the_server(tmp_path: Path) -> None:
    with running_server(tmp_path, "--max-total-tokens", "8192", "--on-engine-failure", "exit") as server:
        stream = Reader(server, 8000)
        os.kill(server.engine_pid(), signal.SIGKILL)
        stream.join(10)
        assert isinstance(stream.error, openai.APIError) and stream.error.code == "engine_unavailable"
        assert server.process.wait(20) == 1


def serve(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsengine", "serve", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_port_in_use_is_a_users_mistake() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = serve("--port", str(port))
    assert result.returncode == 2
    assert f"port {port}" in result.stderr and "in use" in result.stderr and "Traceback" not in result.stderr


def test_missing_checkpoint_is_a_users_mistake(tmp_path: Path) -> None:
    result = serve(str(tmp_path / "nothing"), "--port", str(free_port()))
    assert result.returncode == 2 and "nothing" in result.stderr and "Traceback" not in result.stderr


def test_signal_while_loading_ends_at_once(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path)
    try:
        # The engine's process exists before the model is loaded.
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        wait_until(lambda: bool(children.read_text().strip()), 60, server.log_text)
        engine = int(children.read_text())
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0, server.log_text()
        assert time.monotonic() - started < 8
        wait_until(lambda: not Path(f"/proc/{engine}").exists(), 5)
    finally:
        server.close()
