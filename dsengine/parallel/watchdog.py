"""Notices that ranks no longer get on with each other, and ends it.

A rank that waits for one that is dead or stopped waits for ever: inside a collective nothing can be asked any more. So
a thread looks on from outside. It knows what the rank is about and since when; when a process it started has died, or a
piece of work takes longer than it may, it kills those processes, whereupon the collective fails and the rank itself
can say what happened. A rank that even then does not come back is ended by what it was given for that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from dsengine.parallel.launch import RankProcesses
from dsengine.parallel.lifelines import Lifelines

logger = logging.getLogger(__name__)

EXIT_RANKS_FAILED = 1

_LOOKS_EVERY = 0.1
# A rank whose neighbour died mostly finds out by itself, and then knows better what it was doing. Clients wait; while
# nobody does yet, it may also be about to name what its user can mend.
_GRACE, _LOADING_GRACE = 0.5, 2.0
_LAST_GRACE = 5.0
# A connection may end before the death of the process at its other end is known, and that before its neighbours'.
_NEWS_SECONDS, _COMPANY_SECONDS = 1.0, 0.1
_COLLECTIVES = "dsengine.parallel.collectives"


class RanksFailedError(RuntimeError):
    """The ranks cannot go on together; the message says which of them failed, and what was going on."""


class Watchdog:
    """Looks after one rank, the processes it has started, and those it is connected with.

    Args:
        limit: seconds that a piece of work may take.
        processes: the other ranks that this one started.
        tell: called with the report, from another thread, before anything is done about it. When the rank does not
            come back from its collective even then, this process is ended.
    """

    def __init__(
        self,
        rank: int,
        limit: float,
        processes: RankProcesses | None = None,
        tell: Callable[[str], None] = lambda report: None,
    ) -> None:
        self._rank = rank
        self._limit = limit
        self._processes = processes
        self._tell = tell
        self._lifelines = Lifelines({}, 1)
        self._grace = _LOADING_GRACE
        self._what = ""
        self._since: float | None = None
        self._report: str | None = None
        self._has_failed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True, name="watchdog")
        self._thread.start()

    def watch(self, lifelines: Lifelines) -> None:
        """Look after ranks of other machines too."""
        self._lifelines = lifelines

    def loaded(self) -> None:
        """From now on there are clients, and a death is reported with less patience."""
        self._grace = _GRACE

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
        deadline = time.monotonic() + _NEWS_SECONDS
        while not (troubles := self._troubles()) and time.monotonic() < deadline:
            time.sleep(0.02)
        if troubles:
            time.sleep(_COMPANY_SECONDS)
            troubles = self._troubles()
        return self._text(troubles or [f"rank {self._rank}: {type(error).__name__}: {error}"]) + place

    def _troubles(self) -> list[str]:
        own = self._processes.describe() if self._processes is not None else []
        return own + self._lifelines.describe()

    def _text(self, troubles: list[str]) -> str:
        return f"{'; '.join(troubles)}; rank {self._rank} was in {self._what}"

    def _look_on(self) -> None:
        with contextlib.ExitStack() as resources:
            notices = self._processes.death_notices(resources) if self._processes is not None else []
            while not (dead := self._has_lost()) and not self._is_late():
                if self._stop.is_set():
                    return
                _wait_for([*notices, *self._lifelines.fds], _LOOKS_EVERY)
        if not dead or not self._stop.wait(self._grace):
            self._end()

    def _has_lost(self) -> bool:
        return self._lifelines.look() or (self._processes is not None and self._processes.any_ended)

    def _is_late(self) -> bool:
        since = self._since
        return since is not None and time.monotonic() - since > self._limit

    def _end(self) -> None:
        self._report = self._text(
            self._troubles()
            or [f"a rank has not answered for {self._limit:g} seconds (none that rank {self._rank} knows has ended)"]
        )
        self._tell(self._report)
        logger.error("%s", self._report)
        if self._processes is not None:
            self._processes.close()
        self._lifelines.close()
        if not self._stop.wait(_LAST_GRACE):
            os._exit(EXIT_RANKS_FAILED)


def _wait_for(fds: list[int], seconds: float) -> None:
    """Until one of them can be read, at most."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    poller.poll(seconds * 1000)


def _place_of(error: Exception) -> str:
    """The collective that an error came out of, and what was noted on its way up (the layer)."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    collectives = [frame.f_code.co_name for frame in frames if frame.f_globals.get("__name__") == _COLLECTIVES]
    places = [*collectives[:1], *getattr(error, "__notes__", ())]
    return f" ({', '.join(places)})" if places else ""
