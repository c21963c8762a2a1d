"""What the parent tells an engine process at its start; apart, so that the parent need not import torch."""

from __future__ import annotations

import msgspec

FAILURE_FILE = "failure"  # in the folder: an `EngineFailure`


class EngineProcessArgs(msgspec.Struct, frozen=True):
    """One JSON line on an engine process's standard input.

    Attributes:
        config: fields of `EngineConfig`.
        checkpoint: local folder of the checkpoint.
        eos_token_ids: ids that end a request.
        num_valid_tokens: ids from here on are never drawn.
        address: ZeroMQ address of the parent's socket; rank 0 alone has one.
        folder: that only this user may enter: where the ranks of one machine meet, and where the last word of a rank
            is left that could not say it any other way.
        rank: of the process, where several run the model; rank 0 starts the others of its machine.
        parent: the process that holds the other end of standard input.
        weights: local folder of others that have taken the place of the checkpoint's weights; what rank 0 is told goes
            for all ranks.
        has_heartbeats: rank 0 is heard of every second, even when there is nothing to do.
    """

    config: dict[str, object]
    checkpoint: str
    eos_token_ids: list[int]
    num_valid_tokens: int
    address: str = ""
    folder: str = ""
    rank: int = 0
    parent: int = 0
    weights: str = ""
    has_heartbeats: bool = True
    show_progress: bool = False
