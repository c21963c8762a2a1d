"""The router between ranks: prefixes gather, load spreads them, memory is bounded and agrees with its index."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsengine.parallel.prefix_routing import PREFIX_WEIGHT, PrefixRouter

IDLE = [0, 0, 0, 0]


def prompt(group: int, length: int = 64, tail: int = 0) -> list[int]:
    """A prompt of prefix group `group`, with a tail of its own."""
    return [group * 1000 + i for i in range(length)] + [10**6 + tail] * 8


def test_equal_ranks_take_turns() -> None:
    router = PrefixRouter(4, 16, 1000)
    assert [router.route(prompt(group), "", IDLE) for group in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_prefixes_stay_where_they_are() -> None:
    router = PrefixRouter(4, 16, 1000)
    first = {group: router.route(prompt(group), "", IDLE) for group in (3, 1, 2)}
    for tail in range(5):
        for group, rank in first.items():
            assert router.route(prompt(group, tail=tail), "", IDLE) == rank


def test_the_longest_prefix_wins() -> None:
    router = PrefixRouter(4, 16, 1000)
    common = router.route(prompt(0, 32), "", IDLE)
    longer = router.route(prompt(0, 64), "", [10**4 if rank == common else 0 for rank in range(4)])
    assert longer != common
    assert router.matched_tokens(prompt(0, 64), "")[longer] == 64
    assert router.matched_tokens(prompt(0, 64), "")[common] == 32
    assert router.route(prompt(0, 64), "", IDLE) == longer


def test_load_outweighs_a_prefix_once_it_is_larger() -> None:
    router = PrefixRouter(2, 16, 1000)
    home = router.route(prompt(0, 64), "", [0, 0])
    loads = [0, 0]
    loads[home] = 64 * PREFIX_WEIGHT - 1
    assert router.route(prompt(0, 64), "", loads) == home
    loads[home] = 64 * PREFIX_WEIGHT + 1
    assert router.route(prompt(0, 64), "", loads) != home
    assert router.matched_tokens(prompt(0, 64), "") == [64, 64]  # both have it now


def test_salts_share_nothing() -> None:
    router = PrefixRouter(2, 16, 1000)
    router.route(prompt(0), "one", [0, 0])
    assert max(router.matched_tokens(prompt(0), "one")) == 64
    assert router.matched_tokens(prompt(0), "another") == [0, 0]


def test_prompts_shorter_than_a_block() -> None:
    router = PrefixRouter(3, 64, 10)
    assert [router.route([1, 2, 3], "", [5, 0, 0]) for _ in range(4)] == [1, 2, 1, 2]
    assert router.matched_tokens([1, 2, 3], "") == [0, 0, 0]


def test_a_conversation_returns_with_its_answer() -> None:
    router = PrefixRouter(4, 16, 1000)
    turn = prompt(0)
    rank = router.route(turn, "", IDLE)
    turn = turn + list(range(50))
    router.finished(rank, turn, "")
    assert router.matched_tokens([*turn, 7, 8, 9], "")[rank] == len(turn) // 16 * 16
    assert router.route([*turn, 7, 8, 9], "", IDLE) == rank


def test_the_least_recently_used_is_forgotten_end_first() -> None:
    router = PrefixRouter(1, 16, 6)
    router.route(prompt(0, 64), "", [0])
    router.route(prompt(1, 64), "", [0])
    assert router.matched_tokens(prompt(0, 64), "") == [32]
    assert router.matched_tokens(prompt(1, 64), "") == [64]
    router.route(prompt(0, 32), "", [0])
    router.route(prompt(2, 64), "", [0])
    assert router.matched_tokens(prompt(1, 64), "") == [0]
    assert router.matched_tokens(prompt(0, 64), "") == [32]


def test_a_flushed_rank_is_credited_with_nothing() -> None:
    router = PrefixRouter(2, 16, 100)
    for loads in ([0, 10**4], [10**4, 0]):
        router.route(prompt(0), "", loads)
    router.flushed(0)
    router.check_integrity()
    assert router.matched_tokens(prompt(0), "") == [0, 64]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 90), st.integers(0, 2), st.sampled_from(["", "salt"])), max_size=40
    ),
    st.integers(1, 12),
)
def test_memory_is_bounded_and_agrees_with_its_index(calls: list[tuple[int, int, int, str]], capacity: int) -> None:
    routers = [PrefixRouter(3, 8, capacity) for _ in range(2)]
    for group, length, action, salt in calls:
        tokens = prompt(group, length)
        if action == 0:
            assert len({router.route(tokens, salt, [length, group, 5]) for router in routers}) == 1
        for router in routers:
            if action == 1:
                router.finished(group % 3, tokens, salt)
            if action == 2:
                router.flushed(group % 3)
            router.check_integrity()
            assert all(0 <= matched <= len(tokens) for matched in router.matched_tokens(tokens, salt))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="capacity is 0"):
        PrefixRouter(2, 16, 0)
    with pytest.raises(ValueError, match=r"3 loads.*each of 2 ranks"):
        PrefixRouter(2, 16, 10).route([1], "", [0, 0, 0])
