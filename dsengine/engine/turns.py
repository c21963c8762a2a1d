"""Whose turn it is among waiting requests of one priority: cached prefixes count, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Sequence

from dsengine.engine.policy import SchedulerConfig, admission_score
from dsengine.engine.prefix_sharing import PrefixSharing
from dsengine.engine.sequence_state import SequenceState


class Turns:
    """Orders waiting requests, and counts how often each was overtaken."""

    def __init__(self, config: SchedulerConfig, sharing: PrefixSharing) -> None:
        self._config = config
        self._sharing = sharing

    def score(self, state: SequenceState, now: float) -> float:
        """The largest goes first, ties by arrival."""
        cached = self._sharing.find(state) * self._config.block_size / state.num_tokens
        waited = now - state.request.arrival_time
        return admission_score(waited, cached, self._config.cache_hit_credit, must_go=self.has_come(state))

    def has_come(self, state: SequenceState) -> bool:
        """Nobody goes before it: it was running already, or was overtaken often enough."""
        return state.was_admitted_before or state.overtaken >= self._config.max_overtakes

    def count_overtakes(self, group: Sequence[SequenceState]) -> None:
        """After a round of admission among these, in the order of arrival."""
        overtakers = 0
        for state in reversed(group):
            if state.is_running:
                overtakers += 1
            else:
                state.overtaken += overtakers
