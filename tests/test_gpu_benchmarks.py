"""The GPU benchmarks without a GPU: published figures against physics, the arithmetic of timing, and rehearsals."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import anchors, gpu, kernels, rank_step, speculative_step, v2_lite  # noqa: E402
from benchmarks.gpu_data import (  # noqa: E402
    fp8_weight,
    num_copies,
    received_ids,
    routing_weights,
    uniform_ids,
)
from benchmarks.gpu_timing import Budget, Timing, WallTimer, calls_to_capture, make_timer  # noqa: E402
from benchmarks.kernels import SECTIONS, Row, backends_of, make_row, measure_problem, report  # noqa: E402
from benchmarks.problems.base import EP8, EP32, TP1, TP8, Problem, Setup, gpu_named, make_setup, tiny_v3  # noqa: E402
from benchmarks.problems.small import SMALL  # noqa: E402
from benchmarks.random_model import SyntheticRouting, decode_batch, share_config  # noqa: E402
from dsengine.kernels.gemm_fp8_block.api import GEMM_FP8_BLOCK  # noqa: E402
from dsengine.kernels.registry import OPERATIONS, select_kernels  # noqa: E402
from dsengine.model.config import ModelConfig  # noqa: E402
from dsengine.plan.builtin import DEEPSEEK_V3  # noqa: E402
from dsengine.plan.hardware import GPUS  # noqa: E402
from dsengine.plan.layout import Layout  # noqa: E402
from dsengine.plan.memory import weigh  # noqa: E402
from dsengine.plan.roofline import Work  # noqa: E402
from dsengine.plan.source import PlannedModel, find_model  # noqa: E402

CPU = torch.device("cpu")
H200 = GPUS["h200"]


@pytest.fixture(scope="module")
def true_shapes() -> Setup:
    """V3 on an H200, described but not prepared."""
    return Setup(CPU, select_kernels(CPU), ModelConfig.from_hub(DEEPSEEK_V3), H200, tiny=False)


# Published figures


def test_published_products_are_physically_possible():
    """No figure reads its weight above 4.8 TB/s or computes above 1979 (FP8) or 989 (bf16) TFLOP/s: the data sheet."""
    checked = 0
    for (op, _, variant, tokens, _), published in anchors.read_anchors().items():
        found = re.fullmatch(r"N(\d+) K(\d+) (\w+)", variant) if op == "gemm" else None
        if found:
            rows, columns, is_bf16 = int(found[1]), int(found[2]), found[3] == "bfloat16"
            seconds = min(published.values()) / 1e6
            assert rows * columns * (2 if is_bf16 else 1) / seconds < 4.8e12, variant
            assert 2 * rows * columns * tokens / seconds < (989e12 if is_bf16 else 1979e12), variant
            checked += 1
    assert checked > 500


def test_published_figures_are_found():
    assert min(anchors.linear(7168, 16384, 64, "fp8_block").values()) == pytest.approx(35.9, abs=0.1)
    assert anchors.linear(2112, 7168, 1, "fp8_block") == anchors.linear(2048, 7168, 1, "fp8_block")
    assert set(anchors.experts(EP32, 128)) == {"vllm 0.14.0", "trtllm 1.3.0rc20", "sglang 0.5.10 DeepGEMM masked"}
    assert anchors.experts(TP1, 32)["trtllm 1.3.0rc20"] == pytest.approx(2644, abs=1)
    assert anchors.experts(TP8, 8)["sglang 0.5.10"] == pytest.approx(148, abs=1)
    assert min(anchors.mla_decode(128, 64, 4096, False).values()) == pytest.approx(130, abs=1)
    assert min(anchors.mla_prefill(128, 1, 16384).values()) == pytest.approx(15500, rel=0.01)
    assert min(anchors.absorbed("w_uk", 128, 1).values()) < 10
    assert anchors.linear(1, 2, 3, "fp8_block") == {} and anchors.experts(EP8, 12345) == {}


def test_no_published_figure_beats_its_roofline(true_shapes):
    """Rooflines and published figures come from different places: a wrong shape on either side shows here."""
    fractions = []
    for section, problems in SECTIONS.items():
        for problem in problems(true_shapes):
            for size in problem.sizes:
                work, published = problem.work(size), problem.published(size)
                if work is not None and published and section != "small":
                    fractions.append((work.seconds(H200) * 1e6 / min(published.values()), problem.name, size))
    assert len(fractions) > 150
    # Kernels that only read pass the bandwidth of a copy by a few per cent, and 2048 rows stand for 2112.
    assert max(fractions)[0] < 1.08, max(fractions)
    assert max(fractions)[0] > 0.9


def test_problems_have_names_of_their_own(true_shapes):
    names = [(p.section, p.name) for problems in SECTIONS.values() for p in problems(true_shapes)]
    assert len(names) == len(set(names)) > 60


def test_every_operation_is_measured(true_shapes):
    measured = {p.operation.name for make in SECTIONS.values() for p in make(true_shapes) if p.operation is not None}
    known = {operation.name for operation in OPERATIONS}
    assert measured == known
    assert len({small.name for small in SMALL}) == len(SMALL)


def test_gpus_are_known_by_their_drivers_names():
    assert gpu_named("NVIDIA H200") is H200 and gpu_named("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert gpu_named("NVIDIA H100 80GB HBM3") is GPUS["h100"] and gpu_named("NVIDIA GH200 480GB") is None


# Data


def test_copies_exceed_l2():
    assert num_copies(300 << 20) == 2 and num_copies(7168 * 2112) * 7168 * 2112 >= 240 << 20
    assert num_copies(1) == 128


def test_random_weights_are_random_everywhere():
    weight, scale = fp8_weight(2, 130, 256, device=CPU)
    assert weight.shape == (2, 130, 256) and scale.shape == (2, 2, 2) and weight.dtype == torch.float8_e4m3fn
    values = weight.float()
    assert values.isfinite().all() and 90 < values.std() < 130 and scale.unique().numel() == scale.numel()


def test_uniform_routing_and_what_a_rank_receives():
    torch.manual_seed(0)
    ids = uniform_ids(512, 16, 4, CPU)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    counts = ids.flatten().bincount(minlength=16)
    assert counts.min() > 90 and counts.max() < 170  # 128 each in the mean
    local = received_ids(ids, 4)
    assert local.max() == 3 and local.min() == -1 and bool((local >= 0).any(dim=1).all())
    assert 0.6 < local.shape[0] / 512 < 0.85  # 1 - C(12,4)/C(16,4) = 0.73
    assert (received_ids(torch.tensor([[5, 6]]), 2) >= 0).sum() == 1
    assert routing_weights(ids).sum(dim=1).allclose(torch.tensor(2.5))


# Timing


def test_a_graph_holds_every_copy_and_lasts_two_milliseconds():
    assert calls_to_capture(1e-3, copies=2) == 2
    assert calls_to_capture(10e-6, copies=7) == 203
    assert calls_to_capture(1e-6, copies=100) == 600 and calls_to_capture(1.0, copies=6) == 6


def test_the_wall_timer_times_each_copy():
    seen: list[int] = []
    timing = WallTimer().time([lambda i=i: seen.append(i) for i in range(3)])  # type: ignore[misc]
    assert seen == [0, 1, 2] * 2 and timing.how == "wall" and timing.calls == 3
    assert isinstance(make_timer(CPU), WallTimer)


def test_budgets_end():
    now = [0.0]
    budget = Budget(5, clock=lambda: now[0])
    assert not budget.is_spent
    now[0] = 5.0
    assert budget.is_spent


class FixedTimer:
    """Runs nothing and knows the answer."""

    def time(self, calls: object) -> Timing:
        return Timing(50e-6, "graph", 1, 1)


def test_rows_stand_beside_roofline_and_the_best_published_figure(true_shapes):
    problem = Problem(
        "gemm", "p", GEMM_FP8_BLOCK, (1,), lambda: lambda size: [], lambda size: Work("w", 4.3e12 * 25e-6, 0),
        lambda size: {"a": 45.0, "b": 40.0},
    )  # fmt: skip
    [row] = measure_problem(problem, (1,), true_shapes, FixedTimer(), Budget(60), ["ref"])
    assert row == Row("gemm", "p", 1, "ref", 50.0, "graph", 25.0, 0.5, 40.0, "b")
    unknown = make_row(problem, 1, "ref", Timing(1e-3, "wall", 1, 1), make_setup(CPU, tiny=True))
    assert unknown.roof_us is None and unknown.published_us is None
    assert list(measure_problem(problem, (1,), true_shapes, FixedTimer(), Budget(0), ["ref"])) == []


def test_a_failure_is_a_row(true_shapes):
    def fail() -> None:
        raise RuntimeError("out of\nmemory")

    problem = Problem("gemm", "p", GEMM_FP8_BLOCK, (1,), fail, lambda size: None)  # type: ignore[arg-type]
    [row] = measure_problem(problem, (1,), true_shapes, FixedTimer(), Budget(60), [])
    assert row.us is None and row.error == "RuntimeError: out of"
    assert report(CPU, [row], [], 1.0)["rows"] == [{"section": "gemm", "name": "p", "size": 0, "error": row.error}]


def test_backends_are_those_that_run_here():
    assert set(backends_of(GEMM_FP8_BLOCK, CPU, [])) == {"cpu", "ref"}
    assert set(backends_of(GEMM_FP8_BLOCK, CPU, ["ref"])) == {"ref"}
    assert backends_of(None, CPU, []) == {"torch": None} and backends_of(None, CPU, ["triton"]) == {}


# Rehearsals


def test_kernels_rehearse_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    assert kernels.main(["--device", "cpu", "--tiny", "--backend", "ref", "torch", "--out", str(out)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not [row for row in summary["rows"] if "error" in row]
    assert {row["section"] for row in summary["rows"]} == set(SECTIONS)
    assert json.loads(out.read_text())["rows"] == summary["rows"]


def test_a_ranks_step_rehearses_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "step.json"
    assert rank_step.main(["--device", "cpu", "--tiny", "--out", str(out)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    steps = {(step["share"], step["batch"]): step for step in summary["steps"]}
    assert set(steps) == {(share, batch) for share in ("TP8", "EP32", "EP8") for batch in (1, 3)}
    assert all(step["step_ms"] > 0 and step["fraction"] is None for step in steps.values())
    assert json.loads(out.read_text())["steps"] == summary["steps"]
    assert rank_step.main(["--device", "cpu", "--tiny", "--shares", "TP1", "--batch", "1000"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_speculative_steps_rehearse_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "steps.json"
    words = ["--device", "cpu", "--tiny", "--batch", "2", "--tree", "2/2/5", "--repeats", "1", "--out", str(out)]
    assert speculative_step.main(words) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(s["tree"], s["captured"]) for s in summary["steps"]] == [
        ("none", True),
        ("none", False),
        ("2/2/5", True),
        ("2/2/5", False),
    ]
    assert all(s["step_ms"] > 0 and s["parts_ms"]["catch up"] > 0 for s in summary["steps"])
    assert summary["steps"][2]["parts_ms"]["draft"] > 0 and json.loads(out.read_text())["steps"] == summary["steps"]


def test_a_share_is_what_the_plan_counts():
    """Bytes of a rank's weights as the benchmark builds them, against the plan's share."""
    config = ModelConfig.from_hub(tiny_v3())
    for layout in (Layout(2, 1, "tp"), Layout(1, 4, "ep")):
        share = share_config(config, layout)
        planned = weigh(PlannedModel("", "", config), H200).bytes_per_rank(layout)
        alone = weigh(PlannedModel("", "", share), H200).bytes_per_rank(TP1)
        routers = sum(
            part.loaded_bytes for part in weigh(PlannedModel("", "", config), H200).parts if part.name == "routers"
        )
        assert alone == pytest.approx(planned, abs=routers)
    with pytest.raises(ValueError, match="attention TP or EP alone"):
        share_config(config, Layout(2, 1, "ep"))


def test_a_step_stands_beside_what_is_published():
    config = ModelConfig.from_hub(DEEPSEEK_V3)
    step = rank_step.judge("EP32", config, EP32, 128, 4096, H200, (25e-3, 500e-6, "graph"))
    assert step.step_roof_ms == pytest.approx(21.3, abs=0.1) and step.layer_roof_us == pytest.approx(342, abs=1)
    assert (step.layer_published_us, step.communication_us) == (536, 406)
    assert step.fraction == pytest.approx(21.3 / 25, abs=0.01)
    assert rank_step.judge("EP32", config, EP32, 128, 32768, H200, (1, 1, "graph")).layer_published_us is None
    assert rank_step.judge("EP32", config, EP32, 128, 4096, None, (1, 1, "graph")).fraction is None


def test_synthetic_routing_is_uniform_whatever_the_router_says():
    config = ModelConfig.from_hub(tiny_v3())
    routing = SyntheticRouting(select_kernels(CPU), config, TP1, CPU)
    routing.prepare(64)
    logits = torch.zeros(64, config.n_routed_experts)
    weights, ids = routing.kernels.moe_route(
        logits, method="noaux_tc", scoring="sigmoid", top_k=2, n_group=2, topk_group=1
    )
    assert ids.flatten().bincount(minlength=8).min() > 4 and weights.shape == (64, 2)


def test_decode_batches_have_blocks_of_their_own():
    batch = decode_batch(3, 65, num_blocks=9, block_size=32, device=CPU)
    assert batch.block_table.flatten().unique().numel() == 9 and batch.num_decodes == 3
    assert batch.slot_mapping.tolist() == [32 * block for block in batch.block_table[:, 2].tolist()]
    with pytest.raises(ValueError, match="need 9 blocks, not 7"):
        decode_batch(3, 65, num_blocks=7, block_size=32, device=CPU)


def test_v2_lite_rehearses_on_a_cpu(capsys):
    assert v2_lite.main(["--device", "cpu", "--tiny"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(summary["speeds"]) == 8 and all(speed["tokens_per_s"] > 0 for speed in summary["speeds"])
    config = find_model("deepseek-v2-lite").config
    assert 1e-2 < v2_lite.prefill_seconds(config, H200, 1, 4096) < 5e-2  # 2.4 B active · 2 · 4096 / 790 TFLOP/s = 25 ms


def test_all_of_it_rehearses_on_a_cpu_and_resumes(tmp_path, capsys):
    words = ["--out", str(tmp_path), "--device", "cpu", "--tiny", "--sections", "rank_step", "tests"]
    assert gpu.main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sections"] == {
        "tests": "passed",
        "rank_step": "passed",
    }
    tests, step = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("tests", "rank_step"))
    assert tests["result"]["counts"]["passed"] > 0 and tests["result"]["failed"] == []
    assert {row["share"] for row in step["result"]["steps"]} == {"TP8", "EP32"}
    (tmp_path / "rank_step.json").write_text(json.dumps(step | {"timed_out": True, "returncode": None}))
    assert gpu.main([*words, "--seconds", "0"]) == 1
    again = json.loads(capsys.readouterr().out.splitlines()[-1])["sections"]
    assert again == {"tests": "there already", "rank_step": "out of time"}


def test_a_section_that_hangs_is_ended_and_one_that_fails_is_told(tmp_path):
    hanging = gpu.Section(
        "hang", ("timeit", "-n1", "-r1", "import time; print('started', flush=True); time.sleep(60)"), 1, False
    )
    kept = gpu.run_section(hanging, 3, "cpu", tiny=False)
    assert kept["timed_out"] and kept["returncode"] is None and kept["seconds"] < 30
    assert gpu.describe(kept).startswith("cut off after") and kept["output_tail"].startswith("started")
    failing = gpu.run_section(gpu.Section("fail", ("no_such_module_here",), 30, False), 30, "cpu", tiny=False)
    assert failing["returncode"] == 1 and gpu.describe(failing) == "exit status 1"


def test_pytests_summary_is_read():
    text = "..F\nFAILED tests/a.py::b - boom\nERROR tests/c.py\n1 failed, 12 passed, 3 skipped, 1 error in 2.1s\n"
    assert gpu.read_pytest(text) == {
        "counts": {"failed": 1, "passed": 12, "skipped": 3, "error": 1},
        "failed": ["tests/a.py::b", "tests/c.py"],
    }


def test_sections_fit_into_ten_minutes_by_their_worth():
    assert [section.name for section in gpu.SECTIONS][:3] == ["tests", "kernels", "rank_step"]
    assert sum(section.limit for section in gpu.SECTIONS[:3]) <= gpu.parse(["--out", "x"]).seconds < 600
    for section in gpu.SECTIONS:
        for word in section.words:
            assert not word.startswith("--ignore=") or (ROOT / word.removeprefix("--ignore=")).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2 and "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("program", [kernels, rank_step, speculative_step, v2_lite])
def test_without_a_gpu_the_programs_say_so(program, capsys):
    assert program.main([]) == 2 and "no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.main(["--device", "cpu"])
