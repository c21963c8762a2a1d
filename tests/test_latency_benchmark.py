"""The benchmark of latency targets on a tiny model: every request is answered, and what it prints is one JSON line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_engine import write_tiny_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency_targets import main

LOAD = "--streams 2 --stream-len 10 --prompt-len 150 --prompt-rate 8 --seconds 0.6 --warm-up 0.2 --rounds 1"


def test_settings_take_turns_on_the_clock_of_the_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path)
    main(["--model", str(checkpoint), "--processor-time", "--target", "none", "5:2000", *LOAD.split(), "--"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    free, bound = result["results"]
    assert free["target"] == "none" and free["late"] is None and set(free["ratios"].values()) == {1.0}
    assert bound["target"] == "5:2000" and 0 <= bound["late"] <= 1
    for row in (free, bound):
        assert 0 < row["itl_p50"] <= row["itl_p90"] <= row["itl_p99"] <= row["itl_max"]
        assert row["ttft_p50"] > 0 and row["prompt_tokens_per_s"] > 0 and row["tokens_per_chunk"] == 1


def test_bad_targets_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--target", "none", "40:"])
    assert "--target is 40:; it must be none, milliseconds, or two" in capsys.readouterr().err
