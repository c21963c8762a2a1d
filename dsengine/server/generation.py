"""Runs the sequences of one HTTP request and merges what comes of them into one stream of text deltas.

Each sequence has a task that takes the engine's updates as they come; what the client has not read yet is merged into
one delta per sequence, so that a slow reader costs the text it has not read and nothing more. Closing the stream
cancels the tasks, which aborts the sequences in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from dsengine.async_engine import AsyncEngine, EngineDeadError, QueueFullError
from dsengine.engine.constraint import Constraint
from dsengine.engine.messages import GRAMMAR_TOO_SLOW, FinishReason, RequestUpdate, TokenLogprob
from dsengine.engine.sampling_params import SamplingParams
from dsengine.outputs import SequenceAssembler
from dsengine.server import errors
from dsengine.server.errors import ApiError
from dsengine.server.metrics import Metrics
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
        tasks = [asyncio.create_task(self._run(index, job)) for index, job in enumerate(self._jobs)]
        unfinished = len(tasks)
        try:
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
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def fail(self, error: ApiError) -> None:
        """End the stream with an error, after what has already arrived."""
        self._error = self._error or error
        self._arrived.set()

    async def _run(self, index: int, job: Job) -> None:
        try:
            await self._pump(index, job)
        except EngineDeadError:
            self.fail(errors.engine_unavailable())
        except QueueFullError:
            self.fail(errors.queue_full())
        except ValueError as error:
            self.fail(errors.invalid(str(error)))
        except ApiError as error:
            self.fail(error)
        except Exception:
            logger.exception("a generation failed")
            self.fail(errors.internal_error())

    async def _pump(self, index: int, job: Job) -> None:
        assembler = SequenceAssembler(index, self._engine.tokenizer, job.prompt_token_ids, job.params)
        timer = self._metrics.sequence(len(job.prompt_token_ids))
        if self._record is not None:
            self._record.sequences.append(timer)
        updates = self._engine.generate(
            job.prompt_token_ids,
            job.params,
            request_id=job.request_id,
            priority=job.priority,
            cache_salt=job.cache_salt,
            constraint=job.constraint,
        )
        outcome: str = "error"
        try:
            async with contextlib.aclosing(updates):
                async for update in updates:
                    if update.finish_reason == "abort":
                        outcome = "abort"
                        raise errors.request_aborted()
                    if update.finish_reason == "error":
                        logger.error("%s failed: %s", job.request_id, update.error)
                        raise errors.grammar_too_slow() if update.error == GRAMMAR_TOO_SLOW else errors.request_failed()
                    timer.update(update, time.monotonic())
                    stopped = assembler.push(update)
                    self._merge(index, update, assembler)
                    if stopped or update.finish_reason is not None:
                        outcome = assembler.output.finish_reason or "stop"
                        return
            raise errors.engine_unavailable()  # the engine ended the sequence without a last word
        except asyncio.CancelledError:
            outcome = "abort"
            raise
        finally:
            timer.finish(outcome, time.monotonic())
            if self._record is not None and self._record.keeps_texts:
                self._record.texts.append(SequenceTexts(job.prompt_token_ids, assembler.output.text))

    def _merge(self, index: int, update: RequestUpdate, assembler: SequenceAssembler) -> None:
        delta = self._pending.setdefault(index, Delta(index))
        output = assembler.output
        delta.text += output.delta
        delta.token_ids.extend(update.new_token_ids[: output.num_new_tokens])
        delta.logprobs.extend(update.logprobs[: output.num_new_tokens])
        delta.num_drafts += update.num_drafts
        delta.num_accepted += update.num_accepted
        delta.cached_tokens = max(delta.cached_tokens, update.cached_tokens)
        if update.prompt_logprobs is not None:
            delta.prompt_logprobs = list(update.prompt_logprobs)
        delta.finish_reason, delta.stop_reason = output.finish_reason, output.stop_reason
        self._arrived.set()
