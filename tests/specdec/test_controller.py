"""The adaptive tree, simulated: it finds the fastest shape and gives up where drafting does not pay."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsengine.specdec.controller import Load, TreeController, expected_tokens, ladder, step_cost
from dsengine.specdec.shape import TreeShape

LARGEST = TreeShape(4, 4, 12)


class Machine:
    """A GPU in two numbers: reading the weights takes 1, each token adds `per_token`; the drafter is a tenth of it."""

    def __init__(self, per_token: float, draft: float = 0.1) -> None:
        self.per_token = per_token
        self.draft_share = draft

    def main(self, tokens: int, requests: int, context: int) -> float:
        return max(1.0, self.per_token * tokens) + 1e-6 * requests * context

    def draft(self, tokens: int, requests: int, context: int) -> float:
        return self.draft_share * self.main(tokens, requests, context)

    def catch_up(self, tokens: int) -> float:
        return 0.1 * self.draft(tokens, 1, 0)


def simulate(
    controller: TreeController, rates: dict[int, list[float]], requests: int, steps: int, seed: int = 0
) -> list[TreeShape | None]:
    """Choices of so many steps of a text whose drafts of width k and depth d are accepted with `rates[k][d - 1]`."""
    rng = random.Random(seed)
    chosen = []
    for _ in range(steps):
        shape = controller.choose(Load(requests, 1000))
        chosen.append(shape)
        if shape is None:
            continue
        accepted = []
        for _ in range(requests):
            count = 0
            while count < shape.max_depth and rng.random() < rates[shape.topk][count]:
                count += 1
            accepted.append(count)
        controller.observe(shape, accepted)
    return chosen


def speed(shape: TreeShape | None, rates: dict[int, list[float]], requests: int, machine: Machine) -> float:
    tokens = 1.0 if shape is None else expected_tokens(rates[shape.topk][: shape.max_depth])
    return tokens / step_cost(shape, Load(requests, 1000), machine)


GOOD = {1: [0.85, 0.75, 0.7, 0.65], 4: [0.95, 0.9, 0.85, 0.8]}
POOR = {1: [0.3, 0.2, 0.1, 0.1], 4: [0.35, 0.25, 0.2, 0.1]}


@pytest.mark.parametrize("rates", [GOOD, POOR], ids=["good", "poor"])
@pytest.mark.parametrize("requests", [1, 8, 32, 256])
@pytest.mark.parametrize("draft", [0.02, 0.3])
def test_settles_near_the_fastest_shape(rates: dict[int, list[float]], requests: int, draft: float) -> None:
    machine = Machine(per_token=1 / 128, draft=draft)
    chosen = simulate(TreeController(LARGEST, machine), rates, requests, steps=600)
    best = max(speed(shape, rates, requests, machine) for shape in (None, *ladder(LARGEST)))
    late = [speed(shape, rates, requests, machine) for shape in chosen[200:]]
    assert sum(late) / len(late) > 0.9 * best


def test_deep_on_a_small_batch_and_nothing_on_a_large_one() -> None:
    machine = Machine(per_token=1 / 64)
    alone = simulate(TreeController(LARGEST, machine), GOOD, 1, steps=200)[-1]
    assert alone is not None and alone.max_depth == 4
    assert simulate(TreeController(LARGEST, machine), POOR, 512, steps=200)[-1] is None


def test_follows_a_change_of_text() -> None:
    controller = TreeController(LARGEST, Machine(per_token=1 / 6, draft=0.3))
    simulate(controller, GOOD, 4, steps=200)
    deep = controller.current
    assert deep is not None
    bad = {1: [0.02] * 4, 4: [0.02] * 4}
    after = simulate(controller, bad, 4, steps=400)
    assert sum(shape is None for shape in after[300:]) > 50
    back = simulate(controller, GOOD, 4, steps=600)
    assert sum(shape is not None for shape in back[300:]) > 150


def test_without_adapting_the_shape_stays() -> None:
    controller = TreeController(LARGEST, None)
    assert set(simulate(controller, POOR, 100, steps=50)) == {LARGEST}


@settings(max_examples=30, deadline=None)
@given(
    outcomes=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), max_size=30),
    requests=st.integers(1, 300),
    per_token=st.floats(0.0001, 1),
)
def test_choices_are_a_function_of_what_was_seen(outcomes: list[list[int]], requests: int, per_token: float) -> None:
    def run() -> list[TreeShape | None]:
        controller = TreeController(LARGEST, Machine(per_token))
        chosen = []
        for accepted in outcomes:
            shape = controller.choose(Load(requests, 500))
            chosen.append(shape)
            if shape is not None:
                controller.observe(shape, [min(count, shape.max_depth) for count in accepted])
        return chosen

    first = run()
    assert first == run()
    assert all(shape is None or shape in ladder(LARGEST) for shape in first)


def test_ladder_stays_within_its_largest() -> None:
    shapes = ladder(LARGEST)
    assert LARGEST in shapes and TreeShape(1, 1, 2) in shapes and TreeShape(4, 1, 5) in shapes
    assert all(s.steps <= 4 and s.topk in (1, 4) and s.num_nodes <= 12 for s in shapes)
    assert ladder(TreeShape(3, 1, 4)) == tuple(TreeShape(s, 1, s + 1) for s in (1, 2, 3))
    assert all(s.num_nodes <= 3 for s in ladder(TreeShape(5, 2, 3)))


def test_rates_are_those_observed() -> None:
    controller = TreeController(TreeShape(2, 1, 3), None)
    for _ in range(500):
        controller.observe(TreeShape(2, 1, 3), [2, 1, 1, 0])
    assert controller.acceptance.rates(TreeShape(2, 1, 3)) == pytest.approx([3 / 4, 1 / 3], abs=0.01)


def test_what_one_width_shows_is_a_hint_for_the_other() -> None:
    controller = TreeController(LARGEST, None)
    for _ in range(50):
        controller.observe(LARGEST, [0, 4, 4, 4])
    wide, narrow = controller.acceptance.rate(4, 1), controller.acceptance.rate(1, 1)
    assert wide == pytest.approx(0.75, abs=0.02) and narrow == pytest.approx(0.5, abs=0.1)
