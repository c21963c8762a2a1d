"""An engine's process for test_async_engine.py: no model, and silent for a while whenever weights are to be updated.

It says which weights it was given, refuses those called "refused", and leaves the call "stats" unanswered for ever.
"""

from __future__ import annotations

import sys
import time

import msgspec
import zmq

from dsengine.engine.messages import Call, EngineInfo, EngineInput, Reply
from dsengine.engine.process_args import EngineProcessArgs

SECONDS = 2.0


def main() -> None:
    args = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineProcessArgs)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.connect(args.address)
    encode, decoder = msgspec.msgpack.encode, msgspec.msgpack.Decoder(EngineInput)
    socket.send(encode(EngineInfo(args.weights or args.checkpoint, 64, 8, 8, 8, "float32", "cpu", {}, 0.0)))
    while isinstance(message := decoder.decode(socket.recv()), Call):
        if message.name == "stats":
            continue
        refuses = message.argument == "refused"
        if message.name == "update_weights" and not refuses:
            time.sleep(SECONDS)
        socket.send(encode(Reply(message.call_id, {"error": "no"} if refuses else {})))


if __name__ == "__main__":
    main()
