"""Notices that ranks no longer get on with each other, and ends it.

A rank that waits for one that is dead or stopped waits for ever: inside a collective nothing can be asked any more. So
a thread looks on from outside. It knows what the rank is about and since when; when a process it started has died, or a
piece of work takes longer than it may, it kills those processes, whereupon the collective fails and the rank itself
can say what happened. A rank that even then does not come back is ended by what it was given for that.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from dsengine.parallel.launch import RankProcesses

logger = logging.getLogger(__name__)

_LOOKS_EVERY = 0.1
# A rank whose neighbour died mostly finds out by itself, and then knows better what it was doing.
_GRACE = 1.0
_LAST_GRACE = 5.0
_COLLECTIVES = "dsengine.parallel.collectives"


class RanksFailedError(RuntimeError):
    """The ranks cannot go on together; the message says which of them failed, and what was going on."""


class Watchdog:
    """Looks after one rank and the processes it has started.

    Args:
        processes: the other ranks that this one started.
        limit: seconds that a piece of work may take.
        end: called with the report when the rank does not come back from its collective; must end the process.
    """

    def __init__(self, rank: int, processes: RankProcesses | None, limit: float, end: Callable[[str], None]) -> None:
        self._rank = rank
        self._processes = processes
        self._limit = limit
        self._end = end
        self._what = ""
        self._since: float | None = None
        self._report: str | None = None
        self._has_failed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True, name="watchdog")
        self._thread.start()

    @contextlib.contextmanager
    def over(self, what: str, *, limited: bool = True) -> Iterator[None]:
        """Around a piece of work that needs the other ranks.

        Args:
            what: it is, for the report.
            limited: it may not take longer than the limit.

        Raises:
            RanksFailedError: instead of whatever the work raises because other ranks have failed.
            ValueError, OSError: as they are: something that a user can mend.
        """
        self._what, self._since = what, time.monotonic() if limited else None
        try:
            yield
        except (ValueError, OSError):
            raise
        except Exception as error:
            raise RanksFailedError(self._explain(error)) from error
        finally:
            self._since = None

    @property
    def has_failed(self) -> bool:
        """A piece of work did not come to its end."""
        return self._has_failed

    def stop(self) -> None:
        """From now on the other ranks may end."""
        self._stop.set()

    def _explain(self, error: Exception) -> str:
        self._has_failed = True
        self._stop.set()
        place = _place_of(error)
        if self._report is not None:
            return self._report + place
        # The kernel may tell of the death of a neighbour's connection before it tells of the neighbour's.
        deadline = time.monotonic() + _GRACE
        while not (troubles := self._troubles()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._text(troubles or [f"rank {self._rank}: {type(error).__name__}: {error}"]) + place

    def _troubles(self) -> list[str]:
        return self._processes.describe() if self._processes is not None else []

    def _text(self, troubles: list[str]) -> str:
        return f"{'; '.join(troubles)}; rank {self._rank} was in {self._what}"

    def _look_on(self) -> None:
        while not self._stop.wait(_LOOKS_EVERY):
            since = self._since
            late = since is not None and time.monotonic() - since > self._limit
            if late or (self._processes is not None and self._processes.any_ended):
                break
        else:
            return
        if not late and self._stop.wait(_GRACE):
            return
        self._report = self._text(
            self._troubles()
            or [f"a rank has not answered for {self._limit:g} seconds (none that rank {self._rank} started has ended)"]
        )
        logger.error("%s", self._report)
        if self._processes is not None:
            self._processes.close()
        if not self._stop.wait(_LAST_GRACE):
            self._end(self._report)


def _place_of(error: Exception) -> str:
    """The collective that an error came out of, and what was noted on its way up (the layer)."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    collectives = [frame.f_code.co_name for frame in frames if frame.f_globals.get("__name__") == _COLLECTIVES]
    places = [*collectives[:1], *getattr(error, "__notes__", ())]
    return f" ({', '.join(places)})" if places else ""
