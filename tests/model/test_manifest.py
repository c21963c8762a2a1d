"""Manifests: every damage to a listed file is seen, and what cannot be a manifest is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsengine.demo import CHECKPOINT_DIR
from dsengine.model import manifest
from dsengine.model.checkpoint import CheckpointError
from dsengine.model.manifest import MANIFEST_FILE, covered_files, read_manifest, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("model.safetensors", 5000), ("config.json", 40), ("tokenizer.json", 900)):
        (tmp_path / name).write_bytes(random.Random(name).randbytes(size))
    (tmp_path / "README.md").write_text("not listed")
    write_manifest(tmp_path)
    return tmp_path


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of the entry of config.json."""
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["files"]["config.json"] |= fields
    (folder / MANIFEST_FILE).write_text(json.dumps(content))


def test_demo_checkpoint_is_what_its_manifest_says() -> None:
    assert sorted(read_manifest(CHECKPOINT_DIR)) == covered_files(CHECKPOINT_DIR)
    assert verify_manifest(CHECKPOINT_DIR, "on") > 10_000_000


def test_sound_files_pass(folder: Path) -> None:
    assert sorted(read_manifest(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    steps: list[tuple[int, int]] = []
    assert verify_manifest(folder, progress=lambda done, total: steps.append((done, total))) == 5940
    assert steps[-1] == (5940, 5940)
    assert not list(folder.glob("*.incomplete"))


def test_every_flipped_bit_is_seen(folder: Path) -> None:
    rng = random.Random(0)
    for name in covered_files(folder):
        sound = (folder / name).read_bytes()
        for _ in range(50):
            data = bytearray(sound)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(data)
            with pytest.raises(CheckpointError, match=f"{name}: damaged, expected SHA-256 .*found"):
                verify_manifest(folder)
        (folder / name).write_bytes(sound)
    verify_manifest(folder)


def test_sizes_are_compared_before_sums(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"short")
    (folder / "tokenizer.json").unlink()
    (folder / "more.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        verify_manifest(folder)
    message = str(caught.value)
    assert f"model.safetensors: expected 5000 bytes ({MANIFEST_FILE}), found 5" in message
    assert f"tokenizer.json: missing; {MANIFEST_FILE} lists it with 900 bytes" in message
    assert f"more.safetensors: not listed in {MANIFEST_FILE}" in message


def test_modes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[7] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert verify_manifest(folder, "off") == 0
    monkeypatch.setattr(manifest, "ALWAYS_HASHED_BYTES", 5940)
    assert verify_manifest(folder, "auto") == 0  # too large to be read twice unasked
    with pytest.raises(CheckpointError, match="damaged"):
        verify_manifest(folder, "on")
    (folder / MANIFEST_FILE).unlink()
    assert verify_manifest(folder, "auto") == 0
    with pytest.raises(CheckpointError, match=f"has no {MANIFEST_FILE} to verify it by; 'dsengine convert"):
        verify_manifest(folder, "on")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "{}", '{"format": 2, "files": {}}', '{"format": 1}', '{"format": 1, "files": []}', "[" * 99_999],
)
def test_what_is_no_manifest(folder: Path, content: str) -> None:
    (folder / MANIFEST_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=f"{MANIFEST_FILE}: expected a manifest of sums, found "):
        verify_manifest(folder)


@pytest.mark.parametrize("fields", [{"size": -1}, {"size": "40"}, {"size": True}, {"sha256": "0"}, {"sha256": None}])
def test_broken_entries(folder: Path, fields: dict[str, Any]) -> None:
    edit(folder, **fields)
    with pytest.raises(CheckpointError, match=r"found file 'config\.json' with"):
        verify_manifest(folder)


@pytest.mark.parametrize("name", ["/etc/passwd", "../config.json", "./config.json"])
def test_paths_outside_are_refused(folder: Path, name: str) -> None:
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["files"][name] = content["files"]["config.json"]
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="which is not a path below the folder"):
        verify_manifest(folder)


def test_a_manifest_that_is_a_link_to_itself(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    (folder / MANIFEST_FILE).symlink_to(MANIFEST_FILE)
    with pytest.raises(CheckpointError, match="expected a manifest of sums"):
        verify_manifest(folder)


def test_links_into_a_cache_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As the Hugging Face hub's cache keeps its snapshots."""
    store = tmp_path_factory.mktemp("blobs")
    shutil.move(folder / "model.safetensors", store / "blob")
    (folder / "model.safetensors").symlink_to(store / "blob")
    assert verify_manifest(folder) == 5940


def test_nothing_to_list(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors files to list"):
        write_manifest(tmp_path)
