"""What tests of the admin routes need: checkpoints to load, the key, and a request whose answer shows the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load_file, save_file
from server_process import DEMO_MODEL, ServerProcess

from dsengine.demo import CHECKPOINT_DIR

ADMIN = {"Authorization": "Bearer boss"}
ADMIN_FLAGS = ("--enable-admin", "--admin-api-key", "boss", "--drain-timeout", "3")
ASK: dict[str, Any] = {"model": DEMO_MODEL, "prompt": "347 + 285 = ", "max_tokens": 24, "temperature": 0, "logprobs": 1}


def copy_of_demo(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("*.sha256.json", "README.md")
    return Path(shutil.copytree(CHECKPOINT_DIR, folder, ignore=ignored))


def edit(folder: Path, name: str, change: Any) -> None:
    """Changes one tensor of a checkpoint."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError(f"no tensor {name}")


def admin(server: ServerProcess, path: str, method: str = "POST", **body: Any) -> httpx.Response:
    content: dict[str, Any] = {"json": body} if method == "POST" else {}
    return httpx.request(method, server.url + path, headers=ADMIN, timeout=60, **content)


def ask(server: ServerProcess) -> tuple[str, list[float]]:
    answer = httpx.post(server.url + "/v1/completions", json=ASK, timeout=60)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
