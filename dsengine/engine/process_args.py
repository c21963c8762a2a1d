"""What an engine process is told at its start, and its last word; apart, so that the parent need not import torch."""

from __future__ import annotations

import contextlib
import os

import msgspec

from dsengine.engine.messages import EngineFailure


class EngineProcessArgs(msgspec.Struct, frozen=True):
    """One JSON line on an engine process's standard input.

    Attributes:
        config: fields of `EngineConfig`.
        checkpoint: local folder of the checkpoint.
        eos_token_ids: ids that end a request.
        num_valid_tokens: ids from here on are never drawn.
        address: ZeroMQ address of the parent's socket; rank 0 alone has one.
        report_fd: where the process writes its last word; -1: nobody reads it.
        folder: that only this user may enter: where the ranks of one machine meet.
        rank: of the process, where several run the model; rank 0 starts the others of its machine.
        parent: the process that holds the other end of standard input.
        weights: local folder of others that have taken the place of the checkpoint's weights; rank 0, which alone is
            told, tells the others.
        has_heartbeats: rank 0 is heard of every second, even when there is nothing to do.
    """

    config: dict[str, object]
    checkpoint: str
    eos_token_ids: list[int]
    num_valid_tokens: int
    address: str = ""
    report_fd: int = -1
    folder: str = ""
    rank: int = 0
    parent: int = 0
    weights: str = ""
    has_heartbeats: bool = True
    show_progress: bool = False

    def report(self, failure: EngineFailure) -> None:
        """Say why the process is about to end: one JSON line, of which the parent takes the first.

        It needs nothing of the socket, so that any thread may say it while the main one hangs in a collective.
        """
        if self.report_fd >= 0:
            with contextlib.suppress(BrokenPipeError):  # the parent is dead, and this process about to follow it
                os.write(self.report_fd, msgspec.json.encode(failure) + b"\n")
