"""The engine's heart: one `step()` schedules, runs, samples and commits.

It knows no sockets, threads or clocks. The offline `LLM` calls it directly; the engine process calls it between two
reads of its socket.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from dsengine.engine.batch import ScheduledBatch, ScheduledRequest
from dsengine.engine.messages import AddRequest, EngineInfo, EngineStats, RequestUpdate, StepOutput
from dsengine.engine.model_runner import LogitsRows, ModelRunner
from dsengine.engine.request import Request
from dsengine.engine.sampler import SampledToken, Sampler
from dsengine.engine.scheduler import Scheduler
from dsengine.model.deepseek import DeepseekModel

NUMERICAL_ERROR = "the model's output for this request is not a finite number"


class EngineCore:
    """Scheduler, model runner and sampler, driven one step at a time.

    Args:
        eos_token_ids: ids that end a request which does not ignore them.
        seed: seeds the draws of requests that bring no seed of their own.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        sampler: Sampler,
        info: EngineInfo,
        eos_token_ids: frozenset[int],
        seed: int,
    ) -> None:
        self.info = info
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._eos_token_ids = eos_token_ids
        self._seeds = random.Random(seed)
        self._num_steps = 0

    @property
    def model(self) -> DeepseekModel:
        return self._runner.model

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add_request(self, message: AddRequest, now: float) -> None:
        """Queue a request.

        Raises:
            ValueError: it can never run: empty, token ids outside the vocabulary, or longer than context or cache.
        """
        params = message.params
        self._check_token_ids("prompt", message.prompt_token_ids)
        self._check_token_ids("logit_bias", params.logit_bias or ())
        request = Request(
            request_id=message.request_id,
            prompt_token_ids=message.prompt_token_ids,
            params=params,
            priority=message.priority,
            arrival_time=now,
            cache_salt=message.cache_salt,
            eos_token_ids=frozenset() if params.ignore_eos else self._eos_token_ids,
            seed=params.seed if params.seed is not None else self._seeds.getrandbits(63),
        )
        self._scheduler.add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; unknown ids (already finished, never added) are fine."""
        for request_id in request_ids:
            self._scheduler.abort(request_id)

    def step(self, now: float) -> StepOutput:
        """Compute the next tokens of whatever is scheduled."""
        with torch.inference_mode():
            return self._step(now)

    def _step(self, now: float) -> StepOutput:
        batch = self._scheduler.schedule(now)
        updates: list[RequestUpdate] = []
        if not batch.is_empty:
            self._num_steps += 1
            updates = self._run(batch)
        return StepOutput(updates, self.stats())

    def _run(self, batch: ScheduledBatch) -> list[RequestUpdate]:
        logits, rows = self._runner.run(batch)
        self._score_prompts(logits, rows)
        sampled = self._sample(logits, rows)
        failed = [s.request for s in batch.requests if s in sampled and sampled[s].token_id is None]
        for request in failed:
            self._scheduler.fail(request, NUMERICAL_ERROR)
        alive = ScheduledBatch([s for s in batch.requests if s.request not in failed], batch.preempted)
        tokens = [sampled[s].token_id if s in sampled else None for s in alive.requests]
        self._scheduler.commit(alive, tokens)
        return [_update_of(s.request, sampled[s]) for s in batch.requests if s in sampled]

    def _sample(self, logits: Tensor, rows: Sequence[LogitsRows]) -> dict[ScheduledRequest, SampledToken]:
        wanted = [(r.scheduled, r.sample_row) for r in rows if r.sample_row is not None]
        if not wanted:
            return {}
        tokens = self._sampler.sample(logits[[row for _, row in wanted]], [s.request for s, _ in wanted])
        return {s: token for (s, _), token in zip(wanted, tokens, strict=True)}

    def _score_prompts(self, logits: Tensor, rows: Sequence[LogitsRows]) -> None:
        for r in rows:
            start, stop = r.prompt_rows
            request, first = r.scheduled.request, r.scheduled.start
            num_top = request.params.prompt_logprobs
            if num_top is None:
                continue
            if not request.prompt_logprobs:
                request.prompt_logprobs.append(None)  # nothing precedes the first token
            # After a preemption the prompt is computed again, maybe in other chunks; parts of it are scored already.
            start += len(request.prompt_logprobs) - (first + 1)
            if start < stop:
                known = len(request.prompt_logprobs)
                targets = request.prompt_token_ids[known : known + stop - start]
                request.prompt_logprobs.extend(self._sampler.prompt_logprobs(logits[start:stop], targets, num_top))

    def _check_token_ids(self, name: str, token_ids: Sequence[int] | dict[int, float]) -> None:
        for token in token_ids:
            if not 0 <= token < self.info.vocab_size:
                raise ValueError(
                    f"{name} holds token id {token}; the vocabulary has ids 0 to {self.info.vocab_size - 1}"
                )

    def stats(self) -> EngineStats:
        return self._scheduler.stats(num_steps=self._num_steps)

    def flush_cache(self) -> bool:
        """Forget all cached prefixes; refused (False) while requests are running."""
        return self._scheduler.flush_cache()

    def check_integrity(self) -> None:
        """Prove that every cache block is free, cached or owned, exactly as counted."""
        self._scheduler.check_integrity()


def _update_of(request: Request, sampled: SampledToken) -> RequestUpdate:
    first = len(request.output_token_ids) == 1
    scored = first and request.params.prompt_logprobs is not None
    return RequestUpdate(
        request_id=request.request_id,
        new_token_ids=() if sampled.token_id is None else (sampled.token_id,),
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        cached_tokens=request.num_cached_tokens,
        logprobs=() if sampled.logprob is None else (sampled.logprob,),
        prompt_logprobs=tuple(request.prompt_logprobs) if scored else None,
        error=request.error,
    )
