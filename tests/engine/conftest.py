"""The tiny checkpoint, written once for all tests of the engine, after each of which nothing may be left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from leak_check import Cores, Holdings
from tiny_engine import write_tiny_checkpoint

CORES = Cores()
CORES.watch()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = Holdings.now()
    yield
    CORES.check()
    before.check()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("random-v3"))
