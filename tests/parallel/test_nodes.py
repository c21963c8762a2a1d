"""Two launch commands, as on two machines, serve one model; they meet at an address of the first."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import DEMO_MODEL, ROOT, ServerProcess, free_port, wait_until
from test_rank_failures import NOTICED_SECONDS, Client

from dsengine.config import EngineConfig
from dsengine.parallel.launch import is_alive
from dsengine.server.torchrun import configure_under_torchrun

FLAGS = ("--tp-size", "2", "--weight-format", "dequantized", "--max-total-tokens", "8192", "--nnodes", "2")


class SecondNode:
    """`dsengine serve` on the second machine."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self._folder, self._flags = folder, flags
        self.log = folder / "node-1.log"
        command = [sys.executable, "-m", "dsengine", "serve", "--num-threads", "1", *FLAGS, "--node-rank", "1", *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def again(self) -> SecondNode:
        """The same command once more, of which the caller takes care."""
        return SecondNode(self._folder, *self._flags)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextlib.contextmanager
def two_nodes(folder: Path, *flags: str) -> Iterator[tuple[ServerProcess, SecondNode]]:
    flags = ("--dist-init-addr", f"127.0.0.1:{free_port()}", "--dist-timeout", "20", *flags)
    second = SecondNode(folder, *flags)
    first = ServerProcess(folder, *FLAGS, "--node-rank", "0", *flags)
    try:
        first.wait_ready()
        yield first, second
    finally:
        first.close()
        second.close()


def complete(server: ServerProcess, max_tokens: int = 16) -> str:
    answer = server.openai().completions.create(
        model=DEMO_MODEL, prompt="What is 347 + 285?", max_tokens=max_tokens, temperature=0
    )
    text: str = answer.choices[0].text
    return text


def ranks(server: ServerProcess) -> list[dict[str, Any]]:
    info: dict[str, Any] = httpx.get(server.url + "/server_info", timeout=30).json()
    found: list[dict[str, Any]] = info["engine"]["ranks"]
    return found


def test_two_nodes_serve_one_model(tmp_path: Path) -> None:
    with two_nodes(tmp_path) as (first, second):
        assert [rank["node_rank"] for rank in ranks(first)] == [0, 1]
        assert complete(first)
        pids = [rank["pid"] for rank in ranks(first)]
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(30) == 0, first.log_text()
        assert second.process.wait(30) == 0, second.log.read_text()
        assert not any(is_alive(pid) for pid in pids)


def lose(first: ServerProcess, second: SecondNode, lost: int) -> tuple[float, str]:
    """Kill a whole launch command while a request runs; returns the seconds until its client heard, and what."""
    client = Client(first)
    struck_at = time.monotonic()
    (first.process, second.process)[lost].kill()
    client.join(60)
    return client.ended_at - struck_at, str(client.error)


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_lost_node_is_named_and_no_rank_remains(tmp_path: Path, lost: int) -> None:
    with two_nodes(tmp_path, "--on-engine-failure", "exit") as (first, second):
        pids = [rank["pid"] for rank in ranks(first)]
        seconds, error = lose(first, second, lost)
        left, log = ((second.process, second.log), (first.process, first.log))[lost]
        assert left.wait(20) == 1, log.read_text()
        wait_until(lambda: not any(is_alive(pid) for pid in pids), 10)
        report = f"node {lost} with rank {lost} ended or cannot be reached; rank {1 - lost} was in "
        assert report in log.read_text(), log.read_text()
        if lost == 1:
            assert "The engine is not available" in error and seconds < NOTICED_SECONDS["killed"], log.read_text()


@pytest.mark.slow
def test_a_lost_node_of_two_ranks_may_come_back(tmp_path: Path) -> None:
    with two_nodes(tmp_path, "--tp-size", "4", "--attn-dp-size", "2", "--dist-timeout", "60") as (first, second):
        answer = complete(first)
        pids = [rank["pid"] for rank in ranks(first)]
        seconds, error = lose(first, second, 1)
        assert "The engine is not available" in error and seconds < NOTICED_SECONDS["killed"], first.log_text()
        assert "node 1 with ranks 2, 3 ended or cannot be reached; rank 0 was in step" in first.log_text()
        wait_until(lambda: not any(is_alive(pid) for pid in pids), 10)
        again = second.again()
        try:
            wait_until(lambda: first.health() == 200, 90, first.log_text)
            assert complete(first) == answer
        finally:
            again.close()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_each_node_starts_its_ranks_again(tmp_path: Path, lost: int) -> None:
    with two_nodes(tmp_path, "--attn-dp-size", "2") as (first, second):
        answer = complete(first)
        pids = [rank["pid"] for rank in ranks(first)]
        os.kill(pids[lost], signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in pids), 30, first.log_text)
        wait_until(lambda: first.health() == 200, 90, first.log_text)
        assert complete(first) == answer
        pids = [rank["pid"] for rank in ranks(first)]
        second.process.kill()
        # Without the second node there is no model: the first one says so and ends.
        assert first.process.wait(120) == 1, first.log_text()
        wait_until(lambda: not any(is_alive(pid) for pid in pids), 10)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "torchrun.log"
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dsengine", "serve", "--port", str(port)]
    flags = ["--weight-format", "dequantized", "--max-total-tokens", "8192", "--num-threads", "1"]
    with log.open("wb") as out:
        torchrun = subprocess.Popen([sys.executable, *words, *flags], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        server = ServerProcess.__new__(ServerProcess)  # what torchrun has started
        server.port, server.url, server.log, server.process = port, f"http://127.0.0.1:{port}", log, torchrun
        server.wait_ready()
        pids = [rank["pid"] for rank in ranks(server)]
        assert len(pids) == 2 and "632" in complete(server, 100)
        torchrun.send_signal(signal.SIGTERM)
        torchrun.wait(60)
        assert not any(is_alive(pid) for pid in pids)
    finally:
        torchrun.kill()
        torchrun.wait()


@pytest.mark.slow
def test_other_flags_on_another_node_are_refused(tmp_path: Path) -> None:
    address = ("--dist-init-addr", f"127.0.0.1:{free_port()}", "--dist-timeout", "20")
    second = SecondNode(tmp_path, *address, "--seed", "1")
    first = ServerProcess(tmp_path, *FLAGS, "--node-rank", "0", *address)
    try:
        assert first.process.wait(90) == 2 and second.process.wait(30) == 2
        assert "rank 1 was started with other flags than rank 0" in first.log_text()
    finally:
        first.close()
        second.close()


def test_a_process_of_torchrun_is_one_rank() -> None:
    environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "CUDA_VISIBLE_DEVICES": "3,5"}
    config = configure_under_torchrun(EngineConfig(), environment)
    assert (config.tp_size, config.local_ranks, config.dist_init_addr) == (4, range(1, 2), "127.0.0.1:29511")
    assert environment["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(ValueError, match="started 4 processes, but tp_size is 2"):
        configure_under_torchrun(EngineConfig(tp_size=2), environment)
    assert configure_under_torchrun(EngineConfig(tp_size=2), {"RANK": "1"}) == EngineConfig(tp_size=2)
