"""The list of sizes and SHA-256 sums that lies beside a checkpoint, so that damage to its data is seen and not served.

Headers can be checked against themselves, weights cannot: a flipped bit in the data of a safetensors file loads without
a word. A manifest covers every file that is read of a checkpoint (weights, configs, tokenizer), each by its size, which
costs nothing to compare, and by its SHA-256, which costs one reading of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsengine.config import ChecksumMode
from dsengine.model.checkpoint import CheckpointError, raise_problems, unique_keys

MANIFEST_FILE = "dsengine.sha256.json"
ALWAYS_HASHED_BYTES = 2**30
"""With `auto`, checkpoints below this size are read and compared in full; a second or two at the most."""

ProgressCallback = Callable[[int, int], None]

_FORMAT = 1
_CHUNK = 4 * 2**20
_COVERED = ("*.safetensors", "*.json", "*.jinja", "encoding/*.py")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ListedFile:
    """A file as the manifest describes it."""

    size: int
    sha256: str


def covered_files(folder: Path) -> list[str]:
    """The files of a checkpoint that a manifest lists, as paths below `folder`, in order."""
    found = {path.relative_to(folder).as_posix() for pattern in _COVERED for path in folder.glob(pattern)}
    return sorted(found - {MANIFEST_FILE})


def write_manifest(folder: Path, progress: ProgressCallback | None = None) -> Path:
    """Read every file of a checkpoint and write down its size and sum; an older manifest is replaced in one step.

    Args:
        progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: the folder holds no weights.
    """
    names = covered_files(folder)
    if not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{folder} holds no *.safetensors files to list")
    sizes = {name: (folder / name).stat().st_size for name in names}
    sums = _hash_files(folder, sizes, progress)
    files = {name: {"size": sizes[name], "sha256": sums[name]} for name in names}
    text = json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n"
    partial = folder / f"{MANIFEST_FILE}.incomplete"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, folder / MANIFEST_FILE)
    return folder / MANIFEST_FILE


def verify_manifest(folder: Path, mode: ChecksumMode = "auto", progress: ProgressCallback | None = None) -> int:
    """Compare a checkpoint with its manifest.

    Args:
        mode: "auto" compares names and sizes, and sums below `ALWAYS_HASHED_BYTES`; where there is no manifest it does
            nothing. "on" always compares sums and demands a manifest, "off" looks at nothing.
        progress: called with (bytes read, bytes in all) while sums are computed.

    Returns:
        the number of bytes whose sum was compared.

    Raises:
        CheckpointError: listing every file that is not what the manifest says.
    """
    if mode == "off":
        return 0
    if not os.path.lexists(folder / MANIFEST_FILE):
        if mode == "on":
            raise CheckpointError(
                f"{folder} has no {MANIFEST_FILE} to verify it by; 'dsengine convert --manifest-only {folder}' writes "
                "one, of the files as they are now"
            )
        return 0
    listed = read_manifest(folder)
    raise_problems(list(_misplaced(folder, listed)), folder)
    total = sum(file.size for file in listed.values())
    if mode == "auto" and total >= ALWAYS_HASHED_BYTES:
        return 0
    sums = _hash_files(folder, {name: file.size for name, file in listed.items()}, progress)
    raise_problems(
        [
            f"{name}: damaged, expected SHA-256 {file.sha256} ({MANIFEST_FILE}), found {sums[name]}"
            for name, file in listed.items()
            if sums[name] != file.sha256
        ],
        folder,
    )
    return total


def read_manifest(folder: Path) -> dict[str, ListedFile]:
    """The files that the manifest of a checkpoint lists, by their paths below the folder.

    Raises:
        CheckpointError: it is not a manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes(), object_pairs_hook=unique_keys)
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise ValueError(f"no object of format {_FORMAT}")
        files = manifest.get("files")
        if not isinstance(files, dict) or not files:
            raise ValueError("no files")
        return {name: _listed_file(name, entry) for name, entry in files.items()}
    except (ValueError, RecursionError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{folder}: {MANIFEST_FILE}: expected a manifest of sums, found {reason}") from None


def _listed_file(name: str, entry: Any) -> ListedFile:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name:
        raise ValueError(f"file {name!r}, which is not a path below the folder")
    size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"file {name!r} with size {size!r}")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError(f"file {name!r} with sha256 {digest!r}")
    return ListedFile(size, digest)


def _misplaced(folder: Path, listed: dict[str, ListedFile]) -> Iterator[str]:
    """What is missing, unlisted or of another size."""
    for name, file in listed.items():
        path = folder / name
        if not path.is_file():
            yield f"{name}: missing; {MANIFEST_FILE} lists it with {file.size} bytes"
        elif (found := path.stat().st_size) != file.size:
            yield f"{name}: expected {file.size} bytes ({MANIFEST_FILE}), found {found}"
    for name in covered_files(folder):
        if name not in listed:
            yield f"{name}: not listed in {MANIFEST_FILE}"


def _hash_files(folder: Path, sizes: dict[str, int], progress: ProgressCallback | None) -> dict[str, str]:
    sums, done, total = {}, 0, sum(sizes.values())
    for name in sizes:
        digest = hashlib.sha256()
        with (folder / name).open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
        sums[name] = digest.hexdigest()
    return sums
