"""Models whose attention groups have tokens of their own answer each group as the whole model does, whoever is idle."""

from __future__ import annotations

import json
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_steps import GroupRun, Schedule, options_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_processes import ROOT, run_worker
from safetensors.torch import load_file
from tiny_checkpoints import FP8_QUANTIZATION, TINY_CONFIGS, load_tiny

from dsengine.model.random_checkpoint import write_random_checkpoint
from dsengine.parallel.exchange import token_shares

DEMO = ROOT / "dsengine" / "demo" / "checkpoint"
TIMEOUT_S = 240
RANKS = 4

HUB_CONFIGS: dict[str, dict[str, Any]] = {
    "v3": TINY_CONFIGS["v3"],
    "v2_lite": TINY_CONFIGS["v2_lite"],
    "v3_fp8": TINY_CONFIGS["v3"] | {"quantization_config": FP8_QUANTIZATION, "vocab_size": 323},
}

# Dense layers that four ranks share between blocks of 128, and a vocabulary that is no multiple of them.
BLOCKS: dict[str, Any] = HUB_CONFIGS["v3_fp8"] | {
    "qk_nope_head_dim": 112,
    "v_head_dim": 128,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
}

# Some prefill; some decode beside them; one or three are idle.
MIXES: Schedule = [
    [[30, 0], [7, 3], [1, 0], [0, 0]],
    [[1, 12], [0, 0], [1, 0], [40, 0]],
    [[1, 1], [1, 1], [1, 0], [1, 0]],
    [[0, 0], [0, 1], [0, 0], [0, 0]],
]
TP = {"experts_whole": False}
EP = {"experts_whole": True}
SENT = {"experts_whole": True, "moe_exchange": "all_to_all"}
FP8 = {"weight_format": "fp8", "activation_format": "fp8"}
BF16 = {"dtype": "bfloat16"}
DENSE = {"dense_over_world": True}
HEAD = {"lm_head_over_world": True}
MOVING = {"redundant_experts": 4, "balances_experts": True}


def random_schedules(count: int) -> list[Schedule]:
    """The same every time, and as hypothesis likes them: with many zeros and repetitions."""
    found: list[Schedule] = []
    request = st.sampled_from([0, 0, 1, 1, 2, 5, 14])
    groups = st.lists(st.lists(request, min_size=2, max_size=2), min_size=RANKS, max_size=RANKS)

    @settings(max_examples=count, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(groups, min_size=1, max_size=4))
    def collect(schedule: Schedule) -> None:
        found.append(schedule)

    collect()
    return found[:count]


def case(
    checkpoint: str, size: int, attn_dp_size: int, layout: dict[str, Any], schedules: list[Schedule]
) -> dict[str, Any]:
    way = layout.get("moe_exchange", "gather") + (" whole experts" if layout["experts_whole"] else " cut experts")
    moving = " that move" if layout.get("balances_experts") else ""
    shared = "".join(f", {name}" for name in ("dense_over_world", "lm_head_over_world") if layout.get(name))
    return {
        "name": f"{Path(checkpoint).name} on {size} ranks in {attn_dp_size} groups, {way}{moving}{shared}",
        "checkpoint": checkpoint,
        "options": {},
        "size": size,
        "attn_dp_size": attn_dp_size,
        "layout": layout,
        "schedules": schedules,
    }


def run_ranks(folder: Path, cases: list[dict[str, Any]]) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, Any]]]:
    """What each rank answered, and told of each case; no rank outlives this call."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    run_worker("dp_worker.py", RANKS, folder, address, helpers=["model"], timeout_s=TIMEOUT_S)
    answers = [load_file(folder / f"rank{rank}.safetensors") for rank in range(RANKS)]
    return answers, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def check(case: dict[str, Any], found: list[dict[str, torch.Tensor]]) -> None:
    """Compare every rank's answers with those of the whole model to its group's requests.

    In float32 no logit may be off; where results are rounded coarsely on their way, a rounding may fall the other way,
    and only the mean says something.
    """
    whole = load_tiny(Path(case["checkpoint"]), **options_of(case))
    is_exact = not case["options"].keys() & {"dtype", "activation_format"}
    width = case["size"] // case["attn_dp_size"]
    for group in range(case["attn_dp_size"]):
        for number, schedule in enumerate(case["schedules"]):
            for key, expected in GroupRun(whole, group, 1).answers(schedule).items():
                for rank in range(RANKS):
                    if rank % case["size"] // width != group:
                        continue
                    answer = found[rank][f"{case['name']}/{number}/{key}"]
                    assert answer.shape == expected.shape
                    if expected.numel() == 0:
                        continue
                    difference = (answer - expected).abs()
                    off = float(difference.max()) if is_exact else float(difference.mean() / expected.std())
                    limit = 1e-4 if is_exact else 0.01
                    assert off < limit, f"{case['name']}, schedule {number}, rank {rank}, {key}: off by {off}"


def check_traffic(ranks: list[dict[str, int]], *, sent: bool) -> None:
    """Bytes of one step of v2_lite, 8 tokens in each of 4 groups of one rank: only the MoE layers exchange anything."""
    hub = HUB_CONFIGS["v2_lite"]
    layers, result = hub["num_hidden_layers"] - hub["first_k_dense_replace"], 4 * hub["hidden_size"]
    row = result + 16 + 16  # the values; weights and places of 3 experts
    if not sent:
        for traffic in ranks:
            assert traffic["all_gather_bytes"] == layers * 8 * row
            assert traffic["reduce_scatter_bytes"] == layers * RANKS * 8 * result
            assert traffic["all_to_all_bytes"] == traffic["all_reduce_bytes"] == 0
        return
    counts = layers * RANKS * (RANKS - 1) * 8
    moved = sum(traffic["all_to_all_bytes"] for traffic in ranks) - counts
    tokens, rest = divmod(moved, row + result)
    assert rest == 0, "what goes somewhere comes back"
    assert layers * RANKS * 8 < tokens <= layers * RANKS * 8 * hub["num_experts_per_tok"]
    assert all(sum(traffic.values()) == traffic["all_to_all_bytes"] for traffic in ranks)


def test_groups_answer_as_the_whole_model(tmp_path: Path) -> None:
    for name, hub in HUB_CONFIGS.items():
        write_random_checkpoint(tmp_path / name, hub, seed=4)
    v3, lite, fp8 = (str(tmp_path / name) for name in HUB_CONFIGS)
    mixes = [MIXES, *random_schedules(6)]
    even: list[Schedule] = [[[[6, 2]] * RANKS]]
    cases = [
        case(v3, 4, 2, EP, mixes),
        case(v3, 4, 2, SENT, mixes),
        case(v3, 4, 4, SENT, mixes),
        case(v3, 4, 4, EP, [MIXES]),
        case(v3, 4, 4, TP, [MIXES]),
        case(v3, 4, 1, SENT, [MIXES]),
        case(v3, 2, 2, SENT, [MIXES]),
        case(v3, 2, 2, TP, [MIXES]),
        case(v3, 2, 1, SENT, [MIXES]),
        case(v3, 4, 4, SENT | MOVING, [MIXES[:2]] * 5),
        case(v3, 4, 2, EP | MOVING, [MIXES[:2]] * 5),
        case(v3, 4, 1, EP | MOVING, [MIXES[:2]] * 5),
        case(lite, 4, 2, EP, [MIXES]),
        case(lite, 4, 4, SENT, even),
        case(lite, 4, 4, EP, even),
        case(fp8, 4, 2, SENT, [MIXES]),
        case(fp8, 4, 4, SENT | MOVING, [MIXES[:2]] * 2) | {"options": FP8},
        case(fp8, 4, 4, EP, [MIXES[:2]]) | {"options": FP8},
        case(v3, 4, 4, EP, [MIXES[:2]]) | {"options": BF16, "name": "bfloat16, gathered"},
        case(v3, 4, 2, SENT, [MIXES[:2]]) | {"options": BF16, "name": "bfloat16, sent"},
        case(str(DEMO), 4, 4, SENT, [MIXES]),
        case(str(DEMO), 4, 4, EP, [MIXES]),
    ]
    found, told = run_ranks(tmp_path / "world", cases)
    assert {address for rank in told for address in rank["listens on"]} == {"0100007F"}, "that is 127.0.0.1"
    check_traffic([rank[case(lite, 4, 4, EP, even)["name"]]["traffic"] for rank in told], sent=False)
    check_traffic([rank[case(lite, 4, 4, SENT, even)["name"]]["traffic"] for rank in told], sent=True)
    for one in cases:
        check(one, found)
        if one["layout"].get("balances_experts"):
            moved = [rank[one["name"]]["moved"] for rank in told]
            assert len(set(moved)) == 1
            assert moved[0] > 0, f"{one['name']}: nothing moved"


def test_dense_layers_and_heads_that_all_ranks_share(tmp_path: Path) -> None:
    for name, hub in {"v3": HUB_CONFIGS["v3"], "blocks": BLOCKS}.items():
        write_random_checkpoint(tmp_path / name, hub, seed=4)
    v3, blocks = str(tmp_path / "v3"), str(tmp_path / "blocks")
    both = DENSE | HEAD
    cases = [
        case(v3, 2, 2, TP | DENSE, [MIXES]),
        case(v3, 2, 2, TP | HEAD, [MIXES]),
        case(v3, 4, 2, EP | both, [MIXES, *random_schedules(4)]),
        case(v3, 4, 4, SENT | both, [MIXES]),
        case(v3, 4, 1, EP | both, [MIXES[:2]]),
        case(blocks, 4, 2, EP | both, [MIXES[:2]]) | {"options": FP8},
        case(blocks, 4, 4, EP | both, [MIXES]) | {"options": {"weight_format": "fp8"}},
        case(v3, 4, 4, EP | both, [MIXES[:2]]) | {"options": BF16, "name": "bfloat16"},
    ]
    found, _ = run_ranks(tmp_path / "world", cases)
    for one in cases:
        check(one, found)


@pytest.mark.parametrize("tokens", [(0, 0), (1, 0), (5, 8), (3, 3), (40, 1)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_are_all_tokens_once(tokens: tuple[int, ...], size: int) -> None:
    ranks = [token_shares(tokens, size, rank) for rank in range(2 * size)]
    for group, count in enumerate(tokens):
        shares = ranks[group * size : (group + 1) * size]
        assert shares[0].own.start == 0
        assert shares[-1].own.stop == count
        assert all(left.own.stop == right.own.start for left, right in pairwise(shares))
        assert all(share.own.stop - share.own.start <= share.width for share in shares)
        assert all(share.counts == ranks[0].counts for share in shares)
        assert [share.own.stop - share.own.start for share in shares] == list(
            ranks[0].counts[group * size : (group + 1) * size]
        )


def test_shares_are_padded_where_that_is_less_to_move() -> None:
    assert token_shares((8, 8), 1, 0).is_padded
    assert token_shares((8, 1), 1, 0).is_padded
    assert not token_shares((8, 1, 1, 1), 1, 0).is_padded
    assert token_shares((0, 0), 1, 0).is_padded
