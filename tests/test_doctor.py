"""What `dsengine doctor` finds out, asked in this process; its output is tested with the other commands'."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dsengine.config import EngineConfig
from dsengine.doctor import examine


def test_doctor_finds_the_version_of_a_package_that_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep_ep.py").touch()
    folder = tmp_path / "deep_ep-1.2.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: deep_ep\nVersion: 1.2.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        packages = examine(EngineConfig(device="cpu"))["optional_packages"]
    finally:
        sys.modules.pop("deep_ep", None)
    assert packages["deep_ep"]["importable"] and packages["deep_ep"]["detail"] == "1.2.1"
