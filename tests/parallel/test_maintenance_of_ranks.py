"""The admin routes of a real server whose model runs on two ranks, with drafts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from maintenance_helpers import ADMIN_FLAGS, ASK, admin, ask, copy_of_demo, edit, resident_bytes
from server_process import ServerProcess, running_server, wait_until
from test_nodes import two_nodes
from tiny_engine import tokens

from dsengine import LLM, SamplingParams
from dsengine.engine.leading_core import LeadingCore
from dsengine.engine.messages import AddRequest

FLAGS = ("--tp-size", "2", "--weight-format", "dequantized", "--max-total-tokens", "65536")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    edit(copy_of_demo(root / "other"), "model.norm.weight", lambda weight: weight.flip(0))
    edit(copy_of_demo(root / "broken"), "model.norm.weight", lambda weight: weight[:-1].clone())
    return root


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[ServerProcess]:
    flags = (*FLAGS, "--speculative-algorithm", "NEXTN", "--weight-update-root", str(root))
    with running_server(tmp_path_factory.mktemp("server"), *ADMIN_FLAGS, *flags) as process:
        yield process


def answer(server: ServerProcess) -> Any:
    """To be compared: how many tokens are verified together is in the last bits of their logprobs."""
    text, logprobs = ask(server)
    return text, pytest.approx(logprobs, abs=1e-3)


def ranks_of(server: ServerProcess) -> list[int]:
    info: dict[str, Any] = httpx.get(server.url + "/server_info", timeout=30).json()
    return [rank["pid"] for rank in info["engine"]["ranks"]]


@pytest.mark.parametrize("level", [1, 2])
def test_all_ranks_sleep_and_wake(server: ServerProcess, level: int) -> None:
    expected = answer(server)
    before = [resident_bytes(pid) for pid in ranks_of(server)]
    assert admin(server, "/sleep", level=level).json() == {"is_sleeping": True, "level": level}
    assert admin(server, "/is_sleeping", "GET").json() == {"is_sleeping": True, "level": level}
    freed = [was - resident_bytes(pid) for was, pid in zip(before, ranks_of(server), strict=True)]
    # 64k tokens of cache are on each rank, and half of 13 million weights in float32.
    assert min(freed) > (30_000_000 if level == 1 else 50_000_000), freed
    refused = httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=10)
    assert refused.status_code == 503 and "asleep" in refused.text
    assert server.health() == 200
    assert admin(server, "/wake_up").json() == {"is_sleeping": False, "level": 0}
    assert ask(server) == expected


def test_other_weights_outlast_the_ranks(server: ServerProcess) -> None:
    expected = answer(server)
    refused = admin(server, "/update_weights_from_disk", model_path="broken")
    assert refused.status_code == 400 and "model.norm.weight" in refused.text and ask(server) == expected
    assert admin(server, "/update_weights_from_disk", model_path="other").json()["success"]
    changed = answer(server)
    assert ask(server) != expected
    pids = ranks_of(server)
    os.kill(pids[1], signal.SIGKILL)
    wait_until(lambda: server.health() != 200, 30, server.log_text)
    wait_until(lambda: server.health() == 200, 60, server.log_text)
    assert not set(pids) & set(ranks_of(server))
    assert ask(server) == changed
    wait_until(server.is_idle, 5.0)


@pytest.mark.slow
def test_other_weights_outlast_the_ranks_of_two_machines(tmp_path: Path, root: Path) -> None:
    with two_nodes(tmp_path, *ADMIN_FLAGS, "--weight-update-root", str(root)) as (server, _):
        expected = answer(server)
        assert admin(server, "/update_weights_from_disk", model_path="other").json()["success"]
        changed = answer(server)
        assert ask(server) != expected
        pids = ranks_of(server)
        os.kill(pids[1], signal.SIGKILL)
        wait_until(lambda: server.health() != 200, 30, server.log_text)
        wait_until(lambda: server.health() == 200, 90, server.log_text)
        assert not set(pids) & set(ranks_of(server))
        assert ask(server) == changed


@pytest.mark.slow
def test_groups_rest_together_and_may_take_longer_than_a_step() -> None:
    options: dict[str, Any] = {"weight_format": "dequantized", "num_threads": 1, "max_total_tokens": 512}
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    prompts = ["1, 2, 3,", "347 + 285 = ", "Hello"]
    with LLM(tp_size=2, attn_dp_size=2, dist_timeout=2, progress=False, **options) as llm:
        assert isinstance(llm.core, LeadingCore)
        expected = tokens(llm.generate(prompts, greedy))
        llm.core.add_request(AddRequest("running", [5, 6, 7], greedy), time.monotonic())
        with pytest.raises(ValueError, match=r"rank [01]: requests are running or waiting"):
            llm.core.maintain("sleep", "1")
        llm.core.abort(["running"])
        pid = llm.core.info.ranks[1].pid
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(4, os.kill, (pid, signal.SIGCONT)).start()
        started = time.monotonic()
        assert llm.core.maintain("sleep", "1") == 1 and time.monotonic() - started > 3
        assert [group.sleep_level for group in llm.core.stats().groups] == [1, 1]
        assert llm.core.maintain("wake_up", "") == 0
        assert tokens(llm.generate(prompts, greedy)) == expected
