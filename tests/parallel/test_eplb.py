"""Placements even out skewed loads, keep every expert once on some rank and never twice on one, and move little."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsengine.model.rebalance import step_imbalances
from dsengine.parallel.eplb import imbalance, keep_places, place_experts, plan_moves, rank_loads
from dsengine.parallel.expert_places import ExpertPlaces


def skewed(experts: int, exponent: float, seed: int) -> list[float]:
    """Loads by Zipf's law, in random order."""
    loads = [1e6 / (1 + position) ** exponent for position in range(experts)]
    random.Random(seed).shuffle(loads)
    return loads


def check(placement: list[int], experts: int, ranks: int) -> None:
    assert set(placement) == set(range(experts))
    per_rank = len(placement) // ranks
    for rank in range(ranks):
        here = placement[rank * per_rank : (rank + 1) * per_rank]
        assert len(set(here)) == per_rank, f"rank {rank} holds an expert twice: {here}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("ranks", "redundant", "exponent"), [(8, 32, 0.5), (8, 32, 1.0), (32, 32, 0.5), (32, 64, 0.8), (72, 32, 0.4)]
)
def test_the_busiest_rank_is_within_a_tenth_of_the_mean(ranks: int, redundant: int, exponent: float, seed: int) -> None:
    loads = skewed(256, exponent, seed)
    before = imbalance(loads, [place % 256 for place in range(256 + redundant)], ranks)
    placement = place_experts(loads, ranks=ranks, places=256 + redundant)
    check(placement, 256, ranks)
    after = imbalance(loads, placement, ranks)
    assert after < 1.1 < before, f"from {before} to {after}"


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_experts_stay_on_a_node(seed: int) -> None:
    loads = skewed(256, 0.5, seed)
    placement = place_experts(loads, ranks=16, places=288, nodes=2, groups=8)
    check(placement, 256, 16)
    nodes = [{expert // 32 for expert in placement[first : first + 144]} for first in (0, 144)]
    assert len(nodes[0]) == len(nodes[1]) == 4
    assert not nodes[0] & nodes[1]
    by_node = [sum(loads[32 * group : 32 * group + 32][i] for group in node for i in range(32)) for node in nodes]
    for node, total in enumerate(by_node):
        each = rank_loads(loads, placement, 16)[8 * node : 8 * node + 8]
        assert max(each) < 1.1 * total / 8


def test_groups_that_do_not_divide_play_no_part() -> None:
    loads = skewed(64, 0.5, 0)
    assert place_experts(loads, ranks=8, places=72, nodes=2, groups=1) == place_experts(loads, ranks=8, places=72)


def test_one_expert_that_gets_everything_has_a_copy_everywhere() -> None:
    loads = [0.0] * 7 + [100.0]
    placement = place_experts(loads, ranks=4, places=12)
    check(placement, 8, 4)
    assert Counter(placement)[7] == 4
    assert imbalance(loads, placement, 4) == 1.0


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_every_placement_is_sound_and_its_moves_make_it(data: st.DataObject) -> None:
    nodes = data.draw(st.sampled_from([1, 1, 2]))
    ranks = nodes * data.draw(st.integers(1, 4))
    experts = data.draw(st.integers(1, 20))
    places = ranks * data.draw(st.integers(-(-experts // ranks), experts))
    draw_loads = st.lists(st.sampled_from([0, 0, 1, 2, 7, 100]), min_size=experts, max_size=experts)
    groups = data.draw(st.sampled_from([1, 2, 4]))
    old = place_experts(data.draw(draw_loads), ranks=ranks, places=places, nodes=nodes, groups=groups)
    wanted = place_experts(data.draw(draw_loads), ranks=ranks, places=places, nodes=nodes, groups=groups)
    check(wanted, experts, ranks)
    new = keep_places(old, wanted, ranks)
    per_rank = places // ranks
    for first in range(0, places, per_rank):
        assert Counter(new[first : first + per_rank]) == Counter(wanted[first : first + per_rank])
    result = list(old)
    for move in plan_moves(old, new, ranks, nodes):
        assert old[move.source] == new[move.target] != old[move.target]
        assert move.source // per_rank != move.target // per_rank, "what a rank has need not move"
        result[move.target] = old[move.source]
    assert result == new


def test_copies_take_turns_and_every_token_is_counted() -> None:
    places = ExpertPlaces(3, [0, 1, 2, 1], max_copies=2, turn=1, device=torch.device("cpu"))
    ids = torch.tensor([[1, 0], [1, 2], [2, 1]])
    assert places(ids).tolist() == [[3, 0], [1, 2], [2, 3]]
    assert places.counts.tolist() == [1, 1, 2, 2]
    assert places.by_expert(places.counts.tolist()) == [1, 3, 2]
    places.update([1, 2, 0, 0])
    assert places(ids).tolist() == [[0, 3], [0, 1], [1, 0]]
    assert places.counts.tolist() == [3, 2, 0, 1], "counted anew where experts lie elsewhere"
    assert places.by_expert(places.counts.tolist()) == [1, 3, 2]


def test_the_imbalance_of_steps_is_more_than_that_of_their_sum() -> None:
    none, left, right, even = [0, 0], [4, 0], [0, 4], [3, 3]
    assert step_imbalances(torch.tensor([[left, even], [right, even], [none, none]])) == [2.0, 1.0]
    assert step_imbalances(torch.tensor([[left, none], [even, none]])) == [1.5], "a layer that had no tokens"
    assert step_imbalances(torch.tensor([[none], [none]])) == []


@pytest.mark.parametrize(("places", "message"), [(7, "from 8"), (10, "multiple of the 4"), (36, "to 32")])
def test_impossible_numbers(places: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_experts([1.0] * 8, ranks=4, places=places)
    with pytest.raises(ValueError, match="nodes is 3"):
        place_experts([1.0] * 8, ranks=4, places=8, nodes=3)
