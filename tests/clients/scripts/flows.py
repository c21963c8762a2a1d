"""What every client script shares: its arguments, its questions, and the line it prints of each flow that worked."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

README = Path(__file__).parents[3] / "README.md"
README_URL = "http://127.0.0.1:30000"
QUESTION = "What is 347 + 285?"
ANSWER = "347 + 285 = 632"
COUNTING, COUNTED = "1, 2, 3,", " 4, 5, 6"
WEATHER_QUESTION = "What is the weather in Paris?"
EXTRACTION = "Extract: the city of Berlin has size 89."

url, model = [*sys.argv, "", ""][1:3]


def run(distribution: str, *flows: Callable[[], None]) -> None:
    """Run the flows in order; the first failure ends the script with its traceback."""
    for flow in flows:
        flow()
    done = [flow.__name__ for flow in flows]
    if line := _readme_line(distribution):
        assert eval(line.replace(README_URL, url.removesuffix("/v1")), vars(sys.modules["__main__"])), line
        done.append("readme_line")
    print(json.dumps({"client": distribution, "version": importlib.metadata.version(distribution), "flows": done}))


def _readme_line(distribution: str) -> str | None:
    """The Python expression that the README's table has for a client."""
    for row in README.read_text().splitlines():
        cells = [cell.strip() for cell in row.split("|")]
        if len(cells) > 3 and cells[1] == distribution and cells[3].endswith(")`"):
            return cells[3].strip("`")
    return None
