"""The demo's evaluation with speculation: the answers are those without, and they are graded alike."""

from __future__ import annotations

import json

import pytest

from dsengine.cli_flags import UsageError
from dsengine.demo.evaluate import main

FLAGS = "--arithmetic 4 --tools 4 --others 1 --max-total-tokens 16384 --num-threads 1"
NEXTN = "--speculative-algorithm NEXTN --speculative-num-steps 3 --speculative-eagle-topk 4 --no-speculative-adaptive"


def test_drafts_change_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    main([*FLAGS.split(), *NEXTN.split()])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["speculation"] == "NEXTN 3/4/8"
    assert figures["answers as without"] == figures["answers"] == 4 + 4 + 2 * 11
    # Of an answer's tokens the first comes from the prompt, and an end within a path leaves drafts behind.
    assert figures["trees"] + figures["drafts accepted"] >= figures["tokens"] - figures["answers"]
    assert figures["steps"] < 0.7 * figures["steps without"]
    assert figures["three-digit arithmetic"] > 0.5


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="--others is 0; it must be at least 1"):
        main(["--others", "0"])
