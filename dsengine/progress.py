"""What commands draw: progress bars on a terminal (bytes while loading, requests while generating), and tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_PIPED_WIDTH = 120


def table_console() -> Console:
    """Standard output; where nobody's window limits it, wide enough for the widest table."""
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)


@contextmanager
def loading_progress(*, enabled: bool, label: str = "loading") -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback `(bytes done, bytes in all)` that moves a bar, or None where there is no one to see it."""
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def request_progress(total: int, *, enabled: bool) -> Iterator[Callable[[int], None] | None]:
    """Yield a callback that is told how many more requests have finished."""
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generating", total=total)
        yield lambda finished: bar.advance(task, finished)
