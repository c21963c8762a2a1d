"""Which attention-data-parallel rank a request should go to: where its prefix lies, unless others have much less to do.

Every such rank has a cache of its own, and a prefix is worth most where it is already computed. The router does not ask
the ranks what they hold. It remembers what it sent to whom: block by block, the hash of a prefix and the set of ranks
that have seen it, as one bitmask for all ranks, so that a request's prefix is looked up once and not once per rank.
Per rank the memory is bounded by what the rank's cache holds and forgets the least recently used first, the end of a
prefix before its beginning, as the cache does. It is a guess: wrong, it costs time and never an answer. Conversations
stay where they are for the same reason that common prefixes gather; there is no table of sessions.

A hot prefix does not make a hot rank: each rank's outstanding work counts against it, so that it can be ahead of others
by no more than its prefixes are worth, and the first request to be sent elsewhere takes the prefix along. There is no
clock and no randomness: the same calls give the same routes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

PREFIX_WEIGHT = 16
"""Outstanding tokens that one known token of a prompt outweighs: it need not be computed, while most of those have been
and only stand by. From 8 to 64 hit rates and throughput hardly differ in `benchmarks/routing.py`; below they fall."""

PENDING_WEIGHT = 5
"""How much each token of a prompt counts in a rank's load until its request has its first output: it is still to be
computed, and while it is, the ranks in lock-step wait. Its callers count so; 5 is best of 1, 2, 5, 17 there."""


class PrefixRouter:
    """Remembers what was sent to which rank.

    Args:
        num_ranks: attention-data-parallel ranks.
        block_size: tokens that are remembered together; a multiple of the caches' block size, or that itself.
        capacity: blocks of this size that one rank's cache holds.

    Raises:
        ValueError: one of them is not positive.
    """

    def __init__(self, num_ranks: int, block_size: int, capacity: int) -> None:
        for name, value in (("num_ranks", num_ranks), ("block_size", block_size), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.num_ranks = num_ranks
        self.block_size = block_size
        self.capacity = capacity
        self._holders: dict[int, int] = {}  # hash of a prefix → bitmask of ranks
        self._recent: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_ranks)]
        self._next = 0

    def route(self, token_ids: Sequence[int], salt: str, loads: Sequence[int]) -> int:
        """The rank for a prompt, which is remembered as sent there.

        It is the one with the fewest outstanding tokens, less `PREFIX_WEIGHT` times the tokens of the prompt that it
        has seen. Equal ranks take turns.

        Args:
            loads: outstanding tokens of every rank: all those of its requests that have not ended, as far as known;
                prompts without any output yet count `PENDING_WEIGHT` times.

        Raises:
            ValueError: `loads` has not one entry per rank.
        """
        if len(loads) != self.num_ranks:
            raise ValueError(f"there are {len(loads)} loads; there must be one for each of {self.num_ranks} ranks")
        keys = self._keys(token_ids, salt)
        seen = self._matched(keys)
        worth, first, count = PREFIX_WEIGHT * self.block_size, self._next, self.num_ranks
        best = min(range(count), key=lambda rank: (loads[rank] - seen.get(rank, 0) * worth, (rank - first) % count))
        self._next = (best + 1) % count
        self._remember(best, keys)
        return best

    def matched_tokens(self, token_ids: Sequence[int], salt: str) -> list[int]:
        """Leading tokens of a prompt that each rank is believed to have."""
        seen = self._matched(self._keys(token_ids, salt))
        return [seen.get(rank, 0) * self.block_size for rank in range(self.num_ranks)]

    def finished(self, rank: int, token_ids: Sequence[int], salt: str) -> None:
        """A request of `rank` has ended with these tokens, prompt and output: a next turn will begin with them."""
        self._remember(rank, self._keys(token_ids, salt))

    def flushed(self, rank: int) -> None:
        """A rank's cache was emptied."""
        for key in self._recent[rank]:
            self._drop(key, rank)
        self._recent[rank].clear()

    def _keys(self, token_ids: Sequence[int], salt: str) -> list[int]:
        """Hashes of the prefixes that end with each whole block. Hashing tuples is what Python does fastest here."""
        size, key, keys = self.block_size, hash(salt), []
        for end in range(size, len(token_ids) + 1, size):
            key = hash((key, tuple(token_ids[end - size : end])))
            keys.append(key)
        return keys

    def _matched(self, keys: Sequence[int]) -> dict[int, int]:
        """Leading blocks that each rank has seen, for the ranks that have seen any."""
        holders, lengths = self._holders, {}
        ranks = holders.get(keys[0], 0) if keys else 0
        depth = 0
        while ranks:
            depth += 1
            still = ranks & holders.get(keys[depth], 0) if depth < len(keys) else 0
            gone = ranks ^ still
            while gone:
                lowest = gone & -gone
                lengths[lowest.bit_length() - 1] = depth
                gone ^= lowest
            ranks = still
        return lengths

    def _remember(self, rank: int, keys: Sequence[int]) -> None:
        recent, holders, bit = self._recent[rank], self._holders, 1 << rank
        for key in reversed(keys):  # so that the beginning is the last to be forgotten
            if key in recent:
                recent.move_to_end(key)
            else:
                recent[key] = None
                holders[key] = holders.get(key, 0) | bit
        while len(recent) > self.capacity:
            key, _ = recent.popitem(last=False)
            self._drop(key, rank)

    def _drop(self, key: int, rank: int) -> None:
        left = self._holders[key] & ~(1 << rank)
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]

    def check_integrity(self) -> None:
        """Proves that the ranks' memories and the index agree, and that none is larger than it may be.

        Raises:
            AssertionError: they do not.
        """
        expected: dict[int, int] = {}
        for rank, recent in enumerate(self._recent):
            assert len(recent) <= self.capacity, f"rank {rank} is credited with {len(recent)} of {self.capacity} blocks"
            for key in recent:
                expected[key] = expected.get(key, 0) | 1 << rank
        assert expected == self._holders, "the index holds what no rank is credited with, or lacks what one is"
