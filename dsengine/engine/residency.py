"""Whether weights and cache are in memory, and whose weights: putting an engine to sleep, waking it, giving it others.

Where several ranks run the model, all of them do each thing, or none: before anything is overwritten every rank has
looked at its own files, and what fails on one of them afterwards is undone on all.

Tensors keep their identity throughout: only the memory under them is given back and taken again, so that nothing that
holds one of them notices. Captured steps hold addresses instead: they stay right when weights are overwritten in place,
but sleep forgets them, and waking captures them anew.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dsengine.engine.agreement import Agreement
from dsengine.engine.model_runner import ModelRunner
from dsengine.model.loader import prepare_refill

# What files, their data and a lack of memory may raise; torch knows no type of its own for the host's memory.
_FAILURES = (ValueError, OSError, MemoryError, RuntimeError)

T = TypeVar("T")


class Residency:
    """What lies under one runner's model and cache. All methods need an engine at rest, and the same call on all ranks.

    Args:
        checkpoint: whose weights are loaded.
        verify: raises a `ValueError` for a checkpoint that is not as it was written.
        agreement: with the other ranks that run the model.

    Attributes:
        level: 0 awake; 1 the cache is gone, and on a GPU the weights are in the host's memory; 2 the weights are gone.
    """

    def __init__(
        self, runner: ModelRunner, checkpoint: Path, verify: Callable[[Path], object], agreement: Agreement
    ) -> None:
        self.level = 0
        self._runner = runner
        self._checkpoint = checkpoint
        self._verify = verify
        self._agreement = agreement
        self._sizes: list[tuple[torch.UntypedStorage, int]] = []
        self._on_host: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def sleep(self, level: int) -> None:
        """Give memory back, keeping what `wake_up` cannot restore.

        Raises:
            ValueError: there is no such level, the engine is asleep already, or the host has no room for a rank's
                weights.
        """
        if level not in (1, 2):
            raise ValueError(f"level is {level}; it must be 1 or 2")
        if self.level:
            raise ValueError(f"the engine is asleep already, at level {self.level}")
        if level == 1 and self._runner.device.type == "cuda":
            weights = list(_storages(self._weights()))
            self._on_host = self._everywhere(lambda: [(storage, storage.cpu()) for storage in weights])
        self._lie_down(level)

    def wake_up(self) -> None:
        """Be as before, with an empty cache; nothing happens to an engine that is awake.

        Raises:
            ValueError: on some rank the checkpoint is no longer what it was, or there is no room. The engine sleeps on.
        """
        if not self.level:
            return
        fill = self._copy_back if self.level == 1 else self._everywhere(partial(self._prepare, self._checkpoint))
        try:
            self._everywhere(self._take_memory)
            self._everywhere(fill)
        except ValueError:
            self._give_memory()
            raise
        self._sizes, self._on_host = [], []
        for layer in self._runner.pool.layers:
            layer.zero_()
        self._capture()
        self.level = 0

    def update(self, checkpoint: Path) -> None:
        """Take the weights of another checkpoint of the same model; they are checked before any is overwritten.

        Raises:
            ValueError: they do not fit, or the engine is asleep: it is as it was. Or they could not be read to the end:
                the weights of before are loaded again, or where that fails too the engine is asleep at level 2.
        """
        if self.level:
            raise ValueError("the engine is asleep; wake it up first")
        fill = self._everywhere(partial(self._prepare, checkpoint))
        try:
            self._everywhere(fill)
        except ValueError as error:
            self._restore(str(error))
        self._checkpoint = checkpoint

    def _restore(self, failure: str) -> None:
        """After an update that has failed halfway: raises what is to be said of it."""
        try:
            self._everywhere(self._everywhere(partial(self._prepare, self._checkpoint)))
        except ValueError as error:
            self.level = 2
            raise ValueError(
                f"{failure}; the weights of before could not be read either: {error}; the engine has none now and is "
                "asleep at level 2: waking it up tries again to read those of before"
            ) from error
        raise ValueError(f"{failure}; the weights of before are loaded again")

    def _prepare(self, checkpoint: Path) -> Callable[[], None]:
        self._verify(checkpoint)
        return prepare_refill(self._runner.model, checkpoint)

    def _everywhere(self, work: Callable[[], T]) -> T:
        """What this rank's work returns.

        Raises:
            ValueError: it has failed on some rank; the same on all of them.
        """
        result, problem = None, None
        try:
            result = work()
        except _FAILURES as error:
            problem = str(error) or type(error).__name__
        problem = self._agreement.objections(problem)
        if problem is not None:
            raise ValueError(problem)
        return result  # type: ignore[return-value]

    def _lie_down(self, level: int) -> None:
        gone = self._weights() if level == 2 or self._on_host else ()
        self._sizes = [(storage, storage.nbytes()) for storage in _storages([*self._runner.pool.layers, *gone])]
        self._runner.use_graphs(None)
        self._give_memory()
        self.level = level

    def _give_memory(self) -> None:
        for storage, _ in self._sizes:
            storage.resize_(0)
        if self._runner.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _take_memory(self) -> None:
        for storage, size in self._sizes:
            storage.resize_(size)

    def _capture(self) -> None:
        """Capture steps again, if they were; ranks meet while they do, so that one that cannot must end them all."""
        if self._runner.capture is None or self._runner.graphs is not None:
            return
        try:
            self._runner.capture()
        except ValueError as error:
            raise RuntimeError(f"the steps could not be captured again: {error}") from error

    def _copy_back(self) -> None:
        for storage, copy in self._on_host:
            storage.copy_(copy)

    def _weights(self) -> Iterator[Tensor]:
        for slot in self._runner.model.slots.by_name.values():
            yield slot.weight
            if slot.scale is not None:
                yield slot.scale


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """The memory under these tensors, each piece once."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    yield from found.values()
