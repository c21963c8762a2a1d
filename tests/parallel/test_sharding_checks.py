"""What cannot be cut is refused by name before anything is allocated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import FP8_QUANTIZATION, TINY_CONFIGS

from dsengine.config import ParallelConfig
from dsengine.model.config import ModelConfig
from dsengine.model.sharding import check_layout
from dsengine.parallel.groups import join_world
from dsengine.parallel.layout import Layout

TINY = ModelConfig.from_hub(TINY_CONFIGS["v3"])
V3 = replace(
    ModelConfig.from_hub(TINY_CONFIGS["v3"] | {"quantization_config": FP8_QUANTIZATION}),
    num_attention_heads=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
)


@pytest.mark.parametrize("experts_whole", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_v3_in_fp8_can_be_cut(size: int, experts_whole: bool) -> None:
    check_layout(V3, tp_size=size, experts_whole=experts_whole, keeps_fp8=True)


def test_v3_in_fp8_ends_at_sixteen() -> None:
    with pytest.raises(ValueError, match=r"over 32 ranks: .*intermediate_size is 2048.*multiple of 4096"):
        check_layout(V3, tp_size=32, experts_whole=False, keeps_fp8=True)
    check_layout(V3, tp_size=32, experts_whole=False, keeps_fp8=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 6}, "num_attention_heads is 6, which is not a multiple of 4"),
        (
            {"n_routed_experts": 18, "n_group": 1, "topk_group": 1},
            "n_routed_experts is 18, which is not a multiple of 4",
        ),
        ({"intermediate_size": 190}, "intermediate_size is 190, which is not a multiple of 4"),
        ({"moe_intermediate_size": 62}, "n_shared_experts · moe_intermediate_size is 62"),
    ],
)
def test_what_does_not_divide_is_named(change: dict[str, int], message: str) -> None:
    config = ModelConfig.from_hub(TINY_CONFIGS["v3"] | change)
    with pytest.raises(ValueError, match=message):
        check_layout(config, tp_size=4, experts_whole=True, keeps_fp8=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_dp_size": 3}, "attn_dp_size is 3; it must divide the number of ranks, 4"),
        ({"moe_exchange": "pipes"}, "moe_exchange is 'pipes'; expected 'gather' or 'all_to_all' or"),
        ({"experts_whole": False, "moe_exchange": "all_to_all"}, "'all_to_all', which needs whole experts"),
        ({"experts_whole": False, "moe_exchange": "deepep"}, "'deepep', which needs whole experts"),
        ({"moe_exchange": "deepep"}, "hidden_size is 128, and DeepEP's low-latency kernels know 2048, .* 8192 only"),
        ({"experts_whole": False, "redundant_experts": 4}, "redundant_experts is 4, which needs whole experts"),
        ({"redundant_experts": 3}, "n_routed_experts is 16 and redundant_experts 3, which is not a multiple of 4"),
        ({"redundant_experts": 52}, "redundant_experts is 52, and must be from 0 to 48"),
        ({"redundant_experts": -4}, "redundant_experts is -4"),
    ],
)
def test_exchanges_and_copies_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(TINY, **({"tp_size": 4, "experts_whole": True, "keeps_fp8": False} | options))


def test_groups_need_less_of_attention_than_all_ranks_would() -> None:
    with pytest.raises(ValueError, match="num_attention_heads is 4, which is not a multiple of 8"):
        check_layout(TINY, tp_size=8, experts_whole=True, keeps_fp8=False)
    check_layout(TINY, tp_size=8, attn_dp_size=2, experts_whole=True, keeps_fp8=False, redundant_experts=8)


def test_dense_layers_of_a_group_or_of_the_world() -> None:
    odd = replace(V3, intermediate_size=18432 + 128 * 8)
    check_layout(odd, tp_size=16, attn_dp_size=16, experts_whole=True, keeps_fp8=True)
    with pytest.raises(
        ValueError, match=r"in 16 groups: intermediate_size is 19456, .*be a multiple of 2048 \(weight_"
    ):
        check_layout(odd, tp_size=16, attn_dp_size=16, experts_whole=True, keeps_fp8=True, dense_over_world=True)
    check_layout(odd, tp_size=16, attn_dp_size=16, experts_whole=True, keeps_fp8=False, dense_over_world=True)


@pytest.mark.parametrize(
    ("options", "dense", "lm_head"),
    [
        ({}, "attention", "attention"),
        ({"moe_dense_tp_size": 4}, "world", "attention"),
        ({"moe_dense_tp_size": 2}, "attention", "attention"),
        ({"moe_dense_tp_size": 4, "dense_parallel": "world"}, "world", "attention"),
        ({"lm_head_parallel": "world"}, "attention", "world"),
        ({"enable_dp_lm_head": True}, "attention", "attention"),
    ],
)
def test_other_engines_names(options: dict[str, Any], dense: str, lm_head: str) -> None:
    config = ParallelConfig(tp_size=4, attn_dp_size=2, **options)
    assert (config.dense_parallel, config.lm_head_parallel) == (dense, lm_head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moe_dense_tp_size": 1}, "moe_dense_tp_size is 1; it must be tp_size, which is 4, or .* which are 2"),
        ({"moe_dense_tp_size": 2, "dense_parallel": "world"}, "dense_parallel is world; give one of them"),
        ({"enable_dp_lm_head": True, "lm_head_parallel": "world"}, "but lm_head_parallel is world"),
        ({"dense_parallel": "all"}, "dense_parallel is 'all'; it must be one of attention, world"),
        ({"lm_head_parallel": "all"}, "lm_head_parallel is 'all'; it must be one of attention, world"),
    ],
)
def test_shares_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(tp_size=4, attn_dp_size=2, **options)


def test_no_ranks() -> None:
    with pytest.raises(ValueError, match="number of ranks is 0"):
        check_layout(TINY, tp_size=0, experts_whole=False, keeps_fp8=False)


@pytest.mark.parametrize(("rank", "size", "message"), [(0, 1, "at least 2"), (2, 2, "from 0 to 1"), (-1, 2, "rank is")])
def test_impossible_worlds(tmp_path: Path, rank: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join_world(rank, size, device=torch.device("cpu"), rendezvous=tmp_path / "file", timeout_s=1)


@pytest.mark.parametrize(
    ("attn_dp_size", "rendezvous", "message"),
    [
        (3, "127.0.0.1:1", "attn_dp_size is 3; it must divide the number of ranks, 4"),
        (1, "nowhere", "the address is 'nowhere'; it must have the form HOST:PORT"),
        (1, "host:name", "the address is 'host:name'"),
    ],
)
def test_impossible_meetings(attn_dp_size: int, rendezvous: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join_world(0, 4, attn_dp_size=attn_dp_size, device=torch.device("cpu"), rendezvous=rendezvous, timeout_s=1)


def test_one_process_holds_everything() -> None:
    layout = Layout()
    assert layout.is_single
    assert layout.part(7) == slice(0, 7)
    assert layout.padded_part(7) == (slice(0, 7), 7)


class _Rank:
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_parts_of_a_vocabulary_that_does_not_divide() -> None:
    parts = [Layout(attention=_Rank(rank, 4)).padded_part(9) for rank in range(4)]  # type: ignore[arg-type]
    assert parts == [(slice(0, 3), 3), (slice(3, 6), 3), (slice(6, 9), 3), (slice(9, 9), 3)]
