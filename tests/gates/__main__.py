"""The hardening gates: `python -m tests.gates [G1 G3 …] [--quick]`.

Prints one line per gate, with its target and what was reached, and exits with 1 if one of them failed. Inputs that
failed are saved in tests/corpus and replayed first from then on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / name) for name in ("gates", "server", "engine", "model")]

from gate_frame import Outcome, Scale, all_gates  # noqa: E402

WORDS = {True: "ok", False: "FAILED", None: "not run"}
SHOWN_FINDINGS = 20


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gates", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as G3; default: all")
    parser.add_argument("--quick", action="store_true", help="a small share of each, as in every run of the tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--openai-spec",
        type=Path,
        default=_spec_of_environment(),
        metavar="FILE",
        help="openapi.json of github.com/openai/openai-openapi; default: $OPENAI_OPENAPI_JSON",
    )
    args = parser.parse_args()
    gates = all_gates()
    names = [name.upper() for name in args.names] or list(gates)
    if unknown := sorted(set(names) - set(gates)):
        parser.error(f"there is no gate {', '.join(unknown)}; there are {', '.join(gates)}")
    scale = Scale(args.quick, args.openai_spec)
    print(f"seed {args.seed}, {'quick' if args.quick else 'full'}", flush=True)
    failed = 0
    for name in names:
        gate = gates[name]
        outcome = gate.timed(scale, args.seed)
        failed += outcome.ok is False
        print(_line(name, gate.title, gate.target, outcome), flush=True)
    return 1 if failed else 0


def _spec_of_environment() -> Path | None:
    path = os.environ.get("OPENAI_OPENAPI_JSON")
    return Path(path) if path else None


def _line(name: str, title: str, target: str, outcome: Outcome) -> str:
    line = f"{WORDS[outcome.ok]:<8}{name:<4} {title} | {target} | {outcome.reached} | {outcome.seconds:.1f} s"
    shown = outcome.details[:SHOWN_FINDINGS]
    hidden = len(outcome.details) - len(shown)
    return "\n".join(
        [line, *(f"          {detail}" for detail in shown), *([f"          and {hidden} more"] * (hidden > 0))]
    )


if __name__ == "__main__":
    sys.exit(main())
