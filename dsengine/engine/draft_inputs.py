"""The numbers of the requests that trees are drafted for, while they are on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dsengine.engine.batch import ScheduledRequest
from dsengine.engine.batch_inputs import Int32Array, Int64Array, table_of
from dsengine.model.transfer import upload
from dsengine.specdec.drafter import DraftTargets
from dsengine.specdec.drawn_tree import DrawSource
from dsengine.specdec.shape import TreeShape


@dataclass(frozen=True)
class DraftInputs:
    """The fields of a `DraftTargets` of B requests as arrays, and those of its `DrawSource`.

    Attributes:
        trees: the requests.
    """

    trees: tuple[ScheduledRequest, ...]
    roots: Int64Array
    contexts: Int64Array
    rows: Int64Array
    block_table: Int32Array
    temperature: npt.NDArray[np.float32]
    seeds: Int64Array
    draw_positions: Int64Array

    @classmethod
    def of(
        cls, trees: Sequence[ScheduledRequest], rows: Int64Array, shape: TreeShape | None, block_size: int
    ) -> DraftInputs:
        """What is to be known of requests with drafts; there may be none.

        Args:
            rows: theirs, of the drafter's memory.
            shape: of the trees.
        """
        requests = [s.request for s in trees]
        contexts = np.array([s.start for s in trees], dtype=np.int64)
        num_slots = 0 if shape is None else shape.num_slots
        return cls(
            trees=tuple(trees),
            roots=np.array([s.request.token_ids(s.start, s.start + 1)[0] for s in trees], dtype=np.int64),
            contexts=contexts,
            rows=rows,
            block_table=table_of(requests, -(-(contexts + num_slots) // block_size)),
            temperature=np.array([r.params.temperature for r in requests], dtype=np.float32),
            seeds=np.array([r.seed for r in requests], dtype=np.int64),
            draw_positions=np.array([s.num_output_tokens for s in trees], dtype=np.int64),
        )

    @property
    def samples(self) -> bool:
        """Whether a request is not greedy."""
        return bool((self.temperature > 0).any())

    def source(self, device: torch.device) -> DrawSource:
        """What draws depend on, queued for the device."""
        return DrawSource(
            temperature=upload(self.temperature, device),
            seeds=upload(self.seeds, device),
            positions=upload(self.draw_positions, device),
        )

    def to_device(self, device: torch.device, *, draws: bool) -> DraftTargets:
        """The tensors of a draft; queued, not waited for."""
        return DraftTargets(
            texts=[s.request for s in self.trees],
            roots=upload(self.roots, device),
            contexts=upload(self.contexts, device),
            context_lens=tuple(self.contexts.tolist()),
            block_table=upload(self.block_table, device),
            rows=upload(self.rows, device),
            draws=self.source(device) if draws else None,
        )
