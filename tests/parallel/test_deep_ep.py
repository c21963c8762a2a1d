"""The exchange over DeepEP, whose place a stand-in takes: the logits and tokens of one process, in both its modes."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_captured_groups as captured
import torch
from rank_processes import run_worker
from safetensors.torch import load_file
from test_dp_attention import BF16, DEMO, FP8, HUB_CONFIGS, MIXES, MOVING, RANKS, case, check, random_schedules
from tiny_engine import random_prompts, write_tiny_checkpoint

from dsengine import LLM, SamplingParams
from dsengine.model.random_checkpoint import write_random_checkpoint
from dsengine.parallel import deep_ep

TIMEOUT_S = 240
DEEPEP = {"experts_whole": True, "moe_exchange": "deepep"}
NORMAL = {"experts_whole": True, "moe_exchange": "deepep_normal"}
# Few tokens, so that both modes occur; identifiers as they are compiled by default.
FAKE: dict[str, Any] = {"tokens": 8, "ranks_per_node": 8, "int32": False}


def run_ranks(
    folder: Path, cases: list[dict[str, Any]], **fake: Any
) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, Any]], list[dict[str, int]]]:
    """What each rank answered, told of each case, and called of DeepEP."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "fake.json").write_text(json.dumps(FAKE | fake))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    run_worker("deep_ep_worker.py", RANKS, folder, address, helpers=["model", "engine"], timeout_s=TIMEOUT_S)
    answers = [load_file(folder / f"rank{rank}.safetensors") for rank in range(RANKS)]
    told, calls = (
        [json.loads((folder / f"{name}{r}.json").read_text()) for r in range(RANKS)] for name in ("rank", "fake")
    )
    return answers, told, calls


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, hub in HUB_CONFIGS.items():
        write_random_checkpoint(folder / name, hub, seed=4)
    return {name: str(folder / name) for name in HUB_CONFIGS} | {"demo": str(DEMO)}


def test_groups_answer_as_the_whole_model(tmp_path: Path, checkpoints: dict[str, str]) -> None:
    v3, lite, fp8 = (checkpoints[name] for name in ("v3", "v2_lite", "v3_fp8"))
    cases = [
        case(v3, 4, 4, DEEPEP, [MIXES, *random_schedules(4)]),
        case(v3, 4, 2, DEEPEP, [MIXES]),
        case(v3, 4, 1, DEEPEP, [MIXES]),
        case(v3, 2, 2, DEEPEP, [MIXES]),
        case(v3, 4, 4, NORMAL, [MIXES]),
        case(v3, 4, 2, DEEPEP | MOVING, [MIXES[:2], MIXES[2:]] * 2),
        case(lite, 4, 4, DEEPEP, [MIXES]),
        case(fp8, 4, 4, DEEPEP | MOVING, [MIXES[:2]]) | {"options": FP8},
        case(fp8, 4, 4, NORMAL, [MIXES[:2]]) | {"options": FP8},
        case(v3, 4, 4, DEEPEP, [MIXES[:3]]) | {"options": BF16, "name": "bfloat16"},
        case(checkpoints["demo"], 4, 4, DEEPEP, [MIXES]),
    ]
    found, told, calls = run_ranks(tmp_path / "world", cases)
    for one in cases:
        check(one, found)
        if one["layout"].get("balances_experts"):
            assert all(rank[one["name"]]["moved"] > 0 for rank in told)
    assert all(count["normal"] > 30 and count["low latency"] > 30 and count["clean"] > 5 for count in calls)


def test_between_nodes_and_with_short_identifiers(tmp_path: Path, checkpoints: dict[str, str]) -> None:
    cases = [case(checkpoints["v3"], 4, 2, DEEPEP, [MIXES]), case(checkpoints["v3"], 4, 4, NORMAL, [MIXES[:2]])]
    found, _, _ = run_ranks(tmp_path / "world", cases, ranks_per_node=2, int32=True)
    for one in cases:
        check(one, found)


def run_with_stand_in(worker: str, count: int, folder: Path, *, helpers: Sequence[str], timeout_s: float) -> None:
    """`run_worker`, in processes where the stand-in is DeepEP."""
    (folder / "fake.json").write_text(json.dumps(FAKE))
    run_worker("deep_ep_worker.py", count, folder, helpers=[*helpers, "model"], timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, captured.TREES),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(4, captured.MOVING | captured.SHARED, marks=pytest.mark.slow),
    ],
    ids=["trees", "plain", "experts move and all ranks share dense layers"],
)
def test_steps_of_few_tokens_are_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(captured, "run_worker", run_with_stand_in)
    checkpoint = write_tiny_checkpoint(tmp_path / "random-v3")
    prompts = random_prompts(5, longest=captured.LONGEST)
    params = SamplingParams(temperature=0, max_tokens=captured.OUTPUT_LENGTH, ignore_eos=True)
    with LLM(str(checkpoint), block_size=8, context_length=96, num_threads=1, progress=False) as llm:
        alone = [llm.generate(prompt_token_ids=p, sampling_params=params)[0].outputs[0].token_ids for p in prompts]
    bench = captured.Bench(tmp_path, checkpoint, prompts, alone)
    scripts = [captured.SCRIPT, *captured.random_scripts(6, 2, len(prompts))]
    told = bench.run(
        scripts,
        tp_size=ranks,
        attn_dp_size=2,
        ep_size=ranks,
        moe_exchange="deepep",
        cuda_graph_bs=(1, 2, 4, 6),
        **options,
    )
    assert all(each["sizes"] == [1, 2, 4, 6] for each in told)
    assert len(captured.replays(told)) > 2 and -1 in captured.replays(told)


def library(**changes: Any) -> SimpleNamespace:
    class Buffer:
        num_sms = 20

        def __init__(self, group: object, *sizes: int, comm: object = None, **options: object) -> None:
            raise RuntimeError("no network")

        @staticmethod
        def get_low_latency_rdma_size_hint(tokens: int, hidden: int, ranks: int, experts: int) -> int:
            return 4 * experts * tokens * (2 * hidden + hidden // 32)

        @staticmethod
        def get_dispatch_config(ranks: int) -> SimpleNamespace:
            def size(hidden_bytes: int, ranks: int) -> int:
                return 128 * hidden_bytes

            return SimpleNamespace(get_nvl_buffer_size_hint=size, get_rdma_buffer_size_hint=size)

        get_combine_config = get_dispatch_config

    return SimpleNamespace(**({"Buffer": Buffer} | changes))


class Ranks:
    """Of a group that is never spoken to."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_device_or_type_that_it_does_not_move_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", library())
    deep_ep.check_usable(CUDA, torch.bfloat16)
    with pytest.raises(ValueError, match="the device is cpu; use --moe-exchange all_to_all"):
        deep_ep.check_usable(CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="dtype is float32, but DeepEP adds up bfloat16 only"):
        deep_ep.check_usable(CUDA, torch.float32)


def test_a_package_that_is_missing_broken_or_would_pickle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(ValueError, match=r"deep_ep, which does not import \(ModuleNotFoundError: .*all_to_all"):
        deep_ep.check_usable(CUDA, torch.bfloat16)

    class Old:
        def __init__(self, group: object, num_nvl_bytes: int = 0) -> None: ...

    monkeypatch.setitem(sys.modules, "deep_ep", library(Buffer=Old))
    with pytest.raises(ValueError, match=r"is too old: its Buffer takes no communicator.*1\.2\.1 or later"):
        deep_ep.load_deep_ep()


@pytest.mark.parametrize(("ranks", "experts", "tokens"), [(8, 256, 128), (8, 384, 128), (16, 288, 128), (32, 384, 64)])
def test_the_buffer_between_nodes_stays_below_what_normal_kernels_address(
    monkeypatch: pytest.MonkeyPatch, ranks: int, experts: int, tokens: int
) -> None:
    """V3 with and without 32 copies; Kimi-K2 has room for half the tokens."""
    monkeypatch.setitem(sys.modules, "deep_ep", library())
    link = deep_ep.DeepEp(Ranks(ranks), low_latency=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"DeepEP cannot connect {ranks} ranks: no network"):
        link.open(7168, experts, CUDA)
    assert link.low_latency_tokens == tokens


def test_numbers_that_the_kernels_do_not_have_are_named() -> None:
    assert list(deep_ep.find_problems(7168, 8, 96, low_latency=True)) == []
    assert list(deep_ep.find_problems(1024, 12, 8, low_latency=False)) == []
    problems = list(deep_ep.find_problems(1024, 12, 12, low_latency=True))
    assert [problem.split(",")[0] for problem in problems] == [
        "DeepEP is compiled for 2",
        "hidden_size is 1024",
        "num_experts_per_tok is 12",
    ]
