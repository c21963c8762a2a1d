"""Captured steps that exchange tokens by DeepEP: its low-latency kernels must find nothing of the normal ones.

A step that runs kernel by kernel sees to that by itself. A replayed one does no more than what was captured, and cannot
know which kernels ran before it.
"""

from __future__ import annotations

from dsengine.engine.graph_runner import CapturedFunction, GraphBackend, GraphFunction
from dsengine.parallel.deep_ep import DeepEp


class CleanedGraphs:
    """A `GraphBackend` that cleans DeepEP's buffer before another one captures and replays."""

    def __init__(self, backend: GraphBackend, deep_ep: DeepEp) -> None:
        self._backend, self._deep_ep = backend, deep_ep

    def capture(self, function: GraphFunction) -> CapturedFunction:
        self._deep_ep.clean()
        return _CleanedFunction(self._backend.capture(function), self._deep_ep)


class _CleanedFunction:
    def __init__(self, captured: CapturedFunction, deep_ep: DeepEp) -> None:
        self._captured, self._deep_ep = captured, deep_ep

    def replay(self) -> None:
        self._deep_ep.clean()
        self._captured.replay()
