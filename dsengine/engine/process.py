"""The engine's process, from its first moment: it must not outlive its parent.

The parent starts it as `python -m dsengine.engine.process`, writes one JSON line of `EngineProcessArgs` to its standard
input and keeps that pipe open: when the parent dies, however it dies, this process ends too. What it runs is imported
only then, because importing torch takes seconds in which the parent may die.
"""

from __future__ import annotations

import sys

import msgspec

from dsengine.engine.process_args import EngineProcessArgs
from dsengine.parallel.launch import die_with


def main() -> int:
    args = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineProcessArgs)
    die_with(args.parent)
    from dsengine.engine.engine_loop import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
