"""G8: long random schedules against a simulated model that knows what every cache slot must hold."""

from __future__ import annotations

import random
from collections import Counter

from gate_frame import Findings, Outcome, Scale
from scheduler_scenarios import VOCAB_SIZE, Plan, Play, Scenario

from dsengine.engine.batch import ScheduledBatch
from dsengine.engine.scheduler import SchedulerConfig
from dsengine.specdec.shape import TreeShape

TITLE = "scheduler, blocks and prefix cache against a naive model"
TARGET = "200,000 steps over 200 seeds, invariants at every step: every request gets what it gets alone, 0 blocks lost"
STEPS_PER_SEED = 1_000
TREES = (None, None, None, TreeShape(1, 1, 2), TreeShape(3, 1, 4), TreeShape(3, 2, 5), TreeShape(2, 4, 9))


class _CountingPlay(Play):
    """Counts what happened, so that a gate which provokes nothing cannot pass."""

    def __init__(self, scenario: Scenario, counts: Counter[str]) -> None:
        super().__init__(scenario)
        self._counts = counts

    def _failures(self, batch: ScheduledBatch) -> None:
        super()._failures(batch)
        self._counts["preemptions"] += len(batch.preempted)

    def _check_end(self) -> None:
        super()._check_end()
        counts = self._counts
        counts["steps"] += self.simulation.num_steps
        counts["requests"] += len(self.ended)
        counts["accepted drafts"] += self.simulation.num_accepted
        for request in self.ended:
            counts["aborts"] += request.finish_reason == "abort"
            counts["failures"] += request.finish_reason == "error"
            counts["cached tokens"] += request.num_cached_tokens
            counts["salted hits"] += bool(request.cache_salt) and request.num_cached_tokens > 0


def run(scale: Scale, seed: int) -> Outcome:
    found, counts = Findings("G8"), Counter[str]()
    seeds = range(seed, seed + scale.of(200, 8))
    for number in seeds:
        rng, before = random.Random(number), counts["steps"]
        try:
            while counts["steps"] - before < scale.of(STEPS_PER_SEED, 250):
                _CountingPlay(_scenario(rng), counts).run()
        except AssertionError as error:
            found.fail(f"seed {number}: {str(error) or repr(error)}"[:500])
    for event in ("preemptions", "accepted drafts", "aborts", "failures", "cached tokens", "salted hits"):
        if not counts[event]:
            found.fail(f"no {event}: the schedules do not reach what they are for")
    reached = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return found.outcome(f"{len(seeds)} seeds: {reached}; {len(found.failures)} broken invariants")


def _scenario(rng: random.Random) -> Scenario:
    block_size, is_tight = rng.randint(1, 5), rng.random() < 0.5
    context_length = rng.randint(8, 70)
    config = SchedulerConfig(
        block_size=block_size,
        max_running_requests=rng.randint(1, 10),
        token_budget=rng.randint(1, 40),
        context_length=context_length,
        waiting_window=rng.randint(1, 6),
        cache_hit_credit=rng.choice((0.0, 1.0, 20.0)),
        max_overtakes=rng.randint(0, 4),
        decode_reserve_tokens=0 if is_tight else rng.choice((0, 4, 16)),
        lookahead=rng.choice((0, 1)),
    )
    steps = rng.choice((40, 150, 400))
    return Scenario(
        config=config,
        num_blocks=60 // block_size if is_tight else rng.randint(2, 60),
        use_cache=rng.random() < 0.8,
        clock_runs=rng.random() < 0.5,
        overlap=rng.random() < 0.5,
        tree=rng.choice(TREES),
        plans=tuple(_plan(rng, steps) for _ in range(max(1, steps // rng.choice((3, 6, 12))))),
    )


def _plan(rng: random.Random, steps: int) -> Plan:
    return Plan(
        family=rng.randrange(3),
        shared=rng.randint(0, 30),
        tail=tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 6))),
        salt=rng.choice(("", "", "a", "b")),
        priority=rng.choice((0, 0, 0, 1, 2)),
        max_tokens=rng.choice((None, rng.randint(1, 25), 25)),
        min_tokens=rng.randint(0, 6),
        stop=rng.choice(((), (), (3,), (3, 5))),
        eos=rng.choice((frozenset(), frozenset({3}), frozenset({1, 8}))),
        ignore_eos=rng.random() < 0.5,
        prompt_logprobs=rng.random() < 0.2,
        arrives=rng.randrange(steps),
        abort_after=rng.randint(0, 12) if rng.random() < 0.2 else None,
        fails_after=rng.randint(1, 6) if rng.random() < 0.1 else None,
        copies=rng.choice((1, 1, 1, 2, 4)),
    )
