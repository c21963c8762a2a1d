"""Deaths of other ranks are noticed at once, whatever the rank itself is doing: real processes, real connections."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable
from typing import cast

import pytest
from server_process import wait_until

from dsengine.parallel import lifelines
from dsengine.parallel.groups import World
from dsengine.parallel.launch import RankProcesses
from dsengine.parallel.lifelines import Lifelines, open_lifelines
from dsengine.parallel.watchdog import Watchdog

WAITS = "json.tool"  # reads its standard input until that is closed
NOTICED_SECONDS = 5.0


class Words:
    """The one thing of a world that lifelines need: all ranks hear what rank 0 says."""

    def __init__(self, rank: int, size: int, said: queue.SimpleQueue[bytes]) -> None:
        self.rank, self.size, self._said = rank, size, said

    def broadcast_bytes(self, data: bytes | None, src: int = 0) -> bytes:
        if data is None:
            return self._said.get(timeout=10)
        for _ in range(self.size):
            self._said.put(data)
        return data


def connect(before: Callable[[bytes], None] = lambda invitation: None) -> dict[int, Lifelines]:
    """The lifelines of four ranks on two machines.

    Args:
        before: called with the invitation, before the ranks of the second machine come.
    """
    said: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    found: dict[int, Lifelines] = {}

    def open_for(rank: int) -> None:
        found[rank] = open_lifelines(cast(World, Words(rank, 4, said)), "127.0.0.1", 2, 10)

    ranks = [threading.Thread(target=open_for, args=(rank,)) for rank in range(4)]
    ranks[0].start()
    before(said.get(timeout=10))
    for rank in ranks[1:]:
        rank.start()
    for rank in ranks:
        rank.join(20)
    assert sorted(found) == [0, 1, 2, 3]
    return found


def close(lines: dict[int, Lifelines]) -> None:
    for line in lines.values():
        line.close()


def test_lost_ranks_are_named_with_their_node() -> None:
    lines = connect()
    try:
        assert [len(lines[rank].fds) for rank in range(4)] == [2, 0, 1, 1]
        assert not any(line.look() for line in lines.values()) and lines[0].describe() == []
        lines[2].close()
        wait_until(lines[0].look, 5)
        assert lines[0].describe() == ["rank 2 of node 1 ended or cannot be reached"]
        lines[3].close()
        wait_until(lambda: lines[0].describe() == ["node 1 with ranks 2, 3 ended or cannot be reached"], 5)
    finally:
        close(lines)


def test_the_other_machine_notices_the_end_of_rank_0() -> None:
    lines = connect()
    try:
        lines[0].close()
        wait_until(lambda: lines[2].look() and lines[3].look(), 5)
        assert lines[3].describe() == ["node 0 with rank 0 ended or cannot be reached"]
    finally:
        close(lines)


def test_a_silent_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifelines, "_SILENT_AFTER", 0.2)
    monkeypatch.setattr(lifelines, "_BEATS_EVERY", 0.01)
    lines = connect()

    def only_one_is_heard() -> bool:
        lines[2].look()
        troubles = lines[0].describe()
        return len(troubles) == 1 and troubles[0].startswith("rank 3 of node 1 has not been heard of for 0.")

    try:
        wait_until(only_one_is_heard, 10)
    finally:
        close(lines)


def test_strangers_are_turned_away() -> None:
    strangers = []

    def intrude(invitation: bytes) -> None:
        port, token = lifelines._INVITATION.unpack(invitation)
        greetings = [lifelines._GREETING.pack(b"?" * len(token), 2), lifelines._GREETING.pack(token, 1), b"GET / HTTP"]
        for greeting in greetings:  # a wrong token, a rank that has no line, and none of ours at all
            strangers.append(socket.create_connection(("127.0.0.1", port), 10))
            strangers[-1].sendall(greeting)

    lines = connect(intrude)
    try:
        assert [len(lines[rank].fds) for rank in range(4)] == [2, 0, 1, 1] and not lines[0].look()
        for stranger in strangers:
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    finally:
        close(lines)
        for stranger in strangers:
            stranger.close()


@pytest.mark.parametrize("loses", ["a child", "a connection"])
def test_a_death_is_told_while_the_rank_hangs(loses: str) -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    processes = RankProcesses(WAITS, {1: b"{}"})
    lines = connect()
    watchdog = Watchdog(0, 600, processes, told.put)
    watchdog.watch(lines[0])
    watchdog.loaded()
    try:
        with watchdog.over("a collective that nothing ends"):
            if loses == "a child":
                os.kill(processes.pids[1], signal.SIGKILL)
                wanted = "rank 1 was killed by SIGKILL"
            else:
                lines[2].close()
                wanted = "rank 2 of node 1 ended or cannot be reached"
            report = told.get(timeout=NOTICED_SECONDS)
            wait_until(lambda: processes.any_ended, 5)
    finally:
        watchdog.stop()
        processes.close()
        close(lines)
    assert report == f"{wanted}; rank 0 was in a collective that nothing ends"


def test_work_that_takes_too_long_is_told() -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    processes = RankProcesses(WAITS, {1: b"{}"})
    watchdog = Watchdog(0, 0.3, processes, told.put)
    try:
        os.kill(processes.pids[1], signal.SIGSTOP)
        with watchdog.over("a step"):
            report = told.get(timeout=NOTICED_SECONDS)
    finally:
        watchdog.stop()
        processes.close()
    assert report == f"rank 1 is stopped (process {processes.pids[1]}); rank 0 was in a step"
