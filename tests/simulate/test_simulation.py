"""The simulator: its costs are the plan's and the published ones, its cluster serves every request exactly once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hub_configs import V2_LITE, V3

from dsengine.engine.policy import SchedulerConfig
from dsengine.model.config import ModelConfig
from dsengine.plan.communication import all_reduce_seconds, exchange_seconds, visited
from dsengine.plan.hardware import GPUS
from dsengine.plan.layout import Layout
from dsengine.plan.memory import cache_row_bytes, weigh
from dsengine.plan.roofline import Load, RankWork
from dsengine.plan.source import find_model
from dsengine.simulate.cluster import Instance
from dsengine.simulate.routing import make_router
from dsengine.simulate.simulation import Cluster, find_layout, simulate, usual_layouts
from dsengine.simulate.step_model import GroupStep, StepModel
from dsengine.simulate.workload import Conversation, Dialogue, Synthetic, Turn, read_trace

H200 = GPUS["h200"]
CONFIG = ModelConfig.from_hub(V3)
TP8, EP8 = Layout(8, 1, "tp"), Layout(1, 8, "ep")
CLUSTER = Cluster(find_model("deepseek-v3"), H200, EP8, 8)


def step_model(layout: Layout, efficiency: float = 1.0, overlap: bool = False) -> StepModel:
    return StepModel(CONFIG, layout, H200, cache_row_bytes(CONFIG, False), efficiency=efficiency, overlap=overlap)


# Costs


@pytest.mark.parametrize("layout", [Layout(), TP8, EP8, Layout(2, 4, "ep")], ids=lambda layout: layout.name)
@pytest.mark.parametrize("requests", [1, 32])
def test_steps_of_decodes_cost_what_the_plan_says_and_the_exchanges(layout: Layout, requests: int) -> None:
    steps = [GroupStep(decodes=requests, context=requests * 4096, samples=requests)] * layout.attn_dp
    time = step_model(layout).seconds(steps)
    plan = RankWork(CONFIG, layout, H200).decode_step_seconds(Load.decode(layout, requests * layout.attn_dp, 4096))
    assert time.total - time.communication == pytest.approx(plan, rel=1e-3)
    assert (time.communication > 0) == (layout.world > 1)
    assert step_model(layout, efficiency=0.5).seconds(steps).total == pytest.approx(2 * plan + time.communication)
    assert step_model(layout, overlap=True).seconds(steps).total <= time.total


def test_chunks_of_prompts_cost_what_the_plan_says() -> None:
    layout = Layout(1, 32, "ep")
    prompts, length = 4, 4096
    pairs = prompts * length * (length + 1) // 2
    steps = [GroupStep(prompt_tokens=prompts * length, prompt_pairs=pairs, expanded=prompts * length, samples=4)] * 32
    time = step_model(layout).seconds(steps)
    rank = RankWork(CONFIG, layout, H200)
    load = Load(prompts * length, prompts * length * 32, length)
    moe, dense = (sum(work.seconds(H200) for work in rank.prefill_layer(load, is_moe)) for is_moe in (True, False))
    assert time.total - time.communication == pytest.approx(58 * moe + 3 * dense + rank.head(4).seconds(H200), rel=1e-3)


def test_the_fullest_group_decides() -> None:
    full, empty = GroupStep(decodes=64, context=64 * 4096, samples=64), GroupStep()
    alone = step_model(EP8).seconds([full] + [empty] * 7)
    assert alone.total < step_model(EP8).seconds([full] * 8).total
    assert alone.communication == pytest.approx(step_model(EP8).seconds([full] * 8).communication)


def test_groups_that_are_not_simulated_feed_the_experts() -> None:
    step = GroupStep(decodes=8, context=8 * 4096, samples=8)
    assert step_model(EP8).seconds([step] * 2, weight=4.0) == step_model(EP8).seconds([step] * 8)


def test_published_exchanges() -> None:
    assert all_reduce_seconds(1048576, 8) == pytest.approx(19.3e-6)
    assert all_reduce_seconds(1048576, 16) > all_reduce_seconds(1048576, 8)
    assert all_reduce_seconds(1048576, 1) == 0
    for ranks, tokens, us in (
        (8, 128, 39.8 + 72.4),
        (64, 32, 62.7 + 96.6),
        (256, 128, 165.5 * 194 / 173 + 305.7 * 360 / 314),
    ):
        assert exchange_seconds(CONFIG, tokens, ranks, low_latency=True) == pytest.approx(us * 1e-6)
    between = [exchange_seconds(CONFIG, 128, ranks, low_latency=True) for ranks in (64, 72, 96, 128)]
    assert between == sorted(between)
    # 4096 tokens of 7168 to 3 of 4 nodes, FP8 with scales out at 58 GB/s and bf16 back at 57 GB/s.
    expected = 4096 * visited(CONFIG, 32) * 7168 * ((1 + 4 / 128) / 58e9 + 2 / 57e9)
    assert exchange_seconds(CONFIG, 4096, 32, low_latency=False) == pytest.approx(expected)


def test_places_that_a_token_goes_to() -> None:
    assert visited(CONFIG, 8) == pytest.approx(4 * (1 - 0.75**8))  # each GPU holds one of 8 groups; 4 are chosen
    on_one = 1 / 70 + 69 / 70 * 2 * 0.5**8  # both nodes hold chosen groups but in one of 70 cases
    assert visited(CONFIG, 16) == pytest.approx(2 - on_one, rel=0.01)
    assert visited(CONFIG, 32) < visited(CONFIG, 64) < visited(CONFIG, 72) < visited(CONFIG, 256) < 8
    assert visited(ModelConfig.from_hub(V2_LITE), 2) == pytest.approx(2 * (1 - 0.5**6))


def test_redundant_experts_are_held_and_spread() -> None:
    layout = find_layout(CONFIG, 72, "DP72 EP72")
    assert (layout.redundant, layout.name) == (32, "DP72 EP72+32")
    parts = {part.name: part.bytes_per_rank(layout) for part in weigh(CLUSTER.model, H200).parts}
    one_expert = {part.name: part.loaded_bytes for part in weigh(CLUSTER.model, H200).parts}["routed experts"] / 256
    assert parts["routed experts"] == pytest.approx(4 * one_expert)
    assert RankWork(CONFIG, layout, H200).routed_experts(10**6).bytes > 4 * 44e6


# Workloads


def test_a_trace_is_read_and_complaints_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"arrival": 2, "input_len": 10, "output_len": 3, "prefix_group": "b", "prefix_len": 5},
        {"arrival": 0.5, "input_len": 7, "output_len": 1},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_trace(path) == [Conversation(0.5, (Turn(7, 1),), 1, 0), Conversation(2.0, (Turn(10, 3),), 0, 5)]
    for row, message in (
        ({"arrival": 0, "input_len": 0, "output_len": 1}, "line 1: input_len is 0"),
        ({"arrival": -1, "input_len": 1, "output_len": 1}, "arrival is -1"),
        ({"arrival": 0, "input_len": 1, "output_len": 1, "prefix_len": 2}, "prefix_len is 2, more than input_len"),
        ({"arrival": 0, "input": 1}, "no field 'input'"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(ValueError, match=message):
            read_trace(path)


def test_synthetic_workloads_are_told_in_words() -> None:
    workload = Synthetic.parse(["input_len=300", "rate=2.5", "turns=3"])
    assert (workload.input_len, workload.rate, workload.turns) == (300, 2.5, 3)
    for words, message in (
        (["input=3"], "neither a file nor NAME=VALUE"),
        (["turns=x"], "turns is 'x'; it must be of type int"),
        (["output_len=0"], "output_len is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Synthetic.parse(words)


def test_prompts_share_what_their_groups_and_turns_share() -> None:
    ids = iter(range(2, 100))
    same = [Dialogue(Conversation(0, (Turn(40, 5), Turn(10, 5)), 3, 30), ids) for _ in range(2)]
    other = Dialogue(Conversation(0, (Turn(40, 5),), 4, 30), ids)
    first, second, third = (dialogue.next_prompt() for dialogue in (*same, other))
    assert len(first) == 40 and first[:30] == second[:30] and first[30] != second[30] and third[0] != first[0]
    same[0].answered()
    turn = same[0].next_prompt()
    assert turn[:40] == first and len(turn) == 55 and same[0].is_over


# Clusters


@pytest.mark.parametrize("routing", ["prefix", "least_loaded", "round_robin"])
@pytest.mark.parametrize("rate", [0.0, 20.0])
def test_every_request_is_served_once(routing: str, rate: float) -> None:
    workload = Synthetic(
        conversations=60, rate=rate, concurrency=12, input_len=300, output_len=20, turns=2, think_time=1.0
    )
    conversations = workload.generate()
    scheduler = SchedulerConfig(block_size=16, max_running_requests=8, token_budget=512, context_length=4096)
    router = make_router(routing, 4, 16, 400)  # type: ignore[arg-type]
    instance = Instance(
        step_model(Layout(1, 4, "ep")), scheduler, 400, router, num_groups=4, concurrency=None if rate else 12
    )
    record = instance.run(conversations)
    assert len(record.finished) == len(record.first_token) == 120
    wanted = sum(turn.output_len for each in conversations for turn in each.turns)
    assert sum(step[5] for step in record.steps) == wanted
    assert sum(record.gaps.values()) == sum(step[5] for step in record.steps) - 120
    assert all(group.outstanding == 0 for group in instance.groups)
    assert [step[0] for step in record.steps] == sorted(step[0] for step in record.steps)
    assert 0 < record.hit_tokens < record.prompt_tokens  # second turns find the first, where they meet it
    entered, computed = (sum(step[i] for step in record.steps) for i in (3, 4))
    assert entered == record.prompt_tokens and computed == entered - record.hit_tokens


def test_a_simulation_gives_the_same_answer_again() -> None:
    workload = Synthetic(conversations=40, concurrency=16, input_len=500, output_len=30)
    assert simulate(CLUSTER, workload) == simulate(CLUSTER, workload)


def test_efficiency_slows_everything_but_the_exchanges() -> None:
    workload = Synthetic(conversations=40, concurrency=40, input_len=500, output_len=30)
    bound, half = (simulate(replace(CLUSTER, efficiency=value), workload) for value in (1.0, 0.5))
    assert 1 < bound.output_tokens_per_second / half.output_tokens_per_second < 2
    with pytest.raises(ValueError, match=r"efficiency is 1\.5"):
        simulate(replace(CLUSTER, efficiency=1.5), workload)


def test_phases_leave_out_what_other_machines_do() -> None:
    workload = Synthetic(conversations=64, concurrency=64, input_len=2000, output_len=30)
    both, prefill, decode = (
        simulate(replace(CLUSTER, phase=phase), workload) for phase in ("both", "prefill", "decode")
    )
    assert prefill.input_tokens_per_second > both.input_tokens_per_second
    assert decode.output_tokens_per_second > both.output_tokens_per_second
    assert prefill.itl_p50 == 0 and decode.computed_tokens_per_second == 0


def test_sampled_groups_stand_for_all() -> None:
    wide = replace(CLUSTER, layout=Layout(1, 32, "ep"), num_gpus=32, phase="decode")
    workload = Synthetic(conversations=32 * 24, concurrency=32 * 8, input_len=500, output_len=40)
    full, sampled = simulate(wide, workload), simulate(replace(wide, sampled_groups=8), workload)
    assert sampled.answered * 4 == full.answered
    assert sampled.output_tokens_per_second == pytest.approx(full.output_tokens_per_second, rel=0.1)
    assert sampled.imbalance <= full.imbalance


def test_attention_dp_on_and_off() -> None:
    assert [layout.name for layout in usual_layouts(CLUSTER)] == ["DP8 EP8", "TP8"]
    assert [layout.name for layout in usual_layouts(replace(CLUSTER, num_gpus=1000))] == ["DP1000 EP1000+744", "TP8"]
    h100 = replace(CLUSTER, gpu=GPUS["h100"], num_gpus=16)
    assert [layout.name for layout in usual_layouts(h100)] == ["DP16 EP16", "TP16"]
    assert usual_layouts(replace(h100, num_gpus=4)) == []
    with pytest.raises(ValueError, match=r"does not fit as TP8.*GiB of weights on each NVIDIA H100"):
        simulate(replace(h100, layout=TP8), Synthetic(conversations=1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DP3", "which is no multiple"),
        ("EP8", "must say EP1"),
        ("DP8", "needs one TP group"),
        ("", "must look like"),
        ("TP8 DP2", "must look like"),
        ("DP0 EP0", "no multiple|of 0 GPUs"),
    ],
)
def test_layouts_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_layout(CONFIG, 8, name)
