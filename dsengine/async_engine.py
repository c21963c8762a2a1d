"""The engine in a process of its own, seen from an asyncio program: what the server talks to.

The front end holds no model and no cache. It sends requests over a socket that only this user can reach, hands each
sequence its updates, and survives the engine's death: every open request gets an error, and the process is started
again or given up, as asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import sys
import tempfile
from collections import deque
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from dsengine.config import EngineConfig, EngineFailurePolicy
from dsengine.engine.constraint import Constraint, SentGrammars
from dsengine.engine.messages import (
    AbortRequests,
    AddRequest,
    Call,
    CallName,
    EngineFailure,
    EngineInfo,
    EngineInput,
    EngineOutput,
    EngineStats,
    Reply,
    RequestUpdate,
    Shutdown,
    StepOutput,
)
from dsengine.engine.process_args import FAILURE_FILE, EngineProcessArgs
from dsengine.engine.sampling_params import SamplingParams
from dsengine.model.checkpoint import resolve_checkpoint
from dsengine.parallel.launch import describe_exit, is_alive
from dsengine.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# An engine that dies this many times in a row, each time within the given seconds of being ready, is given up.
_MAX_QUICK_DEATHS = 3
_QUICK_DEATH_SECONDS = 60.0
_SHUTDOWN_SECONDS = 5.0
_RANK_0_SECONDS = 10.0


class EngineDeadError(RuntimeError):
    """The engine process is not there; the request may succeed later."""


class QueueFullError(RuntimeError):
    """As many requests are waiting as the engine accepts."""


class _Stream:
    """Updates of one sequence on their way to its reader."""

    def __init__(self) -> None:
        self._updates: deque[RequestUpdate | EngineDeadError] = deque()
        self._arrived = asyncio.Event()

    def put(self, update: RequestUpdate | EngineDeadError) -> None:
        self._updates.append(update)
        self._arrived.set()

    async def get(self) -> RequestUpdate:
        while not self._updates:
            self._arrived.clear()
            await self._arrived.wait()
        update = self._updates.popleft()
        if isinstance(update, EngineDeadError):
            raise update
        return update


class AsyncEngine:
    """Requests in, updates out, for one engine process.

    Args:
        on_failure: what follows when the engine process dies: "restart" starts a new one; "exit" leaves it dead and
            sets `failed`.
        show_progress: show a progress bar while the engine loads.
        module: what runs as the engine's process.

    Raises:
        ValueError: the checkpoint cannot be found or its tokenizer cannot be used.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_failure: EngineFailurePolicy = "restart",
        show_progress: bool = False,
        module: str = "dsengine.engine.process",
    ) -> None:
        self.config = config
        self.checkpoint = resolve_checkpoint(config.model_or_demo, config.revision)
        self.tokenizer = Tokenizer.from_checkpoint(self.checkpoint)
        self.failed = asyncio.Event()
        self._stats = EngineStats()
        self._info: EngineInfo | None = None
        self._on_failure = on_failure
        self._show_progress = show_progress
        self._module = module
        self._streams: dict[str, _Stream] = {}
        self._calls: dict[int, asyncio.Future[dict[str, object]]] = {}
        self._next_call_id = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineOutput)
        self._ready = False
        self._connection: _Connection | None = None
        self._grammars = SentGrammars(self._send)
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        """What the engine said of itself when it became ready."""
        if self._info is None:
            raise EngineDeadError("the engine has not started yet")
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The engine's latest report."""
        return self._stats

    @property
    def is_alive(self) -> bool:
        return self._ready

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while there is one."""
        return self._connection.process.pid if self._connection is not None else None

    async def start(self) -> None:
        """Start the engine process and wait until it takes requests.

        Raises:
            ValueError: the engine refused its configuration or checkpoint; the message says why.
            EngineDeadError: it failed to start for another reason.
        """
        await self._launch()
        self._supervisor = asyncio.create_task(self._supervise())

    async def shutdown(self) -> None:
        """Stop the engine process; open requests get an error."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        if self._connection is not None:
            self._send(Shutdown())
            await self._connection.close(_SHUTDOWN_SECONDS)
        self._mark_dead("the engine has been shut down")

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
        constraint: Constraint | None = None,
    ) -> AsyncGenerator[RequestUpdate, None]:
        """Run one sequence; the last update carries `finish_reason`. Closing the iterator aborts the sequence.

        `params.n` is not looked at: the caller asks once per continuation, each under its own `request_id`.

        Raises:
            EngineDeadError: the engine is down, or went down meanwhile.
            QueueFullError: too many requests are waiting.
            ValueError: the engine refused the request, or `request_id` is in use.
        """
        self._check_admission(request_id)
        stream = self._streams[request_id] = _Stream()
        finished = False
        try:
            with self._grammars.use(constraint) as grammar:
                self._send(AddRequest(request_id, prompt_token_ids, params, priority, cache_salt, grammar))
                while not finished:
                    update = await stream.get()
                    finished = update.finish_reason is not None
                    if update.rejected:
                        raise ValueError(update.error)
                    yield update
        finally:
            self._streams.pop(request_id, None)
            if not finished:
                self._send(AbortRequests([request_id]))

    def abort(self, request_id: str) -> None:
        """End a sequence early: its reader gets a last update with `finish_reason` "abort". Unknown ids are fine."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.put(RequestUpdate(request_id, finish_reason="abort"))
            self._send(AbortRequests([request_id]))

    def abort_response(self, response_id: str | None) -> int:
        """End the sequences of one response, or all of them (None); returns how many there were.

        A sequence's request id is its response's, with the numbers of prompt and continuation behind it.
        """
        found = [i for i in self._streams if response_id is None or i.rsplit("-", 2)[0] == response_id]
        for request_id in found:
            self.abort(request_id)
        return len(found)

    async def call(self, name: CallName, argument: str = "") -> dict[str, object]:
        """Ask the engine something outside the request path.

        Raises:
            EngineDeadError: the engine is down.
        """
        if not self._ready:
            raise EngineDeadError("the engine is not running")
        self._next_call_id += 1
        future: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
        self._calls[self._next_call_id] = future
        self._send(Call(self._next_call_id, name, argument))
        return await future

    def _check_admission(self, request_id: str) -> None:
        if not self._ready:
            raise EngineDeadError("the engine is not running")
        if request_id in self._streams:
            raise ValueError(f"request id {request_id!r} is in use; every sequence needs its own")
        limit = self.config.max_running_requests + self.config.max_queued_requests
        if len(self._streams) >= limit:
            raise QueueFullError(
                f"{len(self._streams)} requests are running or waiting, which is the limit; try again later"
            )

    def _send(self, message: EngineInput) -> None:
        if self._connection is not None:
            self._connection.send(self._encoder.encode(message))

    async def _launch(self) -> None:
        args = EngineProcessArgs(
            config=dataclasses.asdict(self.config),
            checkpoint=str(self.checkpoint),
            eos_token_ids=sorted(self.tokenizer.eos_token_ids),
            num_valid_tokens=self.tokenizer.vocab_size,
            show_progress=self._show_progress,
        )
        self._connection = await _Connection.open(args, self._module)
        self._grammars.reset()
        message = await self._connection.first_message(self._decoder)
        if isinstance(message, EngineInfo):
            self._info = message
            self._ready = True
            return
        await self._connection.close(_SHUTDOWN_SECONDS)
        self._connection = None
        if isinstance(message, EngineFailure) and message.user_error:
            raise ValueError(message.message)
        reason = message.message if isinstance(message, EngineFailure) else "it ended without a word"
        raise EngineDeadError(f"the engine could not start: {reason}")

    async def _supervise(self) -> None:
        """Read what the engine says until it dies; then start it again, or give up."""
        loop = asyncio.get_running_loop()
        quick_deaths = 0
        while True:
            assert self._connection is not None
            ready_since = loop.time()
            reason = await self._read_until_death(self._connection)
            await self._connection.close(_SHUTDOWN_SECONDS)
            self._connection = None
            await self._see_off_ranks()
            self._mark_dead(reason)
            logger.error("engine process died: %s", reason)
            quick_deaths = quick_deaths + 1 if loop.time() - ready_since < _QUICK_DEATH_SECONDS else 1
            if self._on_failure == "exit" or quick_deaths > _MAX_QUICK_DEATHS:
                self.failed.set()
                return
            try:
                await self._launch()
            except (ValueError, EngineDeadError) as error:
                logger.error("engine process could not be restarted: %s", error)
                self.failed.set()
                return
            logger.warning("engine process restarted")

    async def _read_until_death(self, connection: _Connection) -> str:
        death = asyncio.create_task(connection.process.wait())
        failure: EngineFailure | None = None
        # Rank 0 watches over the other ranks and has itself heard of every second; alone it need not speak.
        limit = self.config.dist_timeout + _RANK_0_SECONDS if self.config.tp_size > 1 else None
        try:
            while not death.done():
                receive = asyncio.ensure_future(connection.socket.recv())
                await asyncio.wait((receive, death), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
                if not receive.done():
                    receive.cancel()
                    if not death.done():
                        connection.process.kill()
                        return f"rank 0 has not answered for {limit:g} seconds (process {connection.process.pid})"
                    break
                message = self._decoder.decode(receive.result())
                if isinstance(message, EngineFailure):
                    failure = message
                else:
                    self._dispatch(message)
        finally:
            death.cancel()
        failure = failure or connection.last_word()
        if failure is not None:
            return failure.message
        status = connection.process.returncode
        return f"the engine process {describe_exit(status) if status is not None else 'does not answer'}"

    async def _see_off_ranks(self) -> None:
        """Wait until the ranks that rank 0 had started have died with it: their devices are wanted again."""
        pids = [rank.pid for rank in self.info.ranks if rank.node_rank == self.config.node_rank]
        deadline = asyncio.get_running_loop().time() + _SHUTDOWN_SECONDS
        while any(is_alive(pid) for pid in pids) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)

    def _dispatch(self, message: EngineOutput) -> None:
        match message:
            case StepOutput():
                self._stats = message.stats
                for update in message.updates:
                    # An update may cross an abort on the way; nobody waits for it any more.
                    stream = self._streams.get(update.request_id)
                    if stream is not None:
                        stream.put(update)
            case Reply():
                future = self._calls.pop(message.call_id, None)
                if future is not None and not future.done():
                    future.set_result(message.result)

    def _mark_dead(self, reason: str) -> None:
        self._ready = False
        self._stats = EngineStats()
        for stream in self._streams.values():
            stream.put(EngineDeadError(reason))
        self._streams.clear()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(reason))
        self._calls.clear()


class _Connection:
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
    async def open(cls, args: EngineProcessArgs, module: str) -> _Connection:
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
