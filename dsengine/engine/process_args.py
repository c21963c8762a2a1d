"""What the parent tells an engine process at its start; apart, so that the parent need not import torch."""

from __future__ import annotations

import msgspec


class EngineProcessArgs(msgspec.Struct, frozen=True):
    """One JSON line on the engine process's standard input.

    Attributes:
        address: ZeroMQ address of the parent's socket.
        config: fields of `EngineConfig`.
        checkpoint: local folder of the checkpoint.
        eos_token_ids: ids that end a request.
        num_valid_tokens: ids from here on are never drawn.
    """

    address: str
    config: dict[str, object]
    checkpoint: str
    eos_token_ids: list[int]
    num_valid_tokens: int
    show_progress: bool = False
