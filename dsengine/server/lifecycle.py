"""Whether the server takes requests, and which are under way: what an orderly shutdown needs to know."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator

from dsengine.server.errors import ApiError, request_aborted, under_maintenance
from dsengine.server.generation import Generation
from dsengine.server.metrics import Metrics


class Lifecycle:
    """Counts HTTP requests in flight and remembers running generations.

    Attributes:
        draining: the server is about to end, and takes no more requests.
        refusal: what new generations are answered for the time being.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.draining = False
        self.refusal: ApiError | None = None
        self._metrics = metrics
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._generations: set[Generation] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._maintenance = asyncio.Lock()
        self._abort_error: ApiError | None = None

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Around the handling of one HTTP request."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    @contextlib.contextmanager
    def generation(self, generation: Generation) -> Iterator[None]:
        """Around one generation, so that `abort_all` reaches it."""
        self._generations.add(generation)
        self._quiet.clear()
        if self._abort_error is not None:
            generation.fail(self._abort_error)
        try:
            yield
        finally:
            self._generations.discard(generation)
            if not self._generations:
                self._quiet.set()

    @contextlib.asynccontextmanager
    async def at_rest(self, *, abort: bool, seconds: float) -> AsyncGenerator[None, None]:
        """Around what must not meet a generation: new ones are refused, running ones waited for or ended.

        Raises:
            ApiError: some were still running after so many seconds.
        """
        async with self._maintenance:
            self.refusal = under_maintenance()
            try:
                if abort:
                    for generation in list(self._generations):
                        generation.fail(request_aborted())
                try:
                    await asyncio.wait_for(self._quiet.wait(), seconds)
                except TimeoutError as error:
                    message = f"Requests are still running after {seconds:.0f} seconds; abort_all_requests ends them."
                    raise ApiError(409, message, code="requests_running") from error
                yield
            finally:
                self.refusal = None

    async def wait_idle(self) -> None:
        await self._idle.wait()

    def abort_all(self, error: ApiError) -> None:
        """End all generations, and any that may still begin, with this error."""
        self._abort_error = error
        for generation in list(self._generations):
            generation.fail(error)

    def _count(self, change: int) -> None:
        self._in_flight += change
        self._metrics.set_in_flight(self._in_flight)
        if self._in_flight:
            self._idle.clear()
        else:
            self._idle.set()
