"""Loads one checkpoint folder after another in a process of its own, which may be killed when it hangs.

Reads a folder a line and answers with a JSON object a line: what was raised, or a digest of all that was loaded.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
KILL_AFTER_SECONDS = 20.0


class CheckpointWorker:
    """The other end: a process that is asked to load, and replaced when it dies."""

    def __init__(self) -> None:
        self.deaths = 0
        self._start()

    def load(self, folder: Path, tp_size: int = 1) -> dict[str, Any]:
        """What came of loading: `error` and `kind`, or `digest`; `kind` is "death" if the process died or hung."""
        assert self._process.stdin is not None and self._process.stdout is not None
        watchdog = threading.Timer(KILL_AFTER_SECONDS, self._process.kill)
        watchdog.start()
        started = time.monotonic()
        try:
            self._process.stdin.write(json.dumps([str(folder), tp_size]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        seconds = time.monotonic() - started
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer | {"seconds": seconds}
        status = self._process.wait()
        self.deaths += 1
        self._start()
        return {"kind": "death", "error": f"the process ended with {status}", "seconds": seconds}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TESTS.parent
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"


def _serve() -> None:
    import torch

    from dsengine.kernels.registry import select_kernels
    from dsengine.model.config import ModelConfig
    from dsengine.model.loader import load_model
    from dsengine.model.manifest import verify_manifest
    from dsengine.model.sharding import check_layout

    device = torch.device("cpu")
    kernels = select_kernels(device)
    torch.set_num_threads(1)

    def load(folder: Path, tp_size: int) -> str:
        verify_manifest(folder)
        config = ModelConfig.from_hub(folder)
        check_layout(config, tp_size=tp_size, experts_whole=False, keeps_fp8=False)
        model = load_model(folder, config, device=device, dtype=torch.float32, kernels=kernels)
        digest = hashlib.sha256()
        for tensor in _tensors_of(model, set()):
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    print("ready", flush=True)
    for line in sys.stdin:
        folder, tp_size = json.loads(line)
        try:
            answer = {"digest": load(Path(folder), tp_size)}
        except Exception as error:
            kind = "refusal" if isinstance(error, ValueError) else type(error).__name__
            answer = {"kind": kind, "error": str(error) or repr(error)}
        print(json.dumps(answer), flush=True)


def _tensors_of(value: Any, seen: set[int]) -> list[Any]:
    """Every tensor that is reached through the attributes of the model's objects, once, in a fixed order."""
    import torch

    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        parts: list[Any] = list(value)
    elif type(value).__module__.startswith("dsengine.model"):
        parts = list(vars(value).values()) if hasattr(value, "__dict__") else []
    else:
        parts = []
    return [tensor for part in parts for tensor in _tensors_of(part, seen)]


if __name__ == "__main__":
    _serve()
