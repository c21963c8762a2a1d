"""What no test may leave behind: owned cache blocks, requests, processes, sockets and pipes, shared memory."""

from __future__ import annotations

import contextlib
import gc
import os
import time
import weakref
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from dsengine.engine.core import EngineCore

_GRACE_SECONDS = 3.0


class Cores:
    """Every engine that lives in this process, from the moment that the class is watched."""

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[EngineCore] = weakref.WeakSet()

    def watch(self) -> None:
        build = EngineCore.__init__

        @wraps(build)
        def build_and_remember(core: EngineCore, *args: Any, **options: Any) -> None:
            build(core, *args, **options)
            self._alive.add(core)

        EngineCore.__init__ = build_and_remember  # type: ignore[method-assign, assignment]

    def check(self) -> None:
        """Every block of every engine is free or cached, and counted once; nothing is owned, running or waiting."""
        if any(core.has_work for core in self._alive):
            gc.collect()  # its test may have dropped it with all that it was doing, in a cycle of references
        for core in list(self._alive):
            core.check_integrity()
            stats = core.stats()
            left = (stats.num_running, stats.num_waiting, stats.num_blocks_in_use)
            assert left == (0, 0, 0), f"requests running, waiting, and blocks owned after the test: {left}"


@dataclass(frozen=True)
class Holdings:
    """What this process holds of the system."""

    children: frozenset[int]
    connections: frozenset[str]
    shared_memory: frozenset[str]

    @classmethod
    def now(cls) -> Holdings:
        return cls(frozenset(_children()), frozenset(_connections()), frozenset(os.listdir("/dev/shm")))

    def check(self) -> None:
        """Nothing is held that was not held before; what is about to end gets a moment for it."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while (left := self._left()) and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.02)
        assert not left, f"left behind by the test: {left}"

    def _left(self) -> list[str]:
        now = Holdings.now()
        ours = {name for name in now.shared_memory - self.shared_memory if str(os.getpid()) in name}
        processes = [f"process {pid}" for pid in sorted(now.children - self.children)]
        return [*processes, *sorted(now.connections - self.connections), *sorted(ours)]


def _children() -> list[int]:
    found = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def _connections() -> list[str]:
    """Sockets and pipes; files that are mapped or read once are no leak."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # that of the listing itself
            continue
        if target.startswith(("socket:", "pipe:")):
            found.append(target)
    return found
