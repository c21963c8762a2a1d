"""What an engine's process does: a socket, an `EngineCore`, and a loop.

Messages are msgpack of the types in `dsengine.engine.messages`; nothing is ever unpickled. Where several ranks run the
model, rank 0 has the socket and has started the others as children of its own; the same program is what they run.
"""

from __future__ import annotations

import sys
import time
import traceback

import msgspec
import zmq

from dsengine.engine.leading_core import LeadingCore
from dsengine.engine.messages import (
    MAINTENANCE,
    AbortRequests,
    AddRequest,
    Call,
    DropGrammar,
    EngineFailure,
    EngineInput,
    EngineOutput,
    LoadGrammar,
    LoadVocabulary,
    Reply,
    RequestUpdate,
    Shutdown,
    StepOutput,
)
from dsengine.engine.process_args import EngineProcessArgs
from dsengine.engine.ranks import Engine, follow, open_engine
from dsengine.parallel.watchdog import EXIT_RANKS_FAILED, RanksFailedError
from dsengine.progress import loading_progress

# Updates that may wait for a stalled front end before the engine pauses too.
_MAX_UNREAD_MESSAGES = 100_000
_HEARTBEAT_SECONDS = 1.0


class EngineLoop:
    """Reads requests from the socket, steps the core while it has work, sends what came of it."""

    def __init__(self, core: Engine, socket: zmq.Socket[bytes]) -> None:
        self._core = core
        self._socket = socket
        self._decoder = msgspec.msgpack.Decoder(EngineInput)
        self._encoder = msgspec.msgpack.Encoder()
        self._running = True
        self._paused = False
        self._last_sign = time.monotonic()

    def run(self) -> None:
        self.send(self._core.info)
        while self._running:
            self._receive(wait=self._paused or not self._core.has_work)
            now = time.monotonic()
            if self._core.has_work and not self._paused:
                self.send(self._core.step(now))
                self._last_sign = now
            elif self._running and now - self._last_sign >= _HEARTBEAT_SECONDS:
                self._show_life(now)

    def send(self, message: EngineOutput) -> None:
        self._socket.send(self._encoder.encode(message))

    def _receive(self, *, wait: bool) -> None:
        if wait:
            self._socket.poll(int(_HEARTBEAT_SECONDS * 1000))
        while self._running:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(self._decoder.decode(data))

    def _show_life(self, now: float) -> None:
        """The other ranks, and those who watch over rank 0, hear of it even when there is nothing to do."""
        if isinstance(self._core, LeadingCore):
            self.send(self._core.show_life(now))
        elif self._core.has_work:  # it is paused, not stopped
            self.send(StepOutput([], self._core.stats()))
        self._last_sign = now

    def _handle(self, message: EngineInput) -> None:
        match message:
            case AddRequest():
                self._add(message)
            case AbortRequests():
                self._core.abort(message.request_ids)
                # Tells the front end the new counts even when nothing is left to run.
                self.send(StepOutput([], self._core.stats()))
            case LoadVocabulary():
                self._core.grammars.load_vocabulary(message.tokens, message.stop_token_ids)
            case LoadGrammar():
                self._core.grammars.load(message.key, message.data)
            case DropGrammar():
                self._core.grammars.drop(message.key)
            case Call():
                self.send(Reply(message.call_id, self._answer(message)))
            case Shutdown():
                self._running = False

    def _add(self, message: AddRequest) -> None:
        try:
            self._core.add_request(message, time.monotonic())
        except ValueError as error:
            update = RequestUpdate(message.request_id, finish_reason="error", error=str(error), rejected=True)
            self.send(StepOutput([update], self._core.stats()))

    def _answer(self, call: Call) -> dict[str, object]:
        name = call.name
        if name in MAINTENANCE:
            return self._maintain(call)
        if name in ("pause", "continue"):
            self._paused = name == "pause"
            return {"paused": self._paused}
        if name == "flush_cache":
            return {"flushed": self._core.flush_cache()}
        if name == "check_integrity":
            self._core.check_integrity()
            return {"ok": True}
        if name == "info":
            return msgspec.to_builtins(self._core.info)  # type: ignore[no-any-return]
        return msgspec.to_builtins(self._core.stats())  # type: ignore[no-any-return]

    def _maintain(self, call: Call) -> dict[str, object]:
        try:
            level = self._core.maintain(call.name, call.argument)
        except ValueError as error:
            return {"error": str(error)}
        finally:
            # Tells the front end whether requests can run.
            self.send(StepOutput([], self._core.stats()))
        return {"sleep_level": level}


def run(args: EngineProcessArgs) -> int:
    """Serve, or follow rank 0, until told to stop; returns the exit status."""
    return _follow(args) if args.rank > 0 else _lead(args)


def _follow(args: EngineProcessArgs) -> int:
    try:
        follow(args)
    except RanksFailedError as error:
        print(f"rank {args.rank}: {error}", file=sys.stderr, flush=True)
        return EXIT_RANKS_FAILED
    except (ValueError, OSError, MemoryError) as error:
        print(f"rank {args.rank}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _lead(args: EngineProcessArgs) -> int:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDHWM, _MAX_UNREAD_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, _MAX_UNREAD_MESSAGES)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(args.address)
    failure = _serve(args, socket)
    socket.close()
    context.term()
    return 0 if failure is None else 1


def _serve(args: EngineProcessArgs, socket: zmq.Socket[bytes]) -> EngineFailure | None:
    """Run until told to stop; what ended it early is reported, and comes back."""
    failure: EngineFailure | None = None
    core: Engine | None = None
    try:
        core = _open(args)
        EngineLoop(core, socket).run()
    except RanksFailedError as error:
        failure = EngineFailure(str(error))
    except Exception as error:
        failure = _explain(error, is_open=core is not None)
    if failure is not None:
        # Before anything else: clients wait, and to leave the other ranks may take a while.
        args.report(failure)
    if isinstance(core, LeadingCore):
        core.close() if failure is None else core.give_up()
    return failure


def _explain(error: Exception, *, is_open: bool) -> EngineFailure:
    if not is_open and isinstance(error, (ValueError, OSError, MemoryError)):
        return EngineFailure(str(error) or type(error).__name__, user_error=True)
    traceback.print_exception(error)
    return EngineFailure(
        f"the engine failed: {type(error).__name__}" if is_open else f"the engine could not start: {error!r}"
    )


def _open(args: EngineProcessArgs) -> Engine:
    with loading_progress(enabled=args.show_progress) as progress:
        return open_engine(args, progress=progress)
