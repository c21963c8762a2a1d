"""What the scheduler decides, case by case."""

from __future__ import annotations

import pytest
from scheduler_simulation import Simulation, run_alone

from dsengine.engine.batch import ScheduledBatch
from dsengine.engine.policy import admission_score
from dsengine.engine.request import Request, RequestStatus
from dsengine.engine.sampling_params import SamplingParams
from dsengine.engine.scheduler import SchedulerConfig
from dsengine.engine.stopping import StopRule


def simulate(num_blocks: int = 64, *, use_cache: bool = True, overlap: bool = False, **config: float) -> Simulation:
    settings = {"block_size": 4, "max_running_requests": 16, "token_budget": 32, "context_length": 200} | config
    return Simulation(SchedulerConfig(**settings), num_blocks, use_cache=use_cache, overlap=overlap)  # type: ignore[arg-type]


def counts(batch: ScheduledBatch) -> dict[str, int]:
    return {item.request.request_id: item.num_tokens for item in batch.requests}


def prompt(length: int, start: int = 0) -> list[int]:
    return list(range(start, start + length))


def test_prompts_are_chunked_under_the_budget_and_decodes_go_first() -> None:
    sim = simulate(token_budget=10)
    sim.add("short", prompt(3), 30)
    assert counts(sim.step()) == {"short": 3}
    sim.add("long", prompt(25, 100), 30)
    assert [counts(sim.step()) for _ in range(4)] == [
        {"short": 1, "long": 9},
        {"short": 1, "long": 9},
        {"short": 1, "long": 7},
        {"short": 1, "long": 1},
    ]


def test_several_prompts_share_a_step_and_started_ones_go_first() -> None:
    sim = simulate(token_budget=10)
    for i, name in enumerate("abc"):
        sim.add(name, prompt(7, 100 * i))
    assert counts(sim.step()) == {"a": 7, "b": 3}
    assert counts(sim.step()) == {"a": 1, "b": 4, "c": 5}
    sim.add("urgent", prompt(12, 400), priority=9)
    assert counts(sim.step()) == {"a": 1, "b": 1, "c": 2, "urgent": 6}


def test_running_requests_never_outnumber_the_budget() -> None:
    sim = simulate(token_budget=2)
    for i in range(5):
        sim.add(str(i), prompt(5, 100 * i), 6)
    sim.step()
    assert sim.scheduler.num_running <= 2
    sim.run()
    assert len(sim.finished) == 5
    sim.check_empty()


@pytest.mark.parametrize("length", [64, 66])
def test_continuations_of_one_prompt_cost_one_prefill(length: int) -> None:
    sim = simulate(num_blocks=200, token_budget=24)
    requests = [sim.add(str(i), prompt(length), 1) for i in range(8)]
    sim.run()
    shared = (length - 1) // 4 * 4
    assert sim.num_computed == length + 7 * (length - shared)
    assert [r.num_cached_tokens for r in requests] == [0] + [shared] * 7
    assert sim.scheduler.stats().prefix_hit_tokens == 7 * shared
    assert sim.scheduler.stats().prefix_query_tokens == 8 * length


def test_the_prefix_being_computed_is_not_waited_for_once_its_request_is_gone() -> None:
    sim = simulate(token_budget=8)
    sim.add("first", prompt(40))
    sim.add("second", prompt(40))
    assert counts(sim.step()) == {"first": 8}
    assert counts(sim.step()) == {"first": 8}
    sim.scheduler.abort("first")
    batch = sim.step()
    assert counts(batch) == {"second": 8} and batch.requests[0].start == 16
    sim.run()
    sim.check_empty()


def test_only_equal_salts_wait_for_each_other() -> None:
    sim = simulate()
    sim.add("a", prompt(12), salt="x")
    sim.add("b", prompt(12), salt="y")
    assert counts(sim.step()) == {"a": 12, "b": 12}


def test_next_turn_of_a_chat_finds_prompt_and_answer() -> None:
    sim = simulate()
    first = sim.add("turn 1", prompt(10), 9)
    sim.run()
    # The last token of the answer was never fed back: 18 of 19 tokens are computed, 4 whole blocks.
    second = sim.add("turn 2", first.prompt_token_ids + first.output_token_ids + [7, 7], 2)
    sim.run()
    assert second.num_cached_tokens == 16
    branch = sim.add("branch", first.prompt_token_ids[:9] + [8] * 9, 2)
    sim.run()
    assert branch.num_cached_tokens == 8


def test_without_a_cache_everything_is_computed() -> None:
    sim = simulate(use_cache=False)
    for i in range(2):
        assert sim.add(str(i), prompt(12), 1).num_cached_tokens == 0
        sim.run()
    assert sim.num_computed == 24
    assert sim.scheduler.stats().num_blocks_cached == 0
    sim.check_empty()


def test_prompt_logprobs_need_every_position() -> None:
    sim = simulate()
    sim.add("plain", prompt(12), 1)
    sim.run()
    scored = sim.add("scored", prompt(12), params=SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert counts(sim.step()) == {"scored": 12}
    assert scored.num_cached_tokens == 0
    assert sim.manager.num_cached == 3, "the second copy was given back"


def test_least_important_request_is_preempted_and_resumes_in_front() -> None:
    sim = simulate(num_blocks=9, decode_reserve_tokens=0)
    names = {"old": 1, "low": 0, "young": 1}
    requests = {name: sim.add(name, prompt(8, 100 * i), 20, priority=p) for i, (name, p) in enumerate(names.items())}
    for _ in range(4):
        assert not sim.step().preempted
    order: list[str] = []
    while len(order) < 2:
        order += [r.request_id for r in sim.step().preempted]
    assert order == ["low", "young"]
    assert requests["low"].status is requests["young"].status is RequestStatus.WAITING
    assert requests["old"].status is RequestStatus.RUNNING and requests["old"].num_preemptions == 0
    sim.add("late", prompt(8, 700), 1, priority=1)
    began: dict[str, int] = {}
    while sim.scheduler.has_work:
        began = dict.fromkeys(counts(sim.step()), sim.num_steps) | began
    assert began["young"] <= began["late"] < began["low"]
    assert all(r.output_token_ids == run_alone(r, sim.vocab_size, sim.limit).output for r in sim.finished)
    assert sim.scheduler.stats().num_preemptions == sum(r.num_preemptions for r in sim.finished) >= 2
    sim.check_empty()


def test_a_more_important_request_gets_the_place_of_the_least_important() -> None:
    sim = simulate(max_running_requests=2, token_budget=6)
    sim.add("a", prompt(5), 50)
    sim.add("b", prompt(5, 100), 50)
    sim.step()
    sim.step()
    sim.add("equal", prompt(5, 200), 5)
    assert counts(sim.step()) == {"a": 1, "b": 1}
    sim.add("boss", prompt(5, 300), 5, priority=1)
    batch = sim.step()  # the budget holds for "boss" only because "b" gives its token back
    assert counts(batch) == {"a": 1, "boss": 5} and [r.request_id for r in batch.preempted] == ["b"]
    sim.run()
    assert sim.finished[0].request_id == "boss"


def test_waiting_is_counted_until_the_first_admission_only() -> None:
    sim = simulate(max_running_requests=1)
    first = sim.add("first", prompt(5), 50, arrival_time=1.0)
    sim.step(now=1.5)
    second = sim.add("second", prompt(5, 100), 5, arrival_time=2.0, priority=1)
    assert second.queue_seconds is None
    assert [r.request_id for r in sim.step(now=4.0).preempted] == ["first"]
    while sim.scheduler.has_work:
        sim.step(now=9.0)
    assert [request.queue_seconds for request in (first, second)] == [0.5, 2.0] and first.num_preemptions == 1


def test_admission_leaves_room_for_running_outputs() -> None:
    # 10 blocks; "a" needs 2 and may grow by 4, "b" needs 2 and may grow by 4: together 12.
    sim = simulate(num_blocks=10, decode_reserve_tokens=16)
    sim.add("a", prompt(8), 16)
    sim.add("b", prompt(8, 100), 16)
    assert counts(sim.step()) == {"a": 8}
    sim.run()
    assert sim.scheduler.stats().num_preemptions == 0


def test_idle_blocks_of_its_own_prefix_do_not_count_as_room() -> None:
    sim = simulate(num_blocks=10, decode_reserve_tokens=0)
    sim.add("earlier", prompt(16), 1)
    sim.run()
    sim.add("running", prompt(16, 100), 12)
    sim.step()
    # 4 of 10 blocks run, 4 are idle and match, 2 are free: 7 fit only if the 4 could be evicted and used at once.
    sim.add("same", prompt(28), 1)
    assert counts(sim.step()) == {"running": 1}
    sim.run()
    assert sim.scheduler.stats().num_preemptions == 0 and len(sim.finished) == 3


def test_a_prefix_found_and_then_evicted_for_another_request_is_computed_again() -> None:
    sim = simulate(num_blocks=20, token_budget=100, decode_reserve_tokens=0, cache_hit_credit=0.0)
    for start in (0, 100):
        sim.add(str(start), prompt(16, start), 1)
        sim.run()
    # 8 blocks are idle, 12 free. "big" evicts the two least recently used leaves, the end of what "hit" would find.
    sim.add("big", prompt(56, 200), 1)
    hit = sim.add("hit", prompt(17), 1)
    assert counts(sim.step()) == {"big": 56, "hit": 9}
    assert hit.num_cached_tokens == 8
    sim.check_empty()


def test_small_requests_do_not_slip_past_a_big_one() -> None:
    sim = simulate(num_blocks=20, decode_reserve_tokens=0)
    sim.add("running", prompt(20), 20)
    sim.step()
    sim.add("big", prompt(70, 100), 1)
    started = []
    for i in range(60):
        if i < 30:
            sim.add(f"small {i}", prompt(4, 400 + 10 * i), 2)
        started += [name for name in counts(sim.step()) if name not in started]
    assert started[:2] == ["running", "big"]


@pytest.mark.parametrize(("arrives_later", "overtakes"), [(0.5, True), (1.5, False)])
def test_a_cache_hit_is_worth_so_many_seconds_of_waiting(arrives_later: float, overtakes: bool) -> None:
    sim = simulate(max_running_requests=1, cache_hit_credit=1.0)
    sim.add("warm", prompt(40), 1)
    sim.run()
    sim.add("cold", prompt(41, 100), 1, arrival_time=10.0)
    sim.add("hit", prompt(41), 1, arrival_time=10.0 + arrives_later)
    (first, *_) = counts(sim.step(now=12.0))
    assert (first == "hit") == overtakes


def test_nobody_is_overtaken_for_ever_even_if_the_clock_stands_still() -> None:
    sim = simulate(max_running_requests=1, cache_hit_credit=1e9, max_overtakes=5)
    sim.add("warm", prompt(40), 1)
    sim.run()
    cold = sim.add("cold", prompt(12, 100), 1)
    for i in range(20):
        sim.add(f"hit {i}", prompt(41), 1)
        sim.step(now=0.0)
    assert sim.finished.index(cold) == 6


def test_score_trades_hits_against_waiting() -> None:
    assert admission_score(3.0, 0.0, 1.0, must_go=False) == 3.0
    assert admission_score(3.0, 0.5, 2.0, must_go=False) == 4.0
    assert admission_score(0.0, 1.0, 2.0, must_go=False) < admission_score(2.1, 0.0, 2.0, must_go=False)
    assert admission_score(0.0, 0.0, 2.0, must_go=True) > admission_score(1e9, 1.0, 2.0, must_go=False)


def test_waiting_window_bounds_the_look_ahead() -> None:
    sim = simulate(max_running_requests=1, waiting_window=2, cache_hit_credit=100.0)
    sim.add("warm", prompt(40), 1)
    sim.run()
    for name, start in (("a", 100), ("b", 200), ("hit", 0)):
        sim.add(name, prompt(40, start), 1)
    assert list(counts(sim.step())) == ["a"]


def test_requests_that_can_never_run_are_refused() -> None:
    sim = simulate(num_blocks=5)
    with pytest.raises(ValueError, match="200 tokens; the context holds 200"):
        sim.add("a", prompt(200))
    with pytest.raises(ValueError, match=r"20 tokens; the cache holds 20 \(5 blocks of 4\)"):
        sim.add("b", prompt(20))
    with pytest.raises(ValueError, match="empty"):
        sim.add("c", [])
    sim.add("d", prompt(19), None)
    with pytest.raises(ValueError, match="'d' is in use"):
        sim.add("d", prompt(3))
    with pytest.raises(ValueError, match="32 bits"):
        sim.add("e", [2**40] * 4)
    sim.run()
    assert [r.finish_reason for r in sim.finished] == ["length"]
    sim.check_empty()


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_size", 0), ("token_budget", 0), ("context_length", 1), ("cache_hit_credit", float("nan"))],
)
def test_impossible_limits_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        simulate(**{field: value})  # type: ignore[arg-type]


def test_abort_is_idempotent_in_every_state() -> None:
    sim = simulate(max_running_requests=1)
    running, waiting = sim.add("running", prompt(9), 20), sim.add("waiting", prompt(9, 100), 20)
    sim.step()
    assert sim.scheduler.abort("nobody") is None
    assert sim.scheduler.abort("waiting") is waiting and sim.scheduler.abort("waiting") is None
    assert sim.scheduler.abort("running") is running and sim.scheduler.abort("running") is None
    assert running.finish_reason == waiting.finish_reason == "abort" and running.is_finished
    sim.check_empty()


def test_abort_between_schedule_and_commit() -> None:
    sim = simulate()
    request, other = sim.add("a", prompt(9), 20), sim.add("b", prompt(9, 100), 1)
    batch = sim.scheduler.schedule(0.0)
    sampled = sim.compute(batch)
    sim.scheduler.abort("a")
    reborn = sim.add("a", prompt(9), 1)
    sim.commit(batch, sampled)
    assert request.output_token_ids == [] == reborn.output_token_ids and sim.finished == [other]
    sim.run()
    assert reborn.output_token_ids == run_alone(reborn, sim.vocab_size, sim.limit).output


def test_a_step_that_never_happened_is_scheduled_again() -> None:
    sim = simulate()
    sim.add("a", prompt(9), 3)
    lost = sim.scheduler.schedule(0.0)
    assert counts(sim.step()) == counts(lost)
    sim.run()
    sim.check_empty()


def test_suspect_blocks_leave_the_cache_with_their_request() -> None:
    sim = simulate(token_budget=8)
    bad, good = sim.add("bad", prompt(30), 5), sim.add("good", prompt(8) + prompt(10, 50), 5)
    for _ in range(4):
        sim.step()
    assert sim.cache is not None and len(sim.cache.match(prompt(30))) == 7
    sim.scheduler.fail(bad, "not finite")
    sim.scheduler.fail(bad, "again")
    assert (bad.finish_reason, bad.error) == ("error", "not finite")
    assert len(sim.cache.match(prompt(30))) == 2, "what another request uses stays"
    sim.scheduler.check_integrity()
    sim.run()
    assert sim.finished == [good]
    sim.check_empty()


def test_flush_is_refused_while_requests_run() -> None:
    sim = simulate()
    sim.add("a", prompt(9), 3)
    sim.step()
    assert not sim.scheduler.flush_cache()
    sim.run()
    assert sim.manager.num_cached > 0 and sim.scheduler.flush_cache() and sim.manager.num_cached == 0


def test_stats_count_what_is_there() -> None:
    sim = simulate(max_running_requests=1)
    for i in range(3):
        sim.add(str(i), prompt(9, 100 * i), 5)
    sim.step()
    stats = sim.scheduler.stats(num_steps=7)
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (1, 2, 7)
    assert (stats.num_blocks, stats.num_blocks_in_use, stats.num_blocks_cached) == (64, 3, 2)


STOP = SamplingParams(max_tokens=6, min_tokens=2, stop_token_ids=(5,))


@pytest.mark.parametrize(
    ("params", "token", "num_output", "verdict"),
    [
        (STOP, 5, 1, None),
        (STOP, 5, 2, ("stop", 5)),
        (STOP, 9, 2, ("stop", None)),
        (STOP, 4, 5, None),
        (STOP, 4, 6, ("length", None)),
        (STOP, 5, 6, ("stop", 5)),
        (SamplingParams(ignore_eos=True), 9, 3, None),
        (SamplingParams(ignore_eos=True, stop_token_ids=(9,)), 9, 3, ("stop", 9)),
        (SamplingParams(max_tokens=None), 4, 16, None),
        (SamplingParams(max_tokens=None), 4, 17, ("length", None)),
        (SamplingParams(max_tokens=None, min_tokens=30), 9, 17, ("length", None)),
    ],
)
def test_stop_rule(params: SamplingParams, token: int, num_output: int, verdict: tuple[str, int | None] | None) -> None:
    request = Request("r", [1, 2, 3], params, eos_token_ids=frozenset({9}))
    assert StopRule.of(request, context_length=20).check(token, num_output, 3 + num_output) == verdict


# Steps whose results come late


def test_a_request_that_stopped_gets_one_step_in_vain_and_keeps_nothing() -> None:
    sim = simulate(overlap=True)
    request = sim.add("a", prompt(6), params=SamplingParams(max_tokens=30, stop_token_ids=tuple(range(50))))
    assert counts(sim.step()) == {"a": 6}
    assert counts(sim.step()) == {"a": 1} and request.finish_reason == "stop"
    assert sim.manager.num_in_use == 0 and not sim.scheduler.has_work
    assert counts(sim.step()) == {}
    assert len(request.output_token_ids) == 1, "what the last step drew is dropped"
    sim.check_empty()


def test_no_step_goes_past_the_last_token_a_request_may_have() -> None:
    sim = simulate(num_blocks=5, overlap=True)
    request = sim.add("a", prompt(17), None)  # to the end of the pool
    assert [counts(sim.step()) for _ in range(5)] == [{"a": 17}, {"a": 1}, {"a": 1}, {}, {}]
    assert len(request.output_token_ids) == 3 and request.finish_reason == "length"
    sim.check_empty()


def test_a_preempted_request_keeps_the_token_that_was_on_its_way() -> None:
    sim = simulate(overlap=True, max_running_requests=1)
    young = sim.add("young", prompt(11), 8)
    sim.step()
    urgent = sim.add("urgent", prompt(11, 100), 8, priority=1)
    assert sim.step().preempted == [young]
    assert len(young.output_token_ids) == 1 and young.block_table == []
    while sim.scheduler.has_work:
        sim.step()
    for request in (urgent, young):
        assert request.output_token_ids == run_alone(request, sim.vocab_size, sim.limit).output
    sim.check_empty()


def test_a_prefix_is_shared_once_its_numbers_are_known_to_be_good() -> None:
    sim = simulate(overlap=True)
    first, second = sim.add("first", prompt(14), 3), sim.add("second", prompt(14), 3)
    assert counts(sim.step()) == {"first": 14}
    assert counts(sim.step()) == {"first": 1}, "the prefix is under way, and worth waiting for"
    assert counts(sim.step()) == {"first": 1, "second": 2}
    while sim.scheduler.has_work:
        sim.step()
    assert first.output_token_ids == second.output_token_ids and second.num_cached_tokens == 12
    sim.check_empty()


def test_a_failed_request_leaves_nothing_of_its_last_steps_in_the_cache() -> None:
    sim = simulate(overlap=True)
    bad = sim.add("bad", prompt(12), 5)
    sim.step()
    sim.step(before_commit=lambda batch: sim.scheduler.fail(bad, "not finite"))
    assert bad.output_token_ids == [] and sim.manager.num_cached == 0
    sim.step()
    sim.check_empty()
