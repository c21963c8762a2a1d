"""The tiny checkpoint, written once for all tests of the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_engine import write_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("random-v3"))
