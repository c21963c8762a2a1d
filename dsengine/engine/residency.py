"""Whether weights and cache are in memory, and whose weights: putting an engine to sleep, waking it, giving it others.

Tensors keep their identity throughout: only the memory under them is given back and taken again, so that nothing that
holds one of them notices. Captured graphs hold addresses instead, and forbid it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsengine.engine.model_runner import ModelRunner
from dsengine.model.loader import prepare_refill
from dsengine.model.manifest import verify_manifest


class Residency:
    """What lies under one runner's model and cache. All methods need an engine at rest.

    Args:
        checkpoint: whose weights are loaded.

    Attributes:
        level: 0 awake; 1 the cache is gone, and on a GPU the weights are in the host's memory; 2 the weights are gone.
    """

    def __init__(self, runner: ModelRunner, checkpoint: Path) -> None:
        self.level = 0
        self._runner = runner
        self._checkpoint = checkpoint
        self._sizes: list[tuple[torch.UntypedStorage, int]] = []
        self._on_host: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def sleep(self, level: int) -> None:
        """Give memory back, keeping what `wake_up` cannot restore.

        Raises:
            ValueError: there is no such level, the engine is asleep already, or its steps are captured.
        """
        if level not in (1, 2):
            raise ValueError(f"level is {level}; it must be 1 or 2")
        if self.level:
            raise ValueError(f"the engine is asleep already, at level {self.level}")
        if self._runner.graphs is not None:
            raise ValueError("captured steps hold on to their memory; start the server with --disable-cuda-graph")
        weights = list(_storages(self._weights()))
        if level == 1 and self._runner.device.type == "cuda":
            self._on_host = [(storage, storage.cpu()) for storage in weights]
        gone = weights if level == 2 or self._on_host else []
        for storage in [*_storages(self._runner.pool.layers), *gone]:
            self._sizes.append((storage, storage.nbytes()))
            storage.resize_(0)
        self.level = level

    def wake_up(self) -> None:
        """Be as before, with an empty cache; nothing happens to an engine that is awake.

        Raises:
            ValueError: the checkpoint is no longer what it was.
        """
        refill = prepare_refill(self._runner.model, self._checkpoint) if self.level == 2 else None
        for storage, size in self._sizes:
            storage.resize_(size)
        self._sizes = []
        for storage, copy in self._on_host:
            storage.copy_(copy)
        self._on_host = []
        for layer in self._runner.pool.layers:
            layer.zero_()
        if refill is not None:
            refill()
        self.level = 0

    def update(self, checkpoint: Path) -> None:
        """Take the weights of another checkpoint of the same model; they are checked before any is overwritten.

        Raises:
            ValueError: they do not fit, or the engine is asleep. The engine is as it was.
        """
        if self.level:
            raise ValueError("the engine is asleep; wake it up first")
        verify_manifest(checkpoint)
        prepare_refill(self._runner.model, checkpoint)()
        self._checkpoint = checkpoint

    def _weights(self) -> Iterator[Tensor]:
        for slot in self._runner.model.slots.by_name.values():
            yield slot.weight
            if slot.scale is not None:
                yield slot.scale


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """The memory under these tensors, each piece once."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    yield from found.values()
