"""The benchmark of speculation runs, compares with plain decoding, and draws its picture."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.specdec import main, roofline


def test_a_small_grid(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "speedup.png"
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    grid = ["--tree", "1/1/2", "2/2/4:rejection", "--batch-size", "2", "--temperature", "0", "0.7"]
    size = ["--prompts", "2", "--max-tokens", "8", "--rounds", "1", "--num-threads", "1", "--device", "cpu"]
    assert main([*grid, *size, *plot]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(c["tree"], c["temperature"]) for c in report["results"]] == [
        ("1/1/2", 0.0),
        ("2/2/4:rejection", 0.0),
        ("1/1/2", 0.7),
        ("2/2/4:rejection", 0.7),
    ]
    for cell in report["results"]:
        assert cell["same_answers"] is (None if cell["tree"].endswith("rejection") and cell["temperature"] else True)
        assert cell["speedup"] > 0 and 1 <= cell["tokens_per_tree"] <= 3
        assert sum(cell["share_of_time"].values()) == pytest.approx(1, abs=0.01)
    assert picture.exists() == bool(plot)


def test_the_roofline_of_true_shapes() -> None:
    cells = {(c["context"], c["batch_size"], c["acceptance"]): c for c in roofline("deepseek-v3")}
    # With better drafts it never gets slower, and with poor ones a few requests had better not draft deeply.
    for context in (1024, 32768):
        for batch in (1, 8, 32, 128, 512):
            speeds = [cells[context, batch, rate]["speedup"] for rate in (0.5, 0.7, 0.8, 0.9)]
            assert speeds == sorted(speeds) and speeds[-1] > 1.4
    assert cells[1024, 1, 0.5]["tree"] == "1/1/2"
