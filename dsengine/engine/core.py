"""The engine's heart: one `step()` schedules, launches, samples and commits.

Plain, a step is committed before the next one is scheduled. Overlapped, the next one is scheduled and launched first:
the device is never without work while the host thinks, and the tokens between two steps do not leave it. Both loops
are made of the same parts and yield the same tokens.

It knows no sockets, threads or clocks. The offline `LLM` calls it directly; the engine process calls it between two
reads of its socket.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from dsengine.engine.agreement import Agreement, Alone
from dsengine.engine.batch import ScheduledBatch, ScheduledRequest
from dsengine.engine.grammar import GrammarStore
from dsengine.engine.jump_forward import JumpForward
from dsengine.engine.latency import Demand, LatencyController, Work, within
from dsengine.engine.launch import LaunchedStep, StepLauncher
from dsengine.engine.messages import (
    AddRequest,
    CallName,
    EngineInfo,
    EngineStats,
    RequestUpdate,
    StepOutput,
    TokenLogprob,
)
from dsengine.engine.request import Request
from dsengine.engine.residency import Residency
from dsengine.engine.sampler import SampledToken
from dsengine.engine.scheduler import Scheduler
from dsengine.engine.speculation_book import SpeculationBook
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.manifest import verify_manifest
from dsengine.specdec.shape import TreeShape

NUMERICAL_ERROR = "the model's output for this request is not a finite number"


class EngineCore:
    """Scheduler and launcher, driven one step at a time.

    Args:
        overlap: launch each step before the results of the one before it are entered.
        eos_token_ids: ids that end a request which does not ignore them.
        seed: seeds the draws of requests that bring no seed of their own.
        book: of the drafts, where the launcher's runner has a speculator that drafts.
        jumps: to what grammars leave no choice about; None: there are none.
        latency: chooses how many tokens a step computes; None: always as many as the scheduler may.
        agreement: with the other ranks that run the model; None: there are none.
        verify: of other weights, as in `Residency`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        launcher: StepLauncher,
        info: EngineInfo,
        *,
        eos_token_ids: frozenset[int],
        seed: int,
        overlap: bool = False,
        book: SpeculationBook | None = None,
        jumps: JumpForward | None = None,
        latency: LatencyController | None = None,
        agreement: Agreement | None = None,
        verify: Callable[[Path], object] = verify_manifest,
    ) -> None:
        assert book is None or not overlap, "a step with drafts is committed before the next one is scheduled"
        self.info = info
        self._book = book
        self._jumps = jumps
        self._latency = latency
        self._agreement = agreement if agreement is not None else Alone()
        self.overlap = overlap
        self._scheduler = scheduler
        self._launcher = launcher
        self.residency = Residency(launcher.runner, Path(info.model), verify, self._agreement)
        self._under_way: LaunchedStep | None = None
        self._eos_token_ids = eos_token_ids
        self._seeds = random.Random(seed)
        self._num_steps = 0
        self.grammars = GrammarStore(info.vocab_size)

    @property
    def model(self) -> DeepseekModel:
        return self._launcher.runner.model

    @property
    def num_steps(self) -> int:
        """Steps that were launched."""
        return self._num_steps

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def check_request(self, message: AddRequest) -> None:
        """Prove that a request can run, as far as it can be known beforehand.

        Raises:
            ValueError: it never can: empty, token ids outside the vocabulary, longer than context or cache.
        """
        self._check_token_ids("prompt", message.prompt_token_ids)
        self._check_token_ids("logit_bias", message.params.logit_bias or ())
        self._scheduler.check_prompt(len(message.prompt_token_ids))

    def add_request(self, message: AddRequest, now: float) -> None:
        """Queue a request.

        Raises:
            ValueError: as `check_request`; or its id is in use, or its grammar has not been sent.
        """
        self.check_request(message)
        if self.residency.level:
            raise ValueError("the engine is asleep")
        params = message.params
        request = Request(
            request_id=message.request_id,
            prompt_token_ids=message.prompt_token_ids,
            params=params,
            priority=message.priority,
            arrival_time=now,
            cache_salt=message.cache_salt,
            eos_token_ids=frozenset() if params.ignore_eos else self._eos_token_ids,
            seed=params.seed if params.seed is not None else self._seeds.getrandbits(63),
            grammar=None
            if message.grammar is None
            else self.grammars.start(message.grammar.key, message.grammar.after),
        )
        self._scheduler.add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; unknown ids (already finished, never added) are fine."""
        for request_id in request_ids:
            self._scheduler.abort(request_id)

    def step(self, now: float) -> StepOutput:
        """Launch the next step of whatever is scheduled; returns the updates of the last one that is complete."""
        with torch.inference_mode():
            updates = self._step_overlapped(now) if self.overlap else self._step_plain(now)
        if self._latency is not None and not self.has_work:
            self._latency.rest()
        return StepOutput(updates, self.stats())

    def _step_plain(self, now: float) -> list[RequestUpdate]:
        launched = self._launch(now)
        return self._settle(launched)

    def _step_overlapped(self, now: float) -> list[RequestUpdate]:
        updates: list[RequestUpdate] = []
        if self._under_way is not None and self._under_way.holds_up_the_next:
            updates = self._settle(self._under_way)
            self._under_way = None
        launched = self._launch(now)
        updates += self._settle(self._under_way)
        self._under_way = launched
        return updates

    def _launch(self, now: float) -> LaunchedStep | None:
        """Schedules a step and queues it on the device; None when there is nothing to compute."""
        demand = self._demand(now)
        tree = self._choose_tree(demand)
        chains = self._jumps.chains() if self._jumps is not None and tree is None else None
        budget = self._choose_budget(demand, tree)
        batch = self._scheduler.schedule(now, tree or chains, only_proposals=chains is not None, budget=budget)
        lock_step = self._agreement.step(batch)
        if batch.is_empty and (lock_step is None or lock_step.most_requests == 0):
            return None
        self._note_start(now, batch)
        self._num_steps += 1
        launched = self._launcher.launch(batch, self._under_way, lock_step)
        self._scheduler.advance(batch)
        return launched

    def _demand(self, now: float) -> Demand | None:
        """What the latency targets are to be weighed against; None where there are none."""
        if self._latency is None:
            return None
        self._latency.end(now)
        return self._scheduler.demand(now)

    def _choose_tree(self, demand: Demand | None) -> TreeShape | None:
        if self._book is None:
            return None
        load = self._scheduler.load()
        tree = self._book.choose(load)
        if self._latency is not None and demand is not None:
            others = demand.decoding - load.requests
            tree = within(tree, load.requests, self._latency.most_decode_tokens(demand) - others)
        return self._agreement.tree(tree, load.requests)

    def _choose_budget(self, demand: Demand | None, tree: TreeShape | None) -> int | None:
        if self._latency is None or demand is None:
            return None
        drafts = self._scheduler.load().requests * (tree.num_nodes - 1) if tree is not None else 0
        return self._latency.choose(demand, drafts)

    def _note_start(self, now: float, batch: ScheduledBatch) -> None:
        """Overlapped, the time until the next step begins is that of the step before this one."""
        if self._latency is None:
            return
        if not self.overlap:
            self._latency.start(now, Work.of(batch))
        elif self._under_way is not None:
            self._latency.start(now, Work.of(self._under_way.batch))

    def _settle(self, launched: LaunchedStep | None) -> list[RequestUpdate]:
        """Waits for a step and enters its results; requests that have ended in the meantime get no update."""
        if launched is None:
            return []
        result = launched.fetch()
        alive = [s for s in launched.batch.requests if self._scheduler.holds(s.request)]
        tokens, scores = result.tokens, result.prompt_scores
        for scheduled in alive:
            request = scheduled.request
            if request in scores:
                _add_prompt_scores(scheduled, scores[request])
            if request in tokens and any(token.token_id is None for token in tokens[request]):
                broken = request.grammar.error if request.grammar is not None else None
                self._scheduler.fail(request, broken or NUMERICAL_ERROR)
        good = [s for s in alive if s.request.error is None]
        drafted = [s for s in good if s.num_drafts and not s.request.proposal]
        proposed = [s for s in good if s.num_drafts and s.request.proposal]
        self._scheduler.commit(ScheduledBatch(good), [_ids(tokens.get(s.request, ())) for s in good])
        if self._book is not None:
            accepted = [len(tokens[s.request]) - 1 for s in drafted]
            kept = sum(_num_kept(s, tokens[s.request]) for s in drafted)
            self._book.enter(launched.batch.tree, accepted, kept)
        if self._jumps is not None:
            for s in proposed:
                assert launched.batch.tree is not None
                self._jumps.enter(s.request, launched.batch.tree, len(tokens[s.request]) - 1)
            self._jumps.look(s.request for s in good if s.samples)
        return [_update_of(s, tokens[s.request]) for s in alive if s.samples]

    def _check_token_ids(self, name: str, token_ids: Sequence[int] | dict[int, float]) -> None:
        for token in token_ids:
            if not 0 <= token < self.info.vocab_size:
                raise ValueError(
                    f"{name} holds token id {token}; the vocabulary has ids 0 to {self.info.vocab_size - 1}"
                )

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats(self._num_steps, self._book.stats() if self._book is not None else None)
        budget = self._scheduler.config.token_budget if self._latency is None else self._latency.budget
        experts = self._launcher.experts()
        stats = msgspec.structs.replace(stats, sleep_level=self.residency.level, token_budget=budget, experts=experts)
        return (
            stats if self._jumps is None else msgspec.structs.replace(stats, num_jumped_tokens=self._jumps.num_tokens)
        )

    def maintain(self, name: CallName, argument: str) -> int:
        """Sleep, wake up or take other weights, on all ranks or on none; all cached prefixes are forgotten.

        Args:
            name: one of `MAINTENANCE`, with its `argument`.

        Returns:
            the level of sleep from now on.

        Raises:
            ValueError: there are requests, or as the methods of `Residency`.
        """
        objections = self._agreement.objections("requests are running or waiting" if self.has_work else None)
        if objections is not None:
            raise ValueError(objections)
        self._settle(self._under_way)
        self._under_way = None
        self._scheduler.flush_cache()
        match name:
            case "sleep":
                self.residency.sleep(int(argument))
            case "wake_up":
                self.residency.wake_up()
            case _:
                self.residency.update(Path(argument))
        return self.residency.level

    def flush_cache(self) -> bool:
        """Forget all cached prefixes; refused (False) while requests are running."""
        return self._scheduler.flush_cache()

    def check_integrity(self) -> None:
        """Prove that every cache block is free, cached or owned, exactly as counted."""
        self._scheduler.check_integrity()


def _add_prompt_scores(scheduled: ScheduledRequest, scores: Sequence[TokenLogprob]) -> None:
    """Appends the scores of a chunk, which begin at the token after its first, as far as they are new."""
    known = scheduled.request.prompt_logprobs
    if not known:
        known.append(None)  # nothing precedes the first token
    # After a preemption the prompt is computed again, maybe in other chunks.
    known.extend(scores[len(known) - (scheduled.start + 1) :])


def _ids(sampled: Sequence[SampledToken]) -> list[int]:
    return [token.token_id for token in sampled if token.token_id is not None]


def _num_entered(scheduled: ScheduledRequest) -> int:
    """Fewer than were drawn if the request ends in the middle of a path, or fails."""
    return len(scheduled.request.output_token_ids) - scheduled.num_output_tokens


def _num_kept(scheduled: ScheduledRequest, sampled: Sequence[SampledToken]) -> int:
    """Drafts that became tokens: all but the last one drawn, as far as they were entered."""
    return min(_num_entered(scheduled), len(sampled) - 1)


def _update_of(scheduled: ScheduledRequest, sampled: Sequence[SampledToken]) -> RequestUpdate:
    request = scheduled.request
    entered = sampled[: _num_entered(scheduled)]
    first = scheduled.num_output_tokens == 0 and len(entered) > 0
    scored = first and request.params.prompt_logprobs is not None
    return RequestUpdate(
        request_id=request.request_id,
        new_token_ids=tuple(_ids(entered)),
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        cached_tokens=request.num_cached_tokens,
        logprobs=tuple(token.logprob for token in entered if token.logprob is not None),
        prompt_logprobs=tuple(request.prompt_logprobs) if scored else None,
        error=request.error,
        num_drafts=scheduled.num_drafts,
        num_accepted=_num_kept(scheduled, sampled),
        queue_seconds=(request.queue_seconds or 0.0) if first else 0.0,
    )
