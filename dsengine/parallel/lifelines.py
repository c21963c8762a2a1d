"""A connection between rank 0 and every rank of another machine, over which they say nothing but that they are there.

The kernel of a process that ends, however it ends, closes its connections: the other end knows at once, and knows whom
it has lost. A collective tells neither so soon nor so clearly, and NCCL's do not tell at all. Which rank of those that
are still connected stands still is known by its silence.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping

from dsengine.parallel.groups import World

_BEAT = b"."
_BEATS_EVERY = 0.5
_SILENT_AFTER = 2.0
_TOKEN_BYTES = 16
_INVITATION = struct.Struct(f"!H{_TOKEN_BYTES}s")  # the port, and what to show there
_GREETING = struct.Struct(f"!{_TOKEN_BYTES}sI")  # that, and the rank
_GREETING_SECONDS = 2.0


class Lifelines:
    """The connections that one rank holds; a rank of machine 0 other than rank 0 holds none.

    Args:
        lines: by the rank at the other end.
        ranks_per_node: neighbours share a machine.
    """

    def __init__(self, lines: Mapping[int, socket.socket], ranks_per_node: int) -> None:
        self._lines = dict(sorted(lines.items()))
        self._ranks_per_node = ranks_per_node
        self._lost: set[int] = set()
        self._heard = dict.fromkeys(lines, time.monotonic())
        self._beaten = 0.0
        self._lock = threading.Lock()

    @property
    def fds(self) -> list[int]:
        """To be waited on: one of them can be read when a rank has sent a sign, or is lost."""
        with self._lock:
            return [line.fileno() for rank, line in self._lines.items() if rank not in self._lost]

    def look(self) -> bool:
        """Take in what has come and show that this rank is there; whether a rank is lost."""
        with self._lock:
            now = time.monotonic()
            beats = now - self._beaten >= _BEATS_EVERY
            self._beaten = now if beats else self._beaten
            for rank, line in self._lines.items():
                if rank not in self._lost and not self._is_there(rank, line, now, beats=beats):
                    self._lost.add(rank)
            return bool(self._lost)

    def describe(self) -> list[str]:
        """What is the matter with ranks that are lost or silent; nothing for those that are heard."""
        self.look()
        found, size, now = [], self._ranks_per_node, time.monotonic()
        for node in sorted({rank // size for rank in self._lost}):
            ranks = [rank for rank in range(node * size, (node + 1) * size) if rank in self._lost]
            of_node = [rank for rank in self._lines if rank // size == node]
            names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
            who = f"node {node} with {names}" if ranks == of_node else f"{names} of node {node}"
            found.append(f"{who} ended or cannot be reached")
        for rank, heard in self._heard.items():
            if rank not in self._lost and now - heard > _SILENT_AFTER:
                found.append(f"rank {rank} of node {rank // size} has not been heard of for {now - heard:.1f} seconds")
        return found

    def close(self) -> None:
        """From now on this rank is lost to the others."""
        with self._lock:
            for line in self._lines.values():
                line.close()
            self._lines.clear()
            self._heard.clear()

    def _is_there(self, rank: int, line: socket.socket, now: float, *, beats: bool) -> bool:
        try:
            if beats:
                with contextlib.suppress(BlockingIOError):  # one that stands still does not read
                    line.send(_BEAT)
            while data := line.recv(4096):
                self._heard[rank] = now
            return bool(data)
        except BlockingIOError:
            return True
        except OSError:
            return False


def open_lifelines(world: World, host: str, ranks_per_node: int, timeout: float) -> Lifelines:
    """Connect every rank of another machine with rank 0; all ranks call this together.

    Rank 0 listens on `host` until they are there. Who connects must show what only the ranks were told.

    Args:
        host: name or address of rank 0's machine.
        timeout: seconds that they have for it, and after which a machine that does not acknowledge anything any more
            counts as lost.

    Raises:
        OSError: rank 0 cannot listen there, or cannot be reached.
    """
    if world.rank == 0:
        return Lifelines(_accept_all(world, host, ranks_per_node, timeout), ranks_per_node)
    port, token = _INVITATION.unpack(world.broadcast_bytes(None, 0))
    if world.rank < ranks_per_node:
        return Lifelines({}, ranks_per_node)
    line = socket.create_connection((host, port), timeout)
    line.sendall(_GREETING.pack(token, world.rank))
    _prepare(line, timeout)
    return Lifelines({0: line}, ranks_per_node)


def _accept_all(world: World, host: str, first: int, timeout: float) -> dict[int, socket.socket]:
    lines: dict[int, socket.socket] = {}
    token, deadline = secrets.token_bytes(_TOKEN_BYTES), time.monotonic() + timeout
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((host, 0), family=family, backlog=world.size) as listener:
        port = listener.getsockname()[1]
        world.broadcast_bytes(_INVITATION.pack(port, token), 0)
        while missing := sorted(set(range(first, world.size)) - set(lines)):
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                line, _ = listener.accept()
            except TimeoutError as error:
                raise OSError(f"ranks {missing} have not connected to port {port} of {host}: is it open?") from error
            rank = _greeted(line, token)
            if rank in missing:
                _prepare(line, timeout)
                lines[rank] = line
            else:
                line.close()
    return lines


def _greeted(line: socket.socket, token: bytes) -> int:
    """The rank at the other end; -1: it is none of ours."""
    line.settimeout(_GREETING_SECONDS)
    with contextlib.suppress(OSError):
        greeting = line.recv(_GREETING.size, socket.MSG_WAITALL)
        if len(greeting) == _GREETING.size:
            shown, rank = _GREETING.unpack(greeting)
            if hmac.compare_digest(shown, token):
                return int(rank)
    return -1


def _prepare(line: socket.socket, timeout: float) -> None:
    line.setblocking(False)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # without it (not Linux), a machine that vanishes is noticed late
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout * 1000))
