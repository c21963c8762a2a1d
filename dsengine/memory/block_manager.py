"""Who holds which cache block, counted so exactly that a leak can be proven absent.

The cache's memory is `num_blocks` blocks. Each of them is at any time exactly one of

* free: nobody refers to it;
* in use: one or more requests refer to it (the reference count), whether the prefix cache knows it or not;
* idle: the prefix cache knows it, nobody uses it; it may be evicted.

Idle blocks wait in the order of their release, so that the least recently used one is found in constant time. A
request's blocks are released last block first. As whoever uses a block of a prefix also uses all blocks before it, the
children of a block in the prefix tree always become idle before the block itself: the order of release is at the same
time an order in which leaves come first, and eviction needs neither a heap nor a scan of the tree.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free."""


class BlockManager:
    """Reference counts of the blocks of one cache.

    Attributes:
        num_blocks: blocks in the pool, numbered from 0.
        num_cached: blocks that the prefix cache knows, in use or idle.

    Raises:
        ValueError: `num_blocks` is not positive.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; a cache needs at least one block")
        self.num_blocks = num_blocks
        self.num_cached = 0
        self._references = [0] * num_blocks
        self._is_cached = bytearray(num_blocks)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Blocks that only the prefix cache knows: all of them can be evicted."""
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Blocks that can be had without taking any from a request."""
        return len(self._free) + len(self._idle)

    @property
    def num_in_use(self) -> int:
        return self.num_blocks - len(self._free) - len(self._idle)

    def references(self, block: int) -> int:
        """How many users the block has; the prefix cache does not count as one."""
        return self._references[block]

    def is_cached(self, block: int) -> bool:
        return bool(self._is_cached[block])

    def allocate(self, n: int) -> list[int]:
        """Takes `n` free blocks, each with one reference.

        Raises:
            OutOfBlocksError: fewer than `n` blocks are free; nothing was taken. Evict idle ones first.
        """
        free = self._free
        if n > len(free):
            raise OutOfBlocksError(f"{n} blocks are wanted, {len(free)} of {self.num_blocks} are free")
        if n == 1:
            block = free.pop()
            self._references[block] = 1
            return [block]
        blocks = free[len(free) - n :][::-1]
        del free[len(free) - n :]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def incref(self, blocks: Iterable[int]) -> None:
        """Adds a user to blocks that are in use or idle."""
        references = self._references
        for block in blocks:
            if references[block] == 0:
                assert self._is_cached[block], f"block {block} is free; only blocks in use or idle can be shared"
                del self._idle[block]
            references[block] += 1

    def decref(self, blocks: Sequence[int]) -> None:
        """Takes a user from each block, the last one first; without users a block turns idle if cached, else free."""
        references = self._references
        for block in reversed(blocks):
            count = references[block] - 1
            assert count >= 0, f"block {block} is released more often than it was taken"
            references[block] = count
            if count == 0:
                if self._is_cached[block]:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def mark_cached(self, block: int) -> None:
        """The prefix cache now knows this block, which is in use."""
        assert self._references[block] > 0 and not self._is_cached[block], (
            f"block {block} cannot enter the prefix cache"
        )
        self._is_cached[block] = 1
        self.num_cached += 1

    def pop_idle(self) -> int | None:
        """Makes the longest idle block free and returns it; None when there is none."""
        if not self._idle:
            return None
        block, _ = self._idle.popitem(last=False)
        self._forget(block)
        return block

    def drop_idle(self, block: int) -> None:
        """Makes this idle block free, out of turn."""
        del self._idle[block]
        self._forget(block)

    def _forget(self, block: int) -> None:
        self._is_cached[block] = 0
        self.num_cached -= 1
        self._free.append(block)

    def idle_blocks(self) -> list[int]:
        """Idle blocks in the order in which they would be evicted."""
        return list(self._idle)

    def check_integrity(self, owners: Iterable[Sequence[int]], cached: Iterable[int] = ()) -> None:
        """Proves that every block is free, idle or in use, exactly as the owners' blocks and the prefix cache say.

        Args:
            owners: the blocks of each user.
            cached: the blocks that the prefix cache knows.

        Raises:
            AssertionError: a block is leaked, lost or miscounted; the message names it.
        """
        expected = Counter(block for blocks in owners for block in blocks)
        known = list(cached)
        known_set = set(known)
        assert len(known) == len(known_set), "the prefix cache holds a block twice"
        assert self.num_cached == len(known), f"{self.num_cached} blocks are counted as cached, {len(known)} are"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free list twice"
        assert free.isdisjoint(self._idle), "a block is both free and idle"
        assert expected.keys() <= set(range(self.num_blocks)), "an owner holds a block outside the pool"
        for block in range(self.num_blocks):
            references = self._references[block]
            assert references == expected[block], f"block {block} counts {references} users, it has {expected[block]}"
            assert self.is_cached(block) == (block in known_set), f"block {block}: the prefix cache disagrees"
            unused, is_known = references == 0, block in known_set
            assert (block in free) == (unused and not is_known), f"block {block} is wrongly on or off the free list"
            assert (block in self._idle) == (unused and is_known), f"block {block} is wrongly idle or not"
