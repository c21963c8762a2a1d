"""`dsengine serve` on a machine other than the first: it runs ranks, and nothing else.

The requests come to machine 0, whose rank 0 leads all others. Here the ranks of this machine are started and looked
after: they end when machine 0 ends them, and are started again when the ranks have failed, as those of machine 0 are.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from types import FrameType

from dsengine.config import EngineConfig, EngineFailurePolicy
from dsengine.engine.process_args import EngineProcessArgs
from dsengine.engine.ranks import RANK_MODULE, check_ranks, rank_lines
from dsengine.model.checkpoint import resolve_checkpoint
from dsengine.parallel.launch import RankProcesses
from dsengine.parallel.watchdog import EXIT_RANKS_FAILED
from dsengine.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_QUICK_FAILURES = 3
_QUICK_SECONDS = 60.0
_LOOKS_EVERY = 0.2
_RANK_ENDING_SECONDS = 5.0


def run_node(config: EngineConfig, on_failure: EngineFailurePolicy) -> int:
    """Run this machine's ranks until machine 0 or a signal ends them.

    Returns:
        the exit status: 0; 1 when the ranks failed; 2 for a user's mistake.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    try:
        args = _args(config)
    except (ValueError, OSError) as error:
        print(f"dsengine: error: {error}", file=sys.stderr)
        return 2
    quick_failures = 0
    while True:
        started = time.monotonic()
        status = _run_ranks(args, config, stop)
        if stop.is_set():
            return 0
        if status != EXIT_RANKS_FAILED:
            return status
        quick_failures = quick_failures + 1 if time.monotonic() - started < _QUICK_SECONDS else 1
        if on_failure == "exit" or quick_failures > _MAX_QUICK_FAILURES:
            return 1
        logger.warning("the ranks of this machine are started again")


def _args(config: EngineConfig) -> EngineProcessArgs:
    checkpoint = resolve_checkpoint(config.model_or_demo, config.revision)
    check_ranks(config, checkpoint)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    return EngineProcessArgs(
        config=dataclasses.asdict(config),
        checkpoint=str(checkpoint),
        eos_token_ids=sorted(tokenizer.eos_token_ids),
        num_valid_tokens=tokenizer.vocab_size,
        parent=os.getpid(),
    )


def _run_ranks(args: EngineProcessArgs, config: EngineConfig, stop: threading.Event) -> int:
    """One life of the ranks; returns 0 if they were told to end, else the status of one that failed."""
    with tempfile.TemporaryDirectory(prefix="dsengine-") as folder:
        lines = rank_lines(args, folder, list(config.local_ranks))
        processes = RankProcesses(RANK_MODULE, lines)
        logger.info("ranks %s run here (processes %s)", list(lines), list(processes.pids.values()))
        try:
            while not stop.is_set():
                ended = processes.wait(_LOOKS_EVERY)
                failed = [status for status in ended.values() if status != 0]
                if failed:
                    # A neighbour may be about to say why.
                    ended = processes.wait(_RANK_ENDING_SECONDS)
                    logger.error("%s", "; ".join(processes.describe()))
                    return 2 if 2 in ended.values() else EXIT_RANKS_FAILED
                if len(ended) == len(lines):
                    return 0
            return 0
        finally:
            processes.close()
