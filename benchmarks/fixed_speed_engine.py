"""An engine process that computes nothing: every running request gets one token at each multiple of a period.

It speaks the messages of `dsengine.engine.process`, so that a server in front of it works as it does in front of a
model, and the clock of its tokens is known to whoever receives them: all processes of a machine share it.
`DSENGINE_BENCH_PERIOD_MS` in its environment is the period.
"""

from __future__ import annotations

import os
import sys
import time

import msgspec
import zmq

from dsengine.engine.messages import (
    AbortRequests,
    AddRequest,
    EngineInfo,
    EngineInput,
    EngineStats,
    RequestUpdate,
    Shutdown,
    StepOutput,
)
from dsengine.engine.process_args import EngineProcessArgs

# Ordinary words of any byte-level vocabulary: single bytes, whose ids follow those of the special tokens.
_TOKENS = tuple(range(300, 340))
_CONTEXT_LENGTH = 4096


class FixedSpeedEngine:
    """The loop: messages in whenever they come, tokens out at every tick."""

    def __init__(self, socket: zmq.Socket[bytes], info: EngineInfo, period: float) -> None:
        self._socket = socket
        self._info = info
        self._period = period
        self._decoder = msgspec.msgpack.Decoder(EngineInput)
        self._encoder = msgspec.msgpack.Encoder()
        # Tokens that each running request has had, and wants.
        self._running: dict[str, tuple[int, int]] = {}
        self._is_on = True

    def run(self) -> None:
        self._send(self._info)
        due = self._period
        while self._is_on:
            wait = max(due - time.monotonic(), 0.0)
            if self._socket.poll(int(1000 * wait) if self._running else None):
                self._handle(self._decoder.decode(self._socket.recv()))
            now = time.monotonic()
            if now >= due:
                self._tick()
                due = (now // self._period + 1) * self._period

    def _handle(self, message: object) -> None:
        match message:
            case AddRequest():
                self._running[message.request_id] = (0, message.params.max_tokens or _CONTEXT_LENGTH)
            case AbortRequests():
                for request_id in message.request_ids:
                    self._running.pop(request_id, None)
            case Shutdown():
                self._is_on = False

    def _tick(self) -> None:
        updates = []
        for request_id, (given, wanted) in list(self._running.items()):
            token = (_TOKENS[given % len(_TOKENS)],)
            if given + 1 == wanted:
                del self._running[request_id]
                updates.append(RequestUpdate(request_id, token, "length"))
            else:
                self._running[request_id] = (given + 1, wanted)
                updates.append(RequestUpdate(request_id, token))
        self._send(StepOutput(updates, EngineStats(num_running=len(self._running))))

    def _send(self, message: StepOutput | EngineInfo) -> None:
        self._socket.send(self._encoder.encode(message))


def main() -> int:
    args = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineProcessArgs)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(args.address)
    info = EngineInfo(
        model=args.checkpoint,
        context_length=_CONTEXT_LENGTH,
        block_size=16,
        num_blocks=1 << 20,
        vocab_size=args.num_valid_tokens,
        dtype="none",
        device="none",
        kernels={},
        load_seconds=0.0,
    )
    FixedSpeedEngine(socket, info, float(os.environ["DSENGINE_BENCH_PERIOD_MS"]) / 1000.0).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
