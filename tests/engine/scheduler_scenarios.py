"""Scenarios for the scheduler (who comes when and asks for what) and the play of one, with the accounts kept of it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from scheduler_simulation import Simulation, run_alone

from dsengine.engine.batch import ScheduledBatch
from dsengine.engine.request import Request
from dsengine.engine.sampling_params import SamplingParams
from dsengine.engine.scheduler import SchedulerConfig
from dsengine.specdec.shape import TreeShape

VOCAB_SIZE = 12
FAMILIES = [[(7 * f + 3 * i * i + i) % VOCAB_SIZE for i in range(40)] for f in range(3)]


@dataclass(frozen=True)
class Plan:
    """One request of a scenario: what it asks and when it comes, is aborted or fails."""

    family: int
    shared: int
    tail: tuple[int, ...]
    salt: str
    priority: int
    max_tokens: int | None
    min_tokens: int
    stop: tuple[int, ...]
    eos: frozenset[int]
    ignore_eos: bool
    prompt_logprobs: bool
    arrives: int
    abort_after: int | None
    fails_after: int | None
    copies: int

    def request(self, request_id: str) -> Request:
        min_tokens = self.min_tokens if self.max_tokens is None else min(self.min_tokens, self.max_tokens)
        params = SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=self.stop,
            ignore_eos=self.ignore_eos,
            prompt_logprobs=0 if self.prompt_logprobs else None,
        )
        prompt = FAMILIES[self.family][: self.shared] + list(self.tail)
        return Request(request_id, prompt, params, self.priority, float(self.arrives), self.salt, self.eos)


@dataclass(frozen=True)
class Scenario:
    config: SchedulerConfig
    num_blocks: int
    use_cache: bool
    clock_runs: bool
    overlap: bool
    tree: TreeShape | None
    plans: tuple[Plan, ...]


class Play:
    """Plays a scenario and keeps the accounts of its requests."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.simulation = Simulation(
            scenario.config,
            scenario.num_blocks,
            use_cache=scenario.use_cache,
            vocab_size=VOCAB_SIZE,
            overlap=scenario.overlap and scenario.tree is None,
            tree=scenario.tree,
        )
        self.plan_of: dict[Request, Plan] = {}
        self.ended: list[Request] = []
        self.refused = 0
        self.age: dict[Request, int] = {}

    def run(self) -> None:
        by_arrival: dict[int, list[Plan]] = {}
        for plan in self.scenario.plans:
            by_arrival.setdefault(plan.arrives, []).append(plan)
        step, last = 0, max(by_arrival)
        # Alone each request needs at most one step per token; recomputation after preemptions multiplies that.
        bound = last + 20 * sum(p.copies for p in self.scenario.plans) * 70
        while step <= last or self.simulation.scheduler.has_work:
            assert step <= bound, "no end in sight: livelock or starvation"
            self._arrivals(by_arrival.get(step, []))
            self._aborts()
            self._step(float(step) if self.scenario.clock_runs else 0.0)
            step += 1
        self._check_end()

    def _arrivals(self, arriving: list[Plan]) -> None:
        limit = self.simulation.limit
        for plan in arriving:
            for _ in range(plan.copies):
                request = plan.request(f"r{len(self.plan_of) + self.refused}")
                if request.num_prompt_tokens > limit - 1:
                    with pytest.raises(ValueError, match=str(request.num_prompt_tokens)):
                        self.simulation.scheduler.add(request)
                    self.refused += 1
                    continue
                self.simulation.scheduler.add(request)
                self.plan_of[request] = plan
                self.age[request] = 0

    def _aborts(self) -> None:
        for request, age in self.age.items():
            if age == self.plan_of[request].abort_after and not request.is_finished:
                assert self.simulation.scheduler.abort(request.request_id) is request
                assert request.finish_reason == "abort"
                self.ended.append(request)
                self.simulation.scheduler.check_integrity()
            self.age[request] += 1
            if request.is_finished:
                assert self.simulation.scheduler.abort(request.request_id) is None

    def _step(self, now: float) -> None:
        simulation = self.simulation
        simulation.step(now, before_commit=self._failures)
        for state in simulation.scheduler._waiting:
            assert state.overtaken <= simulation.config.max_overtakes + simulation.config.waiting_window

    def _failures(self, batch: ScheduledBatch) -> None:
        scheduler = self.simulation.scheduler
        for item in batch.requests:
            # The output so far is committed; the token of this step is what went wrong.
            due = len(item.request.output_token_ids) + 1 == self.plan_of[item.request].fails_after
            if item.samples and due and scheduler.holds(item.request):
                scheduler.fail(item.request, "not a number")
                assert item.request.finish_reason == "error" and item.request.error == "not a number"
                self.ended.append(item.request)

    def _check_end(self) -> None:
        self.ended += self.simulation.finished
        assert len(self.ended) == len(set(self.ended)) and set(self.ended) == set(self.plan_of), "lost or doubled"
        for request in self.ended:
            expected = run_alone(request, VOCAB_SIZE, self.simulation.limit)
            assert request.is_finished and not request.block_table
            if request.finish_reason in ("abort", "error"):
                assert request.output_token_ids == expected.output[: len(request.output_token_ids)]
                continue
            assert request.output_token_ids == expected.output
            assert (request.finish_reason, request.stop_reason) == (expected.finish_reason, expected.stop_reason)
            assert request.num_cached_tokens < request.num_prompt_tokens
        self.simulation.check_empty()
