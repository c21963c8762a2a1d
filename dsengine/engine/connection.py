"""An engine's process and the socket to it, as their parent holds them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from dsengine.engine.messages import EngineFailure, EngineOutput
from dsengine.engine.process_args import EngineProcessArgs
from dsengine.parallel.launch import describe_exit

_LONGEST_WORD = 1 << 20
# Between the death of a process and the end of what it wrote.
_WORD_SECONDS = 1.0


class EngineConnection:
    """One engine process and the socket to it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        socket: zmq.asyncio.Socket,
        context: zmq.asyncio.Context,
        folder: tempfile.TemporaryDirectory[str],
        report: asyncio.StreamReader,
    ) -> None:
        self.process = process
        self.socket = socket
        self._context = context
        self._folder = folder
        self._last_word = asyncio.create_task(_read_word(report))

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
        report, report_fd = os.pipe()
        with contextlib.closing(os.fdopen(report_fd, "wb")):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,
                pass_fds=[report_fd],
            )
        assert process.stdin is not None
        args = msgspec.structs.replace(
            args, address=address, report_fd=report_fd, folder=folder.name, parent=os.getpid()
        )
        process.stdin.write(msgspec.json.encode(args) + b"\n")
        reader = asyncio.StreamReader(_LONGEST_WORD)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(report, "rb")
        )
        return cls(process, socket, context, folder, reader)

    def send(self, data: bytes) -> None:
        # Without a high-water mark the message is queued at once, so there is nothing to await.
        self.socket.send(data)

    async def first_message(self, decoder: msgspec.msgpack.Decoder[EngineOutput]) -> EngineOutput | EngineFailure:
        """The engine's first word, or why there is none."""
        receive, end = asyncio.ensure_future(self.socket.recv()), asyncio.create_task(self.end())
        try:
            await asyncio.wait((receive, end), return_when=asyncio.FIRST_COMPLETED)
            return end.result() if end.done() else decoder.decode(receive.result())
        finally:
            receive.cancel()
            end.cancel()

    async def end(self) -> EngineFailure:
        """Returns as soon as the process is dead, or says that it is about to end, and why."""
        death = asyncio.create_task(self.process.wait())
        try:
            await asyncio.wait((self._last_word, death), return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                await asyncio.wait((self._last_word,), timeout=_WORD_SECONDS)
            word = self._last_word.result() if self._last_word.done() else None
            return word or EngineFailure(f"the engine process {describe_exit(await death)}")
        finally:
            death.cancel()

    def cpu_seconds(self) -> float:
        """Processor time that the process has used; 0 when it has gone."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def close(self, timeout: float) -> None:
        """Let the process end by itself for `timeout` seconds, then kill it."""
        try:
            await asyncio.wait_for(self.process.wait(), timeout)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        self._last_word.cancel()
        self.socket.close()
        self._context.term()
        self._folder.cleanup()


async def _read_word(report: asyncio.StreamReader) -> EngineFailure | None:
    """The first line of what a process reports; None: it has ended without a word, or within one."""
    line = await report.readline()
    return msgspec.json.decode(line, type=EngineFailure) if line.endswith(b"\n") else None
