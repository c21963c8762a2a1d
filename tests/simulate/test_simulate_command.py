"""`dsengine plan --simulate`: a trace and a made-up load, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsengine.cli import main

PLAN = ["plan", "deepseek-v3", "--num-gpus", "8"]


def test_a_trace_is_replayed_under_both_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"arrival": i / 10, "input_len": 300, "output_len": 8, "prefix_group": i % 2, "prefix_len": 200}
        for i in range(20)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    assert main([*PLAN, "--json", "--simulate", str(trace), "--efficiency", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["layout"] for each in found["simulations"]] == ["DP8 EP8", "TP8"]
    for each in found["simulations"]:
        assert each["answered"] == 20 and each["efficiency"] == 0.5 and each["gpus"] == 8
        assert 0 < each["ttft_p50"] <= each["ttft_p99"] and 0 < each["itl_p50"] <= each["itl_p99"]
        assert 0 < each["cache_hit_rate"] < 1 and each["seconds"] > 1.9
    assert "bound" in found["remarks"][0]


def test_a_load_is_made_up_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["conversations=8", "concurrency=4", "input_len=100", "output_len=4"]
    assert main([*PLAN, "--layout", "DP2 TP4 EP8", "--routing", "least_loaded", "--simulate", *words]) == 0
    assert "DP2 TP4 EP8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--efficiency", "0.5"], "--efficiency is of use with --simulate only"),
        (["--simulate", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--simulate", "length=3"], "neither a file nor NAME=VALUE"),
        (["--simulate", "rate=1", "--efficiency", "2"], "efficiency is 2.0"),
        (["--simulate", "rate=1", "--layout", "DP3"], "no multiple"),
        (["--simulate", "rate=1", "--sampled-groups", "0"], "--sampled-groups is 0"),
        (["--simulate", "rate=1", "--lm-head-parallel", "world"], "--lm-head-parallel is world, which --simulate does"),
        (["--simulate", "rate=1", "--gpu", "a100"], "does not fit on 8 x NVIDIA A100"),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, *flags]) != 0
    assert message in capsys.readouterr().err
