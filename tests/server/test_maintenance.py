"""Sleep, waking and other weights, on a real server: nobody is harmed, and then the answers are as they should be."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from maintenance_helpers import ADMIN, ADMIN_FLAGS, ASK, admin, ask, copy_of_demo, edit, resident_bytes
from server_process import DEMO_MODEL, ServerProcess, running_server, wait_until

from dsengine.demo import CHECKPOINT_DIR

LONG: dict[str, Any] = ASK | {"max_tokens": 6000, "ignore_eos": True, "logprobs": None}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("checkpoints")
    (base / "allowed").mkdir()
    root = base / "allowed"
    copy_of_demo(root / "same")
    edit(copy_of_demo(root / "other"), "model.norm.weight", lambda weight: weight.flip(0))
    edit(copy_of_demo(root / "broken"), "model.norm.weight", lambda weight: weight[:-1].clone())
    scale = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    edit(copy_of_demo(root / "nan"), scale, lambda weight: weight * float("nan"))
    config = (copy_of_demo(root / "deeper") / "config.json").read_text()
    assert '"rope_theta"' in config
    (root / "deeper" / "config.json").write_text(config.replace('"rope_theta": ', '"rope_theta": 1'))
    (copy_of_demo(root / "words") / "tokenizer.json").write_text("{}")
    copy_of_demo(base / "elsewhere")
    (root / "link").symlink_to(base / "elsewhere")
    return root


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[ServerProcess]:
    flags = ("--max-total-tokens", "65536", "--self-test", "off", "--weight-update-root", str(root))
    with running_server(tmp_path_factory.mktemp("server"), *ADMIN_FLAGS, *flags) as process:
        yield process


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_nothing_runs_and_awake_all_is_as_before(server: ServerProcess, level: int) -> None:
    expected, before = ask(server), resident_bytes(server.engine_pid())
    assert admin(server, "/sleep", level=level).json() == {"is_sleeping": True, "level": level}
    assert admin(server, "/is_sleeping", "GET").json() == {"is_sleeping": True, "level": level}
    for path, body in (("completions", ASK), ("chat/completions", {"messages": [{"role": "user", "content": "x"}]})):
        refused = httpx.post(f"{server.url}/v1/{path}", json={"model": DEMO_MODEL} | body, timeout=10)
        assert refused.status_code == 503 and refused.headers["retry-after"] and "asleep" in refused.text
    assert server.health() == 200
    freed = before - resident_bytes(server.engine_pid())
    assert freed > (30_000_000 if level == 1 else 60_000_000), "its cache holds 64k tokens, its weights 13 million"
    again = admin(server, "/sleep", level=level)
    assert again.status_code == 400 and "asleep already" in again.text
    assert admin(server, "/wake_up").json() == {"is_sleeping": False, "level": 0}
    assert ask(server) == expected
    assert admin(server, "/wake_up").status_code == 200 and ask(server) == expected
    bare = httpx.post(server.url + "/sleep", headers=ADMIN, timeout=60)
    assert bare.json()["level"] == 1 and admin(server, "/wake_up").status_code == 200


def test_other_weights_are_taken_and_given_back(server: ServerProcess, root: Path) -> None:
    expected = ask(server)
    assert admin(server, "/update_weights_from_disk", model_path="other").json()["success"]
    changed = ask(server)
    assert changed != expected
    admin(server, "/sleep", level=2)
    admin(server, "/wake_up")
    assert ask(server) == changed, "whoever wakes has the weights with which it fell asleep"
    assert admin(server, "/update_weights_from_disk", model_path=str(root / "same")).status_code == 200
    assert ask(server) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "model.norm.weight"),
        ("nan", "finite"),
        ("deeper", "rope_theta"),
        ("words", "tokenizer"),
        ("nowhere", "no checkpoint folder"),
        ("../elsewhere", "no checkpoint folder"),
        ("link", "no checkpoint folder"),
        (str(CHECKPOINT_DIR), "no checkpoint folder"),
        ("/etc", "no checkpoint folder"),
        ("same\x00", "no checkpoint folder"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(server: ServerProcess, name: str, message: str) -> None:
    expected = ask(server)
    refused = admin(server, "/update_weights_from_disk", model_path=name)
    assert refused.status_code == 400 and message in refused.text, refused.text
    assert ask(server) == expected


def test_running_requests_are_waited_for_or_ended(server: ServerProcess) -> None:
    statuses: list[int] = []

    def run() -> None:
        statuses.append(httpx.post(server.url + "/v1/completions", json=LONG, timeout=60).status_code)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: server.stats()["num_running"] == 1, 10.0)
    busy = admin(server, "/sleep", level=1)
    assert busy.status_code == 409 and "abort_all_requests" in busy.text
    assert server.stats()["num_running"] == 1 and admin(server, "/is_sleeping", "GET").json()["level"] == 0
    started = time.monotonic()
    assert admin(server, "/sleep", level=1, abort_all_requests=True).status_code == 200
    assert time.monotonic() - started < 3
    thread.join(10)
    assert statuses == [503]
    assert admin(server, "/wake_up").status_code == 200
    ask(server)
    wait_until(server.is_idle, 5.0)
