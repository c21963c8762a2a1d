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
from collections.abc import AsyncGenerator, Callable

import msgspec

from dsengine.config import EngineConfig, EngineFailurePolicy
from dsengine.engine.connection import EngineConnection
from dsengine.engine.constraint import Constraint, SentGrammars
from dsengine.engine.messages import (
    MAINTENANCE,
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
from dsengine.engine.process_args import EngineProcessArgs
from dsengine.engine.sampling_params import SamplingParams
from dsengine.model.checkpoint import resolve_checkpoint
from dsengine.parallel.launch import is_alive
from dsengine.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# An engine that dies this many times in a row, each time within the given seconds of being ready, is given up.
_MAX_QUICK_DEATHS = 3
_QUICK_DEATH_SECONDS = 60.0
_SHUTDOWN_SECONDS = 5.0
# What rank 0 gets beyond the limit to say that another rank has passed it.
_RANK_0_SECONDS = 1.5
_SLEEPS_BELOW_SECONDS = 0.1


class EngineDeadError(RuntimeError):
    """The engine process is not there; the request may succeed later."""


class QueueFullError(RuntimeError):
    """As many requests are waiting as the engine accepts."""


Sink = Callable[[RequestUpdate | EngineDeadError], None]


class Sequence:
    """One sequence that the engine has been asked for.

    Its updates are handed to `sink` as they come, the last one with `finish_reason`, or an error in its place.
    """

    def __init__(self, request_id: str, sink: Sink, leave: Callable[[Sequence], None]) -> None:
        self.request_id = request_id
        self.is_finished = False
        self.resources = contextlib.ExitStack()
        self._sink = sink
        self._leave = leave

    def put(self, update: RequestUpdate | EngineDeadError) -> None:
        self.is_finished = isinstance(update, EngineDeadError) or update.finish_reason is not None
        if self.is_finished:
            self.close()
        self._sink(update)

    def close(self) -> None:
        """Nothing more is wanted: aborts the sequence, unless it has ended."""
        self._leave(self)
        self.resources.close()


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
        self._sequences: dict[str, Sequence] = {}
        self._calls: dict[int, tuple[Call, asyncio.Future[dict[str, object]]]] = {}
        self._weights = ""  # a folder whose weights have taken the place of the checkpoint's
        self._next_call_id = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineOutput)
        self._ready = False
        self._connection: EngineConnection | None = None
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

    def start_sequence(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        sink: Sink,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
        constraint: Constraint | None = None,
    ) -> Sequence:
        """Run one sequence. `params.n` is not looked at: the caller asks once per continuation.

        Args:
            sink: called with every update, from the event loop; it must not raise.

        Raises:
            EngineDeadError: the engine is down.
            QueueFullError: too many requests are waiting.
            ValueError: `request_id` is in use.
        """
        self._check_admission(request_id)
        sequence = self._sequences[request_id] = Sequence(request_id, sink, self._leave)
        grammar = sequence.resources.enter_context(self._grammars.use(constraint))
        self._send(AddRequest(request_id, prompt_token_ids, params, priority, cache_salt, grammar))
        return sequence

    def _leave(self, sequence: Sequence) -> None:
        if self._sequences.pop(sequence.request_id, None) is not None and not sequence.is_finished:
            self._send(AbortRequests([sequence.request_id]))

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
        """`start_sequence` as an iterator; closing it aborts the sequence.

        Raises:
            EngineDeadError: the engine is down, or went down meanwhile.
            QueueFullError: too many requests are waiting.
            ValueError: the engine refused the request, or `request_id` is in use.
        """
        updates: asyncio.Queue[RequestUpdate | EngineDeadError] = asyncio.Queue()
        sequence = self.start_sequence(
            prompt_token_ids,
            params,
            updates.put_nowait,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            constraint=constraint,
        )
        try:
            while True:
                update = await updates.get()
                if isinstance(update, EngineDeadError):
                    raise update
                if update.rejected:
                    raise ValueError(update.error)
                yield update
                if update.finish_reason is not None:
                    return
        finally:
            sequence.close()

    def abort(self, request_id: str) -> None:
        """End a sequence early: its reader gets a last update with `finish_reason` "abort". Unknown ids are fine."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            sequence.close()
            sequence.put(RequestUpdate(request_id, finish_reason="abort"))

    def abort_response(self, response_id: str | None) -> int:
        """End the sequences of one response, or all of them (None); returns how many there were.

        A sequence's request id is its response's, with the numbers of prompt and continuation behind it.
        """
        found = [i for i in self._sequences if response_id is None or i.rsplit("-", 2)[0] == response_id]
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
        call = Call(self._next_call_id, name, argument)
        future: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
        self._calls[call.call_id] = (call, future)
        self._send(call)
        return await future

    def _check_admission(self, request_id: str) -> None:
        if not self._ready:
            raise EngineDeadError("the engine is not running")
        if request_id in self._sequences:
            raise ValueError(f"request id {request_id!r} is in use; every sequence needs its own")
        limit = self.config.max_running_requests + self.config.max_queued_requests
        if len(self._sequences) >= limit:
            raise QueueFullError(
                f"{len(self._sequences)} requests are running or waiting, which is the limit; try again later"
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
            weights=self._weights,
            show_progress=self._show_progress,
        )
        self._connection = await EngineConnection.open(args, self._module)
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
        assert isinstance(message, EngineFailure), f"an engine's first word is {type(message).__name__}"
        raise EngineDeadError(f"the engine could not start: {message.message}")

    async def _supervise(self) -> None:
        """Read what the engine says until it dies; then start it again, or give up."""
        loop = asyncio.get_running_loop()
        quick_deaths = 0
        while True:
            assert self._connection is not None
            ready_since = loop.time()
            reason = await self._read_until_death(self._connection)
            self._mark_dead(reason)
            logger.error("engine process died: %s", reason)
            await self._connection.close(_SHUTDOWN_SECONDS)
            self._connection = None
            await self._see_off_ranks()
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

    async def _read_until_death(self, connection: EngineConnection) -> str:
        """Hand on what the engine says until it ends, is about to, or does not answer; returns the reason."""
        # Rank 0 watches over the other ranks and has itself heard of every second. Alone it says nothing while it has
        # no work and may take its time over a step, but it does not sleep over work.
        is_alone = self.config.tp_size == 1
        limit = self.config.dist_timeout / 2 if is_alone else self.config.dist_timeout + _RANK_0_SECONDS
        spent: float | None = None  # by the engine with work, when it had not answered for half the limit
        end, receive = asyncio.create_task(connection.end()), asyncio.ensure_future(connection.socket.recv())
        try:
            while True:
                await asyncio.wait((receive, end), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
                if end.done():
                    return end.result().message
                if receive.done():
                    spent = None
                    self._dispatch(self._decoder.decode(receive.result()))
                    receive = asyncio.ensure_future(connection.socket.recv())
                    continue
                if any(call.name in MAINTENANCE for call, _ in self._calls.values()):
                    continue
                before, spent = spent, connection.cpu_seconds() if self._sequences else None
                if is_alone and (before is None or spent is None or spent - before > _SLEEPS_BELOW_SECONDS):
                    continue
                connection.process.kill()
                seconds = self.config.dist_timeout
                return f"the engine has not answered for {seconds:g} seconds (process {connection.process.pid})"
        finally:
            receive.cancel()
            end.cancel()

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
                    sequence = self._sequences.get(update.request_id)
                    if sequence is not None:
                        sequence.put(update)
            case Reply():
                self._take_reply(message)

    def _take_reply(self, reply: Reply) -> None:
        call, future = self._calls.pop(reply.call_id)
        if call.name == "update_weights" and "error" not in reply.result:
            # Whether or not anybody still waits: an engine that is started anew is to have the same.
            self._weights = call.argument
        if not future.done():
            future.set_result(reply.result)

    def _mark_dead(self, reason: str) -> None:
        self._ready = False
        self._stats = EngineStats()
        for sequence in list(self._sequences.values()):
            sequence.put(EngineDeadError(reason))
        for _, future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(reason))
        self._calls.clear()
