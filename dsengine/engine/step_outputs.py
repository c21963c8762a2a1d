"""What a step has computed, on the device: all that drawing, verifying and catching up go on from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsengine.engine.lock_step import StepKind


@dataclass(frozen=True)
class StepOutputs:
    """A step's outputs; those of a captured step are overwritten by the next one.

    Attributes:
        logits: float32 [requests that sample, vocab_size], or more rows for requests with trees; the caller may change
            them, until the next step.
        hidden: [T, hidden_size] after the final norm; None where nothing but the logits is wanted.
        positions: int64 [T]; of a tree's nodes only the root's is to be relied on.
        slots: int64 [T], where in the cache the tokens lie.
        kind: of the captured step that was replayed; None: the step ran kernel by kernel.
    """

    logits: Tensor
    hidden: Tensor | None
    positions: Tensor
    slots: Tensor
    kind: StepKind | None = None
