"""What the ranks that run one model must decide alike.

Every rank has a scheduler of its own, fed with the same requests and the same time, so that it takes the same decisions
without being told. What might still differ (a drawn token, by the last bit of a logit or by the time that a grammar
took; the shape of a tree, by measured costs) is taken from the first rank of those that share requests. A digest of
all decisions, compared now and then, proves that it is so.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import msgspec
from torch import Tensor

from dsengine.engine.batch import ScheduledBatch
from dsengine.engine.lock_step import LockStep, Summary, summary
from dsengine.parallel.groups import World
from dsengine.specdec.drafter import PassCounts
from dsengine.specdec.shape import TreeShape

# Steps between two comparisons, where nothing else is exchanged in every step.
_COMPARED_EVERY = 32


class RanksDisagreeError(RuntimeError):
    """Ranks that must decide alike have not: a bug, or broken hardware."""


class Agreement(Protocol):
    """Asked by the engine wherever ranks might differ; every rank asks the same questions in the same order."""

    def seconds(self, measured: float) -> float:
        """A measured time."""

    def tokens(self, token_ids: Tensor) -> Tensor:
        """Drawn tokens, int64 on the device; changed in place."""

    def tree(self, wish: TreeShape | None, requests: int) -> TreeShape | None:
        """The shape of the next step's trees: where there are several groups of ranks, what the one wishes that has
        the most requests to draft for."""

    def passes(self, num_tokens: int, num_logits: int) -> PassCounts | None:
        """What every group has in the drafter's next pass, None where there is one group only."""

    def blocks(self, fitting: int) -> int:
        """The size of the cache, in blocks: where the least fit."""

    def everywhere(self, holds: bool) -> bool:
        """Whether something holds on all ranks."""

    def objections(self, own: str | None) -> str | None:
        """What any rank has against going on, None if none has."""

    def step(self, batch: ScheduledBatch) -> LockStep | None:
        """Enter what was scheduled; returns what all groups of ranks with requests of their own make of this step, None
        where there is one group only."""


class Alone:
    """The agreement of a single process."""

    def seconds(self, measured: float) -> float:
        return measured

    def tokens(self, token_ids: Tensor) -> Tensor:
        return token_ids

    def tree(self, wish: TreeShape | None, requests: int) -> TreeShape | None:
        return wish

    def passes(self, num_tokens: int, num_logits: int) -> PassCounts | None:
        return None

    def blocks(self, fitting: int) -> int:
        return fitting

    def everywhere(self, holds: bool) -> bool:
        return holds

    def objections(self, own: str | None) -> str | None:
        return own

    def step(self, batch: ScheduledBatch) -> LockStep | None:
        return None


class RankAgreement:
    """The agreement of the ranks of a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._digest = 0
        self._num_steps = 0

    def tokens(self, token_ids: Tensor) -> Tensor:
        return self._world.attention.broadcast(token_ids)

    def seconds(self, measured: float) -> float:
        [nanoseconds] = self._world.all_gather_ints([int(measured * 1e9)])[0]
        return nanoseconds * 1e-9

    def tree(self, wish: TreeShape | None, requests: int) -> TreeShape | None:
        values = (0, 0, 0) if wish is None else (wish.steps, wish.topk, wish.num_nodes)
        wishes = self._world.all_gather_ints((requests, *values))[:: self._world.attention.size]
        _, *agreed = max(wishes, key=lambda row: row[0])
        return TreeShape(*agreed) if any(agreed) else None

    def passes(self, num_tokens: int, num_logits: int) -> PassCounts | None:
        if self._world.dp_size == 1:
            return None
        tokens, logits = zip(*self._world.all_gather_ints([num_tokens, num_logits]), strict=True)
        width = self._world.attention.size
        return PassCounts(tokens[::width], logits[::width])

    def blocks(self, fitting: int) -> int:
        return min(blocks for [blocks] in self._world.all_gather_ints([fitting]))

    def everywhere(self, holds: bool) -> bool:
        return all(answer for [answer] in self._world.all_gather_ints([int(holds)]))

    def objections(self, own: str | None) -> str | None:
        said = self._world.gather_bytes((own or "").encode(errors="replace"), 0)
        text = None if said is None else _joined([item.decode() for item in said])
        return self._world.broadcast_bytes(None if text is None else text.encode(), 0).decode() or None

    def step(self, batch: ScheduledBatch) -> LockStep | None:
        self._digest = zlib.crc32(_essence(batch), self._digest)
        self._num_steps += 1
        world = self._world
        if world.dp_size == 1:
            if self._num_steps % _COMPARED_EVERY == 0:
                self._compare([digest for [digest] in world.all_gather_ints([self._digest])])
            return None
        answers = world.all_gather_ints([*summary(batch), self._digest])
        self._compare([digest for *_, digest in answers])
        groups = answers[:: world.attention.size]
        return LockStep.of([Summary(*values) for *values, _ in groups])

    def _compare(self, digests: list[int]) -> None:
        width = self._world.attention.size
        for rank, digest in enumerate(digests):
            if digest != digests[rank // width * width]:
                raise RanksDisagreeError(
                    f"ranks {rank // width * width} and {rank} have scheduled differently by step {self._num_steps}"
                )


def _joined(objections: list[str]) -> str:
    """Those of all ranks in one line; what all of them say is said once."""
    if len(set(objections)) == 1:
        return objections[0]
    return "; ".join(f"rank {rank}: {objection}" for rank, objection in enumerate(objections) if objection)


def _essence(batch: ScheduledBatch) -> bytes:
    return msgspec.msgpack.encode(
        [(s.request.request_id, s.start, s.num_tokens, s.num_drafts, s.samples) for s in batch.requests]
    )
