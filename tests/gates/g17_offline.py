"""G17: serving needs no network: in a namespace with loopback only, nothing listens elsewhere and nothing calls out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

from gate_frame import GATES_DIR, Findings, Outcome, Scale

TITLE = "everything inside a network namespace with loopback only"
TARGET = "0 outbound sockets, 0 listeners beyond loopback but the API port; all answers right"
TIMEOUT_SECONDS = 900


def run(scale: Scale, seed: int) -> Outcome:
    found = Findings("G17")
    if not _has_namespaces():
        return Outcome("network namespaces are not allowed here (unshare -rn)", None)
    inside = [sys.executable, str(GATES_DIR / "offline_program.py"), *(["--quick"] if scale.quick else [])]
    done = subprocess.run(
        ["unshare", "-rn", *inside],
        cwd=GATES_DIR.parents[1],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    if done.returncode != 0:
        found.fail(f"the program ended with {done.returncode}: {done.stderr[-3000:]}")
        return found.outcome("the program inside failed")
    report = json.loads(done.stdout.splitlines()[-1])
    for name in ("problems", "stray_listeners", "outbound", "looked_up"):
        for problem in report[name]:
            found.fail(f"{name}: {problem}")
    return found.outcome(
        f"{report['num_answers']} answers of {report['num_servers']} servers right, {report['num_looks']} looks at the "
        f"sockets: {len(report['outbound'])} outbound, {len(report['looked_up'])} names looked up or hosts called, "
        f"{len(report['stray_listeners'])} stray listeners"
    )


def _has_namespaces() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-rn", "true"]).returncode == 0
