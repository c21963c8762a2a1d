"""G5: what has broken servers of this kind before, replayed against this one; incidents.py has the cases."""

from __future__ import annotations

import asyncio
import inspect

import incidents_code  # noqa: F401  (registers its replays)
import incidents_http  # noqa: F401
from gate_frame import Findings, Outcome, Scale
from incident_rig import REPLAYS, Rig

TITLE = "incidents of such servers, replayed"
TARGET = ">= 60 replays named by their CVE or row, all green"
MIN_REPLAYS = 60


def run(scale: Scale, seed: int) -> Outcome:
    found = Findings("G5")
    asyncio.run(_run(found))
    if found.num_cases < MIN_REPLAYS:
        found.fail(f"{found.num_cases} replays are less than {MIN_REPLAYS}")
    return found.outcome(f"{found.num_cases} replays, {found.num_cases - len(found.failures)} green")


async def _run(found: Findings) -> None:
    rig = Rig()
    try:
        for name, replay in REPLAYS.items():
            found.num_cases += 1
            try:
                outcome = replay(rig)
                if inspect.isawaitable(outcome):
                    await outcome
                assert not rig.engine.running, "a request is still running"
            except Exception as error:
                found.fail(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    finally:
        await rig.app.service.close()
