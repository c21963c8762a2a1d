"""Everything worth knowing of a GPU that is at hand for ten minutes: are the kernels right, how fast, and a whole step?

    python -m benchmarks.gpu --out results/            in the order of worth: tests, kernels, a rank's steps, the rest
    python -m benchmarks.gpu --out results/            again: only what is missing or was cut off
    python -m benchmarks.gpu --out results/ --sections tests kernels --seconds 300
    python -m benchmarks.gpu --out results/ --device cpu --tiny --sections rank_step      a rehearsal

Each section runs in a process of its own with a time limit, so that a kernel that hangs or breaks the device's context
costs its own section only; what it had measured by then is kept. Writes OUT/<section>.json, ends with one line of JSON.
Exit status: 0 all sections passed, 1 one did not (or is missing), 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TAIL = 6000  # characters of a section's output that are kept


@dataclass(frozen=True)
class Section:
    """One program.

    Attributes:
        words: of its command line, after `python -m`.
        limit: seconds after which it is ended.
        is_benchmark: takes --device, --tiny and --out, and writes JSON; otherwise it is pytest.
    """

    name: str
    words: tuple[str, ...]
    limit: float
    is_benchmark: bool = True


# Every test is named as it starts: a kernel that hangs must leave its name behind.
_TESTS = (
    "pytest",
    "-v",
    "-rfE",
    "--tb=line",
    "-m",
    "not slow",
    "-p",
    "no:cacheprovider",
    "-o",
    "faulthandler_timeout=60",
    "-o",
    "addopts=",  # what they hold is for machines without a GPU
)
# What tests the interpreter or compiles for other GPUs tells nothing of this one.
_NOT_HERE = ("--ignore=tests/kernels/test_binaries.py", "--ignore=tests/kernels/test_triton_interpreter.py")

SECTIONS: tuple[Section, ...] = (
    Section("tests", (*_TESTS, *_NOT_HERE, "tests/kernels"), 160, is_benchmark=False),
    Section(
        "kernels",
        ("benchmarks.kernels", "--sections", "machine", "moe", "mla_decode", "gemm", "--seconds", "60"),
        210,
    ),
    Section("rank_step", ("benchmarks.rank_step", "--shares", "TP8", "EP32", "--seconds", "60"), 130),
    Section("speculative_step", ("benchmarks.speculative_step", "--batch", "1", "8", "--seconds", "60"), 90),
    Section(
        "kernels_rest", ("benchmarks.kernels", "--sections", "small", "mla_prefill", "bf16", "--seconds", "25"), 80
    ),
    Section("v2_lite", ("benchmarks.v2_lite", "--seconds", "30"), 70),
    Section("rank_step_ep8", ("benchmarks.rank_step", "--shares", "EP8", "--seconds", "60"), 80),
)


def command(section: Section, result: Path, device: str, tiny: bool) -> list[str]:
    """The command line of a section; `result` is where a benchmark writes."""
    words = [sys.executable, "-m", *section.words]
    if section.is_benchmark:
        return [*words, "--device", device, *(["--tiny"] if tiny else []), "--out", str(result)]
    return [*words[:-1], "tests/kernels/test_fp8.py"] if tiny else words


def run_section(section: Section, limit: float, device: str, tiny: bool) -> dict[str, Any]:
    """Runs a section to its end or its limit; returns all there is to keep."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        log = Path(folder) / "log"
        words = command(section, result, device, tiny)
        started = time.monotonic()
        with log.open("wb") as output:
            returncode = _run(words, output.fileno(), limit)
        text = log.read_text(encoding="utf-8", errors="replace")
        seconds = time.monotonic() - started
        measured = json.loads(result.read_text()) if result.exists() else None
    if not section.is_benchmark:
        measured = read_pytest(text)
    return {
        "section": section.name,
        "command": ["python", *words[1:]],
        "returncode": returncode,
        "timed_out": returncode is None,
        "seconds": round(seconds, 1),
        "result": measured,
        "output_tail": text[-TAIL:],
    }


def _run(words: Sequence[str], output: int, limit: float) -> int | None:
    """Exit status, or None where the limit ended it; nothing that it started survives."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(timeout=max(1.0, limit))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read_pytest(text: str) -> dict[str, Any]:
    """Counts and the names of what failed, from pytest's summary."""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", text)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, flags=re.MULTILINE)
    return {"counts": counts, "failed": failed}


def is_complete(path: Path) -> bool:
    """Whether a section's result is there and was not cut off."""
    if not path.exists():
        return False
    kept = json.loads(path.read_text(encoding="utf-8"))
    has_failed_tests = kept["section"] == "tests" and kept["returncode"] == 1  # which is a result, too
    return bool(kept["returncode"] == 0 or has_failed_tests)


def has_gpu() -> bool:
    """Asked of torch in another process: this one must not hold the device."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    names = [section.name for section in SECTIONS]
    parser.add_argument("--sections", nargs="+", choices=names, default=names)
    parser.add_argument("--seconds", type=float, default=540, help="for all sections together [540]")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a rehearsal")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("on a CPU only --tiny makes sense")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.device != "cpu" and not has_gpu():
        print("there is no GPU here; --device cpu --tiny rehearses without one", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    status: dict[str, str] = {}
    for section in SECTIONS:
        if section.name not in arguments.sections:
            continue
        path = arguments.out / f"{section.name}.json"
        left = end - time.monotonic()
        if is_complete(path):
            status[section.name] = "there already"
        elif left < 5:
            status[section.name] = "out of time"
        else:
            print(f"{section.name}: up to {min(section.limit, left):.0f} s", flush=True)
            kept = run_section(section, min(section.limit, left), arguments.device, arguments.tiny)
            path.write_text(json.dumps(kept), encoding="utf-8")
            status[section.name] = describe(kept)
            print(f"{section.name}: {status[section.name]}", flush=True)
    print(json.dumps({"benchmark": "gpu", "out": str(arguments.out), "sections": status}))
    return 0 if all(word in ("passed", "there already") for word in status.values()) else 1


def describe(kept: dict[str, Any]) -> str:
    """One word, or a few, on how a section ended."""
    if kept["timed_out"]:
        return f"cut off after {kept['seconds']} s"
    return "passed" if kept["returncode"] == 0 else f"exit status {kept['returncode']}"


if __name__ == "__main__":
    sys.exit(main())
