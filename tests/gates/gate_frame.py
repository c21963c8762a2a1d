"""What every gate is made of: how much to run, what came of it, and the cases that once failed.

A gate is a module `gNN_name.py` beside this file with `TITLE`, `TARGET` and `run(scale, seed)`. It raises only when the
gate itself is broken; what it finds wrong is in its outcome.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

GATES_DIR = Path(__file__).parent
CORPUS_DIR = GATES_DIR.parent / "corpus"
MAX_SAVED = 10
MODULE_NAME = re.compile(r"g(\d\d)_\w+")


@dataclass(frozen=True)
class Scale:
    """How much of a gate to run.

    Attributes:
        quick: a small share, for every change; otherwise what the target says.
        openai_spec: OpenAI's `openapi.json`, where one is at hand.
    """

    quick: bool = False
    openai_spec: Path | None = None

    def of(self, full: int, quick: int) -> int:
        """A number of cases."""
        return quick if self.quick else full

    @property
    def slack(self) -> float:
        """What limits of time are multiplied with: the quick share runs on machines that do other work as well."""
        return 3.0 if self.quick else 1.0


@dataclass(frozen=True)
class Outcome:
    """What a gate reached.

    Attributes:
        reached: in one line, in the words of the target, with its counts.
        ok: None if the gate could not run here; `reached` then says why.
        details: what went wrong, one text per finding.
    """

    reached: str
    ok: bool | None
    details: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Gate:
    name: str
    title: str
    target: str
    run: Callable[[Scale, int], Outcome]

    def timed(self, scale: Scale, seed: int) -> Outcome:
        start = time.monotonic()
        return replace(self.run(scale, seed), seconds=time.monotonic() - start)


@dataclass
class Findings:
    """Counts cases and collects what went wrong; saves failing inputs where the next run replays them first."""

    gate: str
    num_cases: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures

    def fail(self, text: str, case: bytes | None = None, suffix: str = "json") -> None:
        """One finding; `case` is its input, if it can be replayed."""
        if case is not None and len(self.failures) < MAX_SAVED:
            text += f" (saved as {save_case(self.gate, case, suffix).relative_to(GATES_DIR.parents[1])})"
        self.failures.append(text)

    def outcome(self, reached: str) -> Outcome:
        return Outcome(reached, self.ok, tuple(self.failures))


def all_gates() -> dict[str, Gate]:
    """The gates by name, in order."""
    modules = sorted(path.stem for path in GATES_DIR.glob("g[0-9][0-9]_*.py"))
    return {gate.name: gate for gate in map(_gate, modules)}


def saved_cases(gate: str) -> Iterator[tuple[Path, bytes]]:
    """Inputs that once failed, to be replayed before all others."""
    for path in sorted((CORPUS_DIR / gate.lower()).glob("*")):
        yield path, path.read_bytes()


def save_case(gate: str, case: bytes, suffix: str) -> Path:
    path = CORPUS_DIR / gate.lower() / f"{hashlib.sha256(case).hexdigest()[:16]}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(case)
    return path


def _gate(name: str) -> Gate:
    match = MODULE_NAME.fullmatch(name)
    assert match is not None, f"{name} is no name of a gate"
    module: ModuleType = importlib.import_module(name)
    return Gate(f"G{int(match[1])}", module.TITLE, module.TARGET, module.run)
