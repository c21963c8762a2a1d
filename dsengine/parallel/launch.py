"""The other ranks' processes: started, watched, and never left behind.

A rank must not outlive its parent, however that dies and in whatever state the rank is: a pipe that closes tells one
that is running, and the kernel kills one that cannot be told (Linux only: stopped, or waiting for a device).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Called by a process that was just started: it ends when `parent`, which holds its standard input, is no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before it could be watched
            os._exit(1)
    threading.Thread(target=_exit_with_input, daemon=True).start()


def _exit_with_input() -> None:
    # os.read rather than sys.stdin: a thread inside a buffered reader would make interpreter shutdown fail.
    while os.read(0, 4096):
        pass
    os._exit(0)


class RankProcesses:
    """Ranks that run `python -m MODULE` as children of this process, each given one line on its standard input.

    Args:
        lines: of each rank, by its number.
    """

    def __init__(self, module: str, lines: Mapping[int, bytes]) -> None:
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        started: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        # The kernel takes the end of the *thread* that started a process for its parent's: it must last.
        threading.Thread(target=self._keep, args=(module, lines, started), daemon=True, name="ranks").start()
        error = started.get()
        if error is not None:
            raise error

    def _keep(self, module: str, lines: Mapping[int, bytes], started: queue.SimpleQueue[Exception | None]) -> None:
        try:
            for rank, line in lines.items():
                # Its own session: Ctrl-C at the terminal is for the first process, which ends the others in good order.
                child = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, start_new_session=True)
                self._children[rank] = child
                assert child.stdin is not None
                child.stdin.write(line + b"\n")
                child.stdin.flush()
        except OSError as error:
            self._kill()
            started.put(error)
            return
        started.put(None)
        self._closed.wait()

    @property
    def pids(self) -> dict[int, int]:
        """Process id of each rank."""
        return {rank: child.pid for rank, child in self._children.items()}

    @property
    def any_ended(self) -> bool:
        """One of them runs no more, whatever its exit status."""
        return any(child.poll() is not None for child in self._children.values())

    def death_notices(self, resources: contextlib.ExitStack) -> list[int]:
        """Descriptors that can be read when one of them has ended (Linux only, elsewhere there are none).

        Args:
            resources: which close them.
        """
        notices = []
        for pid in self.pids.values() if sys.platform == "linux" else ():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                notices.append(os.pidfd_open(pid))
                resources.callback(os.close, notices[-1])
        return notices

    def describe(self) -> list[str]:
        """What is the matter with ranks that have ended or stand still; nothing for those that run."""
        found = []
        for rank, child in self._children.items():
            status = child.poll()
            if status is not None:
                found.append(f"rank {rank} {describe_exit(status)}")
            elif _state(child.pid) in "Tt":
                found.append(f"rank {rank} is stopped (process {child.pid})")
        return found

    def wait(self, timeout: float | None = None) -> dict[int, int]:
        """Wait until all have ended, or one has failed, or the time is over; the exit status of those that ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            ended = {rank: code for rank, child in self._children.items() if (code := child.poll()) is not None}
            if len(ended) == len(self._children) or any(ended.values()):
                return ended
            if deadline is not None and time.monotonic() > deadline:
                return ended
            time.sleep(0.02)

    def close(self, timeout: float = 0.0) -> None:
        """Let them end by themselves for `timeout` seconds, then kill them; returns when they are gone."""
        if timeout > 0:
            self.wait(timeout)
        self._kill()
        self._closed.set()

    def _kill(self) -> None:
        for child in self._children.values():
            child.kill()
        for child in self._children.values():
            child.wait()
            if child.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.close()


def describe_exit(status: int) -> str:
    """An exit status as `subprocess` gives it, in words behind the name of who ended."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit code {status}"


def is_alive(pid: int) -> bool:
    """Whether a process of this id exists and has not ended (Linux only)."""
    return _state(pid) not in "ZX"


def _state(pid: int) -> str:
    """The letter that the kernel gives to the state of a process: "T" is stopped, "Z" ended, "X" gone."""
    try:
        # It follows the name in parentheses, which may itself hold any character.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
