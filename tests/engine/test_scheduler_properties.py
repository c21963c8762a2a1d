"""Random schedules against the simulated model: nothing lost, doubled, starved, leaked or changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_scenarios import VOCAB_SIZE, Plan, Play, Scenario

from dsengine.engine.scheduler import SchedulerConfig
from dsengine.specdec.shape import TreeShape


def rarely(strategy: st.SearchStrategy[int]) -> st.SearchStrategy[int | None]:
    return st.one_of(st.none(), st.none(), st.none(), strategy)


tokens = st.integers(0, VOCAB_SIZE - 1)
plans = st.builds(
    Plan,
    family=st.integers(0, 2),
    shared=st.integers(0, 30),
    tail=st.lists(tokens, min_size=1, max_size=6).map(tuple),
    salt=st.sampled_from(["", "", "a"]),
    priority=st.sampled_from([0, 0, 0, 1, 2]),
    max_tokens=st.one_of(st.none(), st.integers(1, 25)),
    min_tokens=st.integers(0, 6),
    stop=st.sampled_from([(), (), (3,), (3, 5)]),
    eos=st.sampled_from([frozenset(), frozenset({3}), frozenset({1, 8})]),
    ignore_eos=st.booleans(),
    prompt_logprobs=st.sampled_from([False, False, False, True]),
    arrives=st.integers(0, 30),
    abort_after=rarely(st.integers(0, 12)),
    fails_after=rarely(st.integers(1, 6)),
    copies=st.sampled_from([1, 1, 1, 2, 4]),
)
configs = st.builds(
    SchedulerConfig,
    block_size=st.integers(1, 5),
    max_running_requests=st.integers(1, 8),
    token_budget=st.integers(1, 40),
    context_length=st.integers(4, 70),
    waiting_window=st.integers(1, 6),
    cache_hit_credit=st.sampled_from([0.0, 1.0, 20.0]),
    max_overtakes=st.integers(0, 4),
    decode_reserve_tokens=st.sampled_from([0, 4, 16]),
    lookahead=st.sampled_from([0, 1]),
)
scenarios = st.builds(
    Scenario,
    config=configs,
    num_blocks=st.integers(2, 40),
    use_cache=st.sampled_from([True, True, True, False]),
    clock_runs=st.booleans(),
    overlap=st.booleans(),
    tree=st.sampled_from([None, None, TreeShape(1, 1, 2), TreeShape(3, 1, 4), TreeShape(3, 2, 5), TreeShape(2, 4, 9)]),
    plans=st.lists(plans, min_size=1, max_size=10).map(tuple),
)


ANY_LOAD = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=ANY_LOAD)
@given(scenarios)
def test_every_schedule_yields_what_each_request_yields_alone(scenario: Scenario) -> None:
    Play(scenario).run()


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=ANY_LOAD)
@given(scenarios)
def test_tight_pools_preempt_and_change_nothing(scenario: Scenario) -> None:
    """The same with hardly more room than the longest prompt needs, no reserve for output, and long outputs."""
    config = replace(scenario.config, decode_reserve_tokens=0, max_running_requests=8, token_budget=30)
    crowd = tuple(replace(p, max_tokens=25, stop=(), ignore_eos=True, arrives=p.arrives % 4) for p in scenario.plans)
    Play(replace(scenario, config=config, num_blocks=60 // config.block_size, plans=crowd)).run()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=9_000, deadline=None, suppress_health_check=ANY_LOAD)
@given(scenarios, st.booleans())
def test_many_more_schedules(scenario: Scenario, tight: bool) -> None:
    if tight:
        config = replace(scenario.config, decode_reserve_tokens=0)
        scenario = replace(scenario, config=config, num_blocks=60 // config.block_size)
    Play(scenario).run()
