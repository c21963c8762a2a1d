"""Runs the sequences of one HTTP request and merges what comes of them into one stream of text deltas.

The engine's updates are turned into text as they come; what the client has not read yet is merged into one delta per
sequence, so that a slow reader costs the text it has not read and nothing more. Closing the stream aborts the sequences
in the engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from dsengine.async_engine import AsyncEngine, EngineDeadError, QueueFullError
from dsengine.async_engine import Sequence as EngineSequence
from dsengine.engine.constraint import Constraint
from dsengine.engine.messages import GRAMMAR_TOO_SLOW, FinishReason, RequestUpdate, TokenLogprob
from dsengine.engine.sampling_params import SamplingParams
from dsengine.outputs import SequenceAssembler
from dsengine.server import errors
from dsengine.server.errors import ApiError
from dsengine.server.metrics import Metrics, SequenceTimer
from dsengine.server.request_record import RequestRecord, SequenceTexts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One sequence to run: `params.n` is 1."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    constraint: Constraint | None = None


@dataclass
class Delta:
    """What one sequence has gained since the last delta.

    Attributes:
        index: position of the sequence in the list of jobs.
        prompt_logprobs: one entry per prompt token, in the sequence's first delta.
        num_drafts: drafted tokens that were verified, and `num_accepted` how many of them were kept.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Generation:
    """The sequences of one HTTP request.

    Args:
        record: is told of them, if there is one.

    Raises (while iterating over `deltas()`):
        ApiError: the engine refused, failed or is gone; or the server is being shut down.
    """

    def __init__(
        self, engine: AsyncEngine, jobs: Sequence[Job], metrics: Metrics, record: RequestRecord | None = None
    ) -> None:
        self._engine = engine
        self._jobs = jobs
        self._metrics = metrics
        self._record = record
        self._pending: dict[int, Delta] = {}
        self._arrived = asyncio.Event()
        self._error: ApiError | None = None

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """New text of any of the sequences, until all have finished. Close it to abort what still runs."""
        running: list[_Running] = []
        unfinished = len(self._jobs)
        try:
            self._start(running)
            while unfinished:
                await self._arrived.wait()
                self._arrived.clear()
                ready, self._pending = self._pending, {}
                for delta in ready.values():
                    unfinished -= delta.finish_reason is not None
                    yield delta
                if self._error is not None:
                    raise self._error
        finally:
            for sequence in running:
                sequence.close()
            if self._record is not None and self._record.keeps_texts:
                self._record.texts.extend(sequence.texts for sequence in running)

    def fail(self, error: ApiError) -> None:
        """End the stream with an error, after what has already arrived."""
        self._error = self._error or error
        self._arrived.set()

    def delta_of(self, index: int) -> Delta:
        """What the client has yet to read of a sequence, to be added to."""
        self._arrived.set()
        return self._pending.setdefault(index, Delta(index))

    def _start(self, running: list[_Running]) -> None:
        try:
            for index, job in enumerate(self._jobs):
                timer = self._metrics.sequence(len(job.prompt_token_ids))
                if self._record is not None:
                    self._record.sequences.append(timer)
                running.append(_Running(self, index, job, self._engine, timer))
                running[-1].start(self._engine)
        except EngineDeadError:
            self.fail(errors.engine_unavailable())
        except QueueFullError:
            self.fail(errors.queue_full())
        except ValueError as error:
            self.fail(errors.invalid(str(error)))


class _Running:
    """One sequence: what the engine says of it, turned into text."""

    def __init__(self, generation: Generation, index: int, job: Job, engine: AsyncEngine, timer: SequenceTimer) -> None:
        self._generation = generation
        self._index = index
        self._job = job
        self._assembler = SequenceAssembler(index, engine.tokenizer, job.prompt_token_ids, job.params)
        self._timer = timer
        self._sequence: EngineSequence | None = None
        self._outcome: str | None = None

    @property
    def texts(self) -> SequenceTexts:
        """What went in, and has come out so far."""
        return SequenceTexts(self._job.prompt_token_ids, self._assembler.output.text)

    def start(self, engine: AsyncEngine) -> None:
        """Ask the engine for it.

        Raises:
            EngineDeadError, QueueFullError, ValueError: as `AsyncEngine.start_sequence`.
        """
        job = self._job
        try:
            self._sequence = engine.start_sequence(
                job.prompt_token_ids,
                job.params,
                self._receive,
                request_id=job.request_id,
                priority=job.priority,
                cache_salt=job.cache_salt,
                constraint=job.constraint,
            )
        except (EngineDeadError, QueueFullError, ValueError):
            self._end("error")
            raise

    def close(self) -> None:
        """Nobody wants it any more, unless it has ended."""
        self._end("abort")

    def _end(self, outcome: str) -> None:
        if self._outcome is None:
            self._outcome = outcome
            self._timer.finish(outcome, time.monotonic())
            if self._sequence is not None:
                self._sequence.close()

    def _fail(self, error: ApiError, outcome: str = "error") -> None:
        self._end(outcome)
        self._generation.fail(error)

    def _receive(self, update: RequestUpdate | EngineDeadError) -> None:
        """The engine's word; nothing that goes wrong here may reach other requests."""
        if self._outcome is not None:
            return
        try:
            if isinstance(update, EngineDeadError):
                self._fail(errors.engine_unavailable())
            elif update.rejected:
                self._fail(errors.invalid(update.error or "the engine refused the request"))
            elif update.finish_reason == "abort":
                self._fail(errors.request_aborted(), "abort")
            elif update.finish_reason == "error":
                logger.error("%s failed: %s", self._job.request_id, update.error)
                too_slow = update.error == GRAMMAR_TOO_SLOW
                self._fail(errors.grammar_too_slow() if too_slow else errors.request_failed())
            else:
                self._take(update)
        except Exception:
            logger.exception("a generation failed")
            self._fail(errors.internal_error())

    def _take(self, update: RequestUpdate) -> None:
        self._timer.update(update, time.monotonic())
        stopped = self._assembler.push(update)
        output = self._assembler.output
        delta = self._generation.delta_of(self._index)
        delta.text += output.delta
        delta.token_ids.extend(update.new_token_ids[: output.num_new_tokens])
        delta.logprobs.extend(update.logprobs[: output.num_new_tokens])
        delta.num_drafts += update.num_drafts
        delta.num_accepted += update.num_accepted
        delta.cached_tokens = max(delta.cached_tokens, update.cached_tokens)
        if update.prompt_logprobs is not None:
            delta.prompt_logprobs = list(update.prompt_logprobs)
        delta.finish_reason, delta.stop_reason = output.finish_reason, output.stop_reason
        if stopped or update.finish_reason is not None:
            self._end(output.finish_reason or "stop")
