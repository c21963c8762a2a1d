"""An engine's process and the socket to it, as their parent holds them."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from dsengine.engine.messages import EngineFailure, EngineOutput
from dsengine.engine.process_args import FAILURE_FILE, EngineProcessArgs


class EngineConnection:
    """One engine process and the socket to it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        socket: zmq.asyncio.Socket,
        context: zmq.asyncio.Context,
        folder: tempfile.TemporaryDirectory[str],
    ) -> None:
        self.process = process
        self.socket = socket
        self._context = context
        self._folder = folder

    @classmethod
    async def open(cls, args: EngineProcessArgs, module: str) -> EngineConnection:
        # A fresh folder that only this user may enter, and a fresh socket in it: a dead engine leaves nothing behind.
        folder = tempfile.TemporaryDirectory(prefix="dsengine-")
        address = f"ipc://{Path(folder.name) / 'engine.sock'}"
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.PAIR)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        # Its own session: Ctrl-C at the terminal is for the server, which then stops the engine in good order.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert process.stdin is not None
        args = msgspec.structs.replace(args, address=address, folder=folder.name, parent=os.getpid())
        process.stdin.write(msgspec.json.encode(args) + b"\n")
        return cls(process, socket, context, folder)

    def send(self, data: bytes) -> None:
        # Without a high-water mark the message is queued at once, so there is nothing to await.
        self.socket.send(data)

    async def first_message(self, decoder: msgspec.msgpack.Decoder[EngineOutput]) -> EngineOutput | None:
        """The engine's first word, or None when it died without one."""
        receive = asyncio.ensure_future(self.socket.recv())
        death = asyncio.create_task(self.process.wait())
        try:
            await asyncio.wait((receive, death), return_when=asyncio.FIRST_COMPLETED)
            if not receive.done():
                # The last message may still be on its way when the process has gone.
                await asyncio.wait((receive,), timeout=1.0)
            return decoder.decode(receive.result()) if receive.done() else None
        finally:
            receive.cancel()
            death.cancel()

    def cpu_seconds(self) -> float:
        """Processor time that the process has used; 0 when it has gone."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def last_word(self) -> EngineFailure | None:
        """What a process that is dead could not say over the socket."""
        file = Path(self._folder.name) / FAILURE_FILE
        return msgspec.msgpack.decode(file.read_bytes(), type=EngineFailure) if file.exists() else None

    async def close(self, timeout: float) -> None:
        """Let the process end by itself for `timeout` seconds, then kill it."""
        try:
            await asyncio.wait_for(self.process.wait(), timeout)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        self.socket.close()
        self._context.term()
        self._folder.cleanup()
