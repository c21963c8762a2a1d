"""G17: nothing needs a network: in a namespace with loopback only, servers listen nowhere else and call nobody, and in
full all tests that run by default pass there too."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

from gate_frame import GATES_DIR, Findings, Outcome, Scale

TITLE = "everything inside a network namespace with loopback only"
TARGET = "0 outbound sockets, 0 listeners beyond loopback but the API port, all answers right; all default tests pass"
TIMEOUT_SECONDS = 900
SUITE_SECONDS = 7200
SUMMARY = re.compile(r"^(?:=+ )?(\d+ (?:passed|failed|skipped|error).*?)(?: =+)?$", re.MULTILINE)


def run(scale: Scale, seed: int) -> Outcome:
    found = Findings("G17")
    if not _has_namespaces():
        return Outcome("network namespaces are not allowed here (unshare -rn)", None)
    done = _run_inside(["servers", *(["--quick"] if scale.quick else [])], TIMEOUT_SECONDS)
    if done.returncode != 0:
        found.fail(f"the program ended with {done.returncode}: {done.stderr[-3000:]}")
        return found.outcome("the program inside failed")
    report = json.loads(done.stdout.splitlines()[-1])
    for name in ("problems", "stray_listeners", "outbound", "looked_up"):
        for problem in report[name]:
            found.fail(f"{name}: {problem}")
    suite = "" if scale.quick else f"; the tests inside: {_run_suite(found)}"
    return found.outcome(
        f"{report['num_answers']} answers of {report['num_servers']} servers right, {report['num_looks']} looks at the "
        f"sockets: {len(report['outbound'])} outbound, {len(report['looked_up'])} names looked up or hosts called, "
        f"{len(report['stray_listeners'])} stray listeners{suite}"
    )


def _run_suite(found: Findings, *selection: str) -> str:
    """Run the tests that run by default, or some of them; returns pytest's summary."""
    done = _run_inside(["suite", *selection], SUITE_SECONDS)
    summaries = SUMMARY.findall(done.stdout)
    if done.returncode != 0 or not summaries:
        found.fail(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return summaries[-1] if summaries else "no summary"


def _run_inside(arguments: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "-rn", sys.executable, str(GATES_DIR / "offline_program.py"), *arguments],
        cwd=GATES_DIR.parents[1],
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def _has_namespaces() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-rn", "true"]).returncode == 0
