"""Ranks for tests: one process each, none of which outlives the call."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def run_worker(worker: str, count: int, *arguments: object, helpers: Sequence[str], timeout_s: float) -> None:
    """Run `worker RANK ARGUMENTS…` for every rank; all must end well within the time.

    Args:
        worker: a program beside this file.
        helpers: folders of `tests` whose modules it imports.
    """
    paths = [str(ROOT), str(HERE), *(str(ROOT / "tests" / name) for name in helpers)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / worker), str(rank), *map(str, arguments)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [rank.communicate(timeout=timeout_s)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)
