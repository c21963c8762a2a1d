"""What the kernel knows of a server and its engine: memory, descriptors, children, sockets and shared memory."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figures:
    """One look at a process."""

    rss_kib: int
    num_fds: int
    num_threads: int


def figures(pid: int) -> Figures:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return Figures(int(lines["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd")), int(lines["Threads"]))


def settled_figures(pid: int, looks: int = 6, pause: float = 0.05) -> Figures:
    """The least of some looks in a row: a connection that has just ended may still be closing."""
    seen = []
    for _ in range(looks):
        seen.append(figures(pid))
        time.sleep(pause)
    return Figures(*(min(look[i] for look in map(_values, seen)) for i in range(3)))


def _values(look: Figures) -> tuple[int, int, int]:
    return look.rss_kib, look.num_fds, look.num_threads


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    with contextlib.suppress(OSError):  # of what has just ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for child in map(int, (task / "children").read_text().split()):
                    found += [child, *children(child)]
    return found


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def slope(values: list[tuple[float, float]]) -> float:
    """Of the straight line that fits (x, y) best, in y per x."""
    mean_x = sum(x for x, _ in values) / len(values)
    mean_y = sum(y for _, y in values) / len(values)
    return sum((x - mean_x) * (y - mean_y) for x, y in values) / sum((x - mean_x) ** 2 for x, _ in values)
