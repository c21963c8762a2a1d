"""Graphs for machines without CUDA: replaying runs the captured function again, on whatever its tensors hold then."""

from __future__ import annotations

from dsengine.engine.graph_runner import GraphFunction


class ReplayedFunction:
    def __init__(self, function: GraphFunction) -> None:
        self.num_replays = 0
        self._function = function

    def replay(self) -> None:
        self.num_replays += 1
        self._function()


class ReplayedGraphs:
    """A `GraphBackend`; remembers what it captured, in that order."""

    def __init__(self) -> None:
        self.captured: list[ReplayedFunction] = []

    def capture(self, function: GraphFunction) -> ReplayedFunction:
        function()
        self.captured.append(ReplayedFunction(function))
        return self.captured[-1]

    def counts(self) -> list[int]:
        """How often each has been replayed."""
        return [graph.num_replays for graph in self.captured]
