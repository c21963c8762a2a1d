"""The host's side of speculation: which tree comes next, and what has come of those before."""

from __future__ import annotations

from collections.abc import Sequence

from dsengine.engine.messages import SpeculationStats
from dsengine.engine.phase_times import PhaseTimes
from dsengine.specdec.controller import Load, TreeController
from dsengine.specdec.shape import TreeShape


class SpeculationBook:
    """Asks the controller, tells it the outcome, and keeps count for the metrics.

    Args:
        times: where the device's half adds up its phases.
    """

    def __init__(self, controller: TreeController, times: PhaseTimes) -> None:
        depth = controller.largest.max_depth
        self._controller = controller
        self._times = times
        self._num_drafts = self._num_kept = 0
        self._lengths = [0] * (depth + 1)
        self._tried = [0] * depth
        self._steps: dict[str, int] = {}
        self._shape: TreeShape | None = controller.current

    def choose(self, load: Load) -> TreeShape | None:
        """The shape of the next step's trees, None for no drafts."""
        if load.requests == 0:
            return None
        self._shape = self._controller.choose(load)
        return self._shape

    def enter(self, shape: TreeShape | None, accepted: Sequence[int], num_kept: int) -> None:
        """A step's outcome: accepted drafts of each request that had a tree, and how many of them became tokens."""
        if shape is None or not accepted:
            return
        self._controller.observe(shape, accepted)
        self._steps[str(shape)] = self._steps.get(str(shape), 0) + 1
        self._num_drafts += len(accepted) * (shape.num_nodes - 1)
        self._num_kept += num_kept
        for count in accepted:
            self._lengths[count] += 1
            for depth in range(min(count + 1, shape.max_depth)):
                self._tried[depth] += 1

    def stats(self) -> SpeculationStats:
        """A snapshot."""
        return SpeculationStats(
            shape=str(self._shape) if self._shape is not None else "none",
            num_drafts=self._num_drafts,
            num_accepted=self._num_kept,
            lengths=list(self._lengths),
            tried=list(self._tried),
            steps=dict(self._steps),
            seconds=self._times.read(),
        )
