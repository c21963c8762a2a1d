"""BlockManager against a model that keeps one explicit state per block."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dsengine.memory.block_manager import BlockManager, OutOfBlocksError

NUM_BLOCKS = 7


class BlockManagerMachine(RuleBasedStateMachine):
    """Random users take, share, cache and release blocks; the model is a list of owners and an LRU list."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS)
        self.owners: list[list[int]] = []
        self.cached: set[int] = set()
        self.idle: list[int] = []

    def users(self, block: int) -> int:
        return sum(blocks.count(block) for blocks in self.owners)

    @property
    def free(self) -> set[int]:
        return {b for b in range(NUM_BLOCKS) if b not in self.cached and not self.users(b)}

    @rule(n=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, n: int) -> None:
        free = self.free
        if n > len(free):
            with pytest.raises(OutOfBlocksError, match=f"{n} blocks"):
                self.manager.allocate(n)
            return
        blocks = self.manager.allocate(n)
        assert len(set(blocks)) == n and set(blocks) <= free
        self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        known = sorted({b for blocks in self.owners for b in blocks} | set(self.idle))
        blocks = data.draw(st.lists(st.sampled_from(known), unique=True)) if known else []
        self.manager.incref(blocks)
        self.owners.append(list(blocks))
        self.idle = [b for b in self.idle if b not in blocks]

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.manager.decref(blocks)
        self.idle += [b for b in reversed(blocks) if b in self.cached and not self.users(b)]

    @rule(data=st.data())
    def enter_cache(self, data: st.DataObject) -> None:
        candidates = sorted({b for blocks in self.owners for b in blocks} - self.cached)
        if candidates:
            block = data.draw(st.sampled_from(candidates))
            self.manager.mark_cached(block)
            self.cached.add(block)

    @rule()
    def evict(self) -> None:
        expected = self.idle.pop(0) if self.idle else None
        assert self.manager.pop_idle() == expected
        self.cached.discard(expected if expected is not None else -1)

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.idle))
        self.manager.drop_idle(block)
        self.idle.remove(block)
        self.cached.discard(block)

    @invariant()
    def agrees(self) -> None:
        manager = self.manager
        manager.check_integrity(self.owners, self.cached)
        assert manager.idle_blocks() == self.idle
        assert manager.num_free == len(self.free) and manager.num_idle == len(self.idle)
        assert manager.num_available == len(self.free) + len(self.idle)
        assert manager.num_in_use == len({b for blocks in self.owners for b in blocks})
        assert manager.num_cached == len(self.cached)
        assert [manager.references(b) for b in range(NUM_BLOCKS)] == [self.users(b) for b in range(NUM_BLOCKS)]


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True)


def test_no_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockManager(0)


def test_double_release_is_a_bug() -> None:
    manager = BlockManager(2)
    blocks = manager.allocate(1)
    manager.decref(blocks)
    with pytest.raises(AssertionError, match="released more often"):
        manager.decref(blocks)


def test_free_blocks_cannot_be_shared_or_cached() -> None:
    manager = BlockManager(2)
    with pytest.raises(AssertionError, match="block 1 is free"):
        manager.incref([1])
    with pytest.raises(AssertionError, match="block 0 cannot enter"):
        manager.mark_cached(0)


@pytest.mark.parametrize("owners", [[], [[0, 0]], [[0], [0]], [[1]], [[0], [1]], [[0, 9]]])
def test_integrity_check_finds_leaks_and_strangers(owners: list[list[int]]) -> None:
    manager = BlockManager(3)
    assert manager.allocate(1) == [0]
    manager.check_integrity([[0]])
    with pytest.raises(AssertionError):
        manager.check_integrity(owners)


def test_integrity_check_finds_a_wrong_cache() -> None:
    manager = BlockManager(3)
    block = manager.allocate(1)[0]
    manager.mark_cached(block)
    manager.check_integrity([[block]], [block])
    for cached in ([], [block, block], [block, 2]):
        with pytest.raises(AssertionError):
            manager.check_integrity([[block]], cached)
