"""The budget of a step under latency targets, on simulated clocks: kept where it can be, and nobody starves."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from simulated_device import SimulatedDevice
from tiny_engine import GREEDY, core_of, random_prompts, tokens, use_queue, write_tiny_checkpoint

from dsengine import LLM
from dsengine.config import EngineConfig
from dsengine.engine.latency import Demand, LatencyController, Line, Work, within
from dsengine.engine.messages import AddRequest
from dsengine.engine.request import Request
from dsengine.engine.sampling_params import SamplingParams
from dsengine.engine.scheduler import Scheduler, SchedulerConfig
from dsengine.memory.block_manager import BlockManager
from dsengine.memory.radix_cache import RadixCache
from dsengine.specdec.shape import TreeShape

FIXED, EACH = 0.010, 0.0001  # seconds of a step, and of each of its tokens
MIXED, PAIR = (
    0.004,
    0.00000003,
)  # of a step that has prompts beside decodes, and of each pair of a token and one before it


class Clock:
    """A simulated engine whose steps take time, driven by a controller.

    Args:
        noise: of the steps' times, up or down by this share at most.
        bent: prompts cost more the longer they are, and their mere presence costs.
    """

    def __init__(self, controller: LatencyController | None, *, noise: float = 0.0, bent: bool = False) -> None:
        config = SchedulerConfig(block_size=16, max_running_requests=64, token_budget=2048, context_length=16_384)
        manager = BlockManager(4096)
        self.scheduler = Scheduler(config, manager, RadixCache(manager, 16))
        self.finished: list[Request] = []
        self.now = 0.0
        self.steps: list[tuple[int, int, float]] = []  # decodes, tokens, seconds
        self.first_token: dict[Request, float] = {}
        self._controller = controller
        self._rng = random.Random(0)
        self._noise = noise
        self._bent = bent

    def add(self, name: str, length: int, max_tokens: int) -> Request:
        prompt = [self._rng.randrange(50) for _ in range(length)]
        request = Request(name, prompt, SamplingParams(max_tokens=max_tokens), arrival_time=self.now)
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        scheduler, controller = self.scheduler, self._controller
        demand = scheduler.demand(self.now)
        budget = controller.choose(demand) if controller is not None else None
        batch = scheduler.schedule(self.now, budget=budget)
        if controller is not None:
            controller.start(self.now, Work.of(batch))
        seconds = self._seconds(Work.of(batch)) * (1 + self._noise * self._rng.uniform(-1, 1))
        self.steps.append((demand.decoding, batch.num_tokens, seconds))
        self.now += seconds
        if controller is not None:
            controller.end(self.now)
        scheduler.advance(batch)
        self.finished += scheduler.commit(batch, [[7] if item.samples else [] for item in batch.requests])
        for item in batch.requests:
            if item.samples:
                self.first_token.setdefault(item.request, self.now)
        if controller is not None and not scheduler.has_work:
            controller.rest()

    def _seconds(self, work: Work) -> float:
        seconds = FIXED + EACH * (work.decode_tokens + work.prompt_tokens)
        if self._bent and work.prompt_tokens:
            seconds += MIXED + PAIR * work.prompt_tokens * work.context
        return seconds

    def run(self, *, arrivals: list[tuple[float, int, int]]) -> None:
        """Requests (when, prompt, output) from the first to the last token."""
        waiting = sorted(arrivals)
        while waiting or self.scheduler.has_work:
            while waiting and waiting[0][0] <= self.now:
                _, length, max_tokens = waiting.pop(0)
                self.add(str(len(waiting)), length, max_tokens)
            if self.scheduler.has_work:
                self.step()
            else:
                self.now = waiting[0][0]

    def shared_steps(self) -> list[float]:
        """Seconds of steps in which somebody waited for his next token, once something is known."""
        return [seconds for decoding, _, seconds in self.steps[60:] if decoding]


LOAD = [(0.0, 64, 800)] * 8 + [(0.2 + 0.4 * i, 3000, 50) for i in range(12)]


@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("target", [0.02, 0.05, 0.12])
def test_steps_stay_within_the_target_and_use_it(target: float, noise: float, bent: bool) -> None:
    free, bound = Clock(None, noise=noise, bent=bent), Clock(LatencyController(2048, target), noise=noise, bent=bent)
    for clock in (free, bound):
        clock.run(arrivals=LOAD)
        clock.scheduler.check_integrity()
    assert max(seconds for decoding, _, seconds in free.steps if decoding) > 0.16
    with_prompts = [(tokens, seconds) for decoding, tokens, seconds in bound.steps[60:] if decoding and tokens > 32]
    late = [seconds for _, seconds in with_prompts if seconds > target]
    assert len(late) <= (0 if noise == 0 else 0.15 * len(with_prompts))
    assert max(bound.shared_steps()) < 1.3 * target
    assert statistics.median(seconds for _, seconds in with_prompts) > 0.7 * target, "what may be used is used"


def test_a_target_that_cannot_be_met_starves_nobody() -> None:
    clock = Clock(LatencyController(2048, 0.001))
    clock.run(arrivals=LOAD)
    assert len(clock.finished) == len(LOAD)
    assert all(tokens <= decoding + 16 for decoding, tokens, _ in clock.steps[20:] if decoding)


def test_alone_prompts_take_whole_steps() -> None:
    clock = Clock(LatencyController(2048, 0.02))
    clock.run(arrivals=[(0.0, 6000, 1), (5.0, 6000, 1)])
    assert [tokens for _, tokens, _ in clock.steps] == [2048, 2048, 1904] * 2


def test_a_first_token_that_would_be_late_comes_in_time_where_it_can() -> None:
    def late_prompt(ttft: float | None) -> tuple[float, float]:
        clock = Clock(LatencyController(2048, 0.02, ttft))
        for number in range(8):
            clock.add(str(number), 64, 400)
        while clock.now < 2.0:
            clock.step()
        before, asked = len(clock.steps), clock.now
        request = clock.add("prompt", 3000, 5)
        while request not in clock.first_token:
            clock.step()
        return clock.first_token[request] - asked, max(seconds for _, _, seconds in clock.steps[before:])

    unhurried, step = late_prompt(None)
    assert unhurried > 0.6 and step <= 0.02
    hurried, longest = late_prompt(0.5)
    assert hurried < 0.5 and 0.02 < longest < 0.1, "as large as need be, and no larger"
    assert late_prompt(0.05) == (unhurried, step), "what is lost harms nobody"


def test_the_same_times_lead_to_the_same_budgets() -> None:
    def budgets() -> list[int]:
        rng, controller, now, chosen = random.Random(3), LatencyController(1024, 0.03, 0.4), 0.0, []
        for _ in range(300):
            work = Work(rng.randrange(1, 30), rng.randrange(900), rng.randrange(2000))
            controller.start(now, work)
            now += (0.005 + 0.00004 * (work.decode_tokens + work.prompt_tokens)) * rng.uniform(0.9, 1.1)
            demand = Demand(rng.randrange(32), rng.randrange(2000), rng.randrange(500), rng.random())
            chosen.append(controller.choose(demand, rng.randrange(40)))
        return chosen

    assert budgets() == budgets() and len(set(budgets())) > 20


def test_what_was_no_step_is_not_counted() -> None:
    controller = LatencyController(2048, 0.05)
    for number in range(50):
        controller.start(number * 0.02, Work(100 + number % 7))
    expected = controller.decode_seconds(100)
    controller.start(1.0, Work(100))
    controller.start(61.0, Work(100))  # a pause of a minute
    assert controller.decode_seconds(100) < 2 * expected
    controller.rest()
    known = controller.decode_seconds(100)
    controller.start(500.0, Work(100))
    assert controller.decode_seconds(100) == known


def test_a_prefix_from_the_cache_makes_a_chunk_smaller() -> None:
    """What a token costs behind a long text is known from other prompts, before its first chunk."""
    clock = Clock(LatencyController(2048, 0.05), bent=True)
    clock.run(arrivals=LOAD)
    controller = clock._controller
    assert controller is not None
    near, far = (controller.choose(Demand(8, 400, context)) - 8 for context in (0, 2600))
    assert far < 0.7 * near
    assert controller.decode_seconds(8) + controller.chunk_seconds(far, 2600 + far / 2) <= 0.9 * 0.05 + 1e-9


def test_drafts_get_what_the_target_leaves_them() -> None:
    controller = LatencyController(2048, 0.03)
    assert controller.most_decode_tokens(Demand(4)) == 2048, "until something is known"
    for count in (4, 16, 32) * 20:
        controller.observe(Work(count), 0.010 + 0.0005 * count)
    assert controller.most_decode_tokens(Demand(4)) == 33  # 27 ms
    assert controller.most_decode_tokens(Demand(4, 100)) == 6  # half of that
    controller.observe(Work(4, 16), 0.028)  # 1 ms for each of a prompt's tokens
    assert controller.most_decode_tokens(Demand(4, 100)) == 4, "a prompt's smallest chunk leaves no time"
    assert controller.most_decode_tokens(Demand(20, 100)) == 20, "no fewer than there are"
    assert controller.most_decode_tokens(Demand(0, 100)) == 2048


def test_lines() -> None:
    line = Line(1.0)
    assert line.fit() == (0.0, 0.0) and line.weight == 0
    line.add(5, 3)
    assert line.fit() == (3, 0), "one point tells no slope"
    line.add(10, 4)
    assert line.fit() == pytest.approx((2, 0.2))
    line.add(20, 0, weight=3)
    assert line.fit() == pytest.approx((7 / 5, 0)), "it does not fall"
    steep = Line(0.5)
    for x, y in ((10, 1), (20, 12), (30, 23)):
        steep.add(x, y)
    height, slope = steep.fit()
    assert height == 0 and 0.6 < slope < 0.8, "it does not begin below 0"


def test_trees_shrink_to_the_budget() -> None:
    tree = TreeShape(3, 4, 8)
    assert within(tree, 4, 32) == tree and within(None, 4, 0) is None
    assert within(tree, 4, 31) == TreeShape(3, 1, 4)
    assert within(tree, 4, 11) == TreeShape(1, 1, 2)
    assert within(tree, 4, 7) is None


def test_bad_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="target_itl_ms is 0"):
        EngineConfig(target_itl_ms=0)
    with pytest.raises(ValueError, match="of no use"):
        EngineConfig(target_ttft_ms=100)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"speculative_algorithm": "NEXTN", "speculative_eagle_topk": 2},
        pytest.param({"tp_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["plain", "trees", "ranks"],
)
def test_targets_change_no_token(tmp_path: Path, others: dict[str, Any]) -> None:
    checkpoint, prompts = write_tiny_checkpoint(tmp_path), random_prompts(12, seed=4)
    options: dict[str, Any] = {"progress": False, "device": "cpu", "num_threads": 1, "max_total_tokens": 2048}
    with LLM(str(checkpoint), **options) as llm:
        expected = tokens(llm.generate(prompt_token_ids=prompts, sampling_params=GREEDY))
        assert llm.core.stats().token_budget == 2048
    with LLM(str(checkpoint), target_itl_ms=15, target_ttft_ms=1000, **options, **others) as llm:
        core, seen = llm.core, {str(i): list[int]() for i in range(len(prompts))}
        now, budgets = 0.0, set()
        for number, prompt in enumerate(prompts):
            core.add_request(AddRequest(str(number), prompt, GREEDY), now)
        while core.has_work:
            output = core.step(now)
            now += 0.01
            budgets.add(output.stats.token_budget)
            for update in output.updates:
                seen[update.request_id] += update.new_token_ids
        assert list(seen.values()) == expected
        assert min(budgets) < 2048


def test_chains_grow_as_long_as_the_target_allows(tmp_path: Path) -> None:
    checkpoint, prompts = write_tiny_checkpoint(tmp_path), random_prompts(4, seed=4)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    nextn = {"speculative_algorithm": "NEXTN", "speculative_adaptive": False, "speculative_num_steps": 5}
    options: dict[str, Any] = {"progress": False, "device": "cpu", "num_threads": 1, "max_total_tokens": 2048, **nextn}
    with LLM(str(checkpoint), target_itl_ms=16, **options) as llm:
        core, now, before, shapes = core_of(llm), 0.0, 0, dict[str, int]()
        for number, prompt in enumerate(prompts):
            core.add_request(AddRequest(str(number), prompt, params), now)
        while core.has_work:
            stats = core.step(now).stats.speculation
            assert stats is not None
            # 2 ms of a step, and 1 ms of each token: 12 of them fit into 0.9 · 16 ms, three for each request.
            now += 0.002 + 0.001 * (4 + stats.num_drafts - before)
            before, shapes = stats.num_drafts, stats.steps
        assert shapes["2/1/3"] > 0.8 * sum(shapes.values()) - 3


def test_an_overlapped_step_is_given_its_own_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, device, seen = write_tiny_checkpoint(tmp_path), SimulatedDevice(), list[tuple[Work, float]]()
    monkeypatch.setattr(LatencyController, "observe", lambda self, work, seconds: seen.append((work, seconds)))
    options: dict[str, Any] = {"progress": False, "chunked_prefill_size": 24, "target_itl_ms": 50}
    with use_queue(LLM(str(checkpoint), **options), checkpoint, device) as llm:
        core, now = core_of(llm), 0.0
        for number, prompt in enumerate(random_prompts(6, seed=4)):
            core.add_request(AddRequest(str(number), prompt, GREEDY), now)
        while core.has_work:
            waited = core._under_way
            core.step(now)
            now += 0.001 * waited.batch.num_tokens if waited is not None else 0.0
    device.close()
    assert len(seen) > 10 and len({work.prompt_tokens for work, _ in seen}) > 3
    for work, seconds in seen:
        assert seconds == pytest.approx(0.001 * (work.decode_tokens + work.prompt_tokens))
