"""G1: schemathesis against the OpenAPI document that the server publishes, every operation."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from asgi_calls import tokenizer
from gate_frame import GATES_DIR, Findings, Outcome, Scale
from server_helpers import ScriptedEngine, make_app
from threaded_server import served

TITLE = "schemathesis on the published OpenAPI document"
TARGET = ">= 10,000 cases, positive, negative, coverage, NUL allowed: 0 x 5xx, 0 schema mismatches"
# A schema cannot say which fields contradict each other; schemathesis_checks.py has the part of it that it can say.
REPLACED_CHECK = "positive_data_acceptance"
TIMEOUT_SECONDS = 3600
NUM_CASES = re.compile(r"(\d+) generated")
# What went wrong, up to the request that shows it.
FINDING = re.compile(r"^- (ST\d+ .*?(?:curl .{0,400}|$(?=\n___)))", re.S | re.M)
# What is too large for its schema may also be too large for this server.
CONFIG = """
[checks]
negative_data_rejection.expected-statuses = ["400", "404", "405", "413", "415"]
"""


def run(scale: Scale, seed: int) -> Outcome:
    found = Findings("G1")
    engine = ScriptedEngine(tokenizer(), "Well.", tokens_per_update=8)
    engine.config = dataclasses.replace(engine.config, max_running_requests=128, max_queued_requests=1024)
    with tempfile.TemporaryDirectory() as folder, served(make_app(engine)) as url:
        Path(folder, "schemathesis.toml").write_text(CONFIG)
        done = subprocess.run(
            _command(url, seed, scale),
            env=os.environ | {"SCHEMATHESIS_HOOKS": str(GATES_DIR / "schemathesis_checks.py"), "NO_COLOR": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    text = done.stdout + done.stderr
    cases = NUM_CASES.search(text)
    if cases is None or done.returncode != 0:
        for finding in FINDING.findall(text) or [text[-3000:]]:
            found.fail(" ".join(finding.split())[:1000])
    else:
        found.num_cases = int(cases[1])
    server_errors = text.count("Server error")
    wanted = scale.of(10_000, 100)
    if found.num_cases < wanted:
        found.fail(f"{found.num_cases} cases are less than {wanted}")
    return found.outcome(
        f"{found.num_cases:,} cases: {server_errors} x 5xx, "
        f"{'no mismatch' if done.returncode == 0 else 'mismatches as below'}"
    )


def _command(url: str, seed: int, scale: Scale) -> list[str]:
    phases = "fuzzing" if scale.quick else "examples,coverage,fuzzing"
    return [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--mode", "all", "--phases", phases, "--checks", "all", "--exclude-checks", REPLACED_CHECK),
        *("--max-examples", str(scale.of(780, 12)), "--seed", str(seed), "--generation-allow-x00", "true"),
        *("--generation-database", "none", "--suppress-health-check", "all", "--continue-on-failure", "--no-shrink"),
        *("--output-sanitize", "false", "--output-truncate", "true", "--warnings", "off", "--request-timeout", "60"),
    ]
