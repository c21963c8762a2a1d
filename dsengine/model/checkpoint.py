"""Finding a checkpoint and proving, before one byte of weights is read, that its files are what they say.

A half-downloaded shard, a git-LFS pointer or a header that lies must end in one sentence that names the file, not in a
traceback twenty minutes into loading. The safetensors library accepts duplicate keys and headers of 100 MB, so headers
are read here (format: 8 bytes little-endian length, JSON, data) and only proven files are handed to it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 400_000
INDEX_FILE = "model.safetensors.index.json"

_MAX_LISTED = 10
_LFS_POINTER = b"version https://git-lfs"
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message names file, tensor, what was expected and what was found."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file's header describes it; dtype is spelled as safetensors does (BF16, F8_E4M3 …)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def raise_problems(problems: Sequence[str], path: Path) -> None:
    """One error for all problems: the first ten in full, the rest as a count."""
    if not problems:
        return
    lines = [f"{path} cannot be loaded:", *(f"  {problem}" for problem in problems[:_MAX_LISTED])]
    if len(problems) > _MAX_LISTED:
        lines.append(f"  … and {len(problems) - _MAX_LISTED} more ({len(problems)} problems in all)")
    raise CheckpointError("\n".join(lines))


def resolve_checkpoint(name_or_path: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: the folder itself, or a download of that name from the Hugging Face hub.

    Only weights, configs and tokenizer files are fetched, never code.

    Raises:
        CheckpointError: neither a folder nor a reachable hub name.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{name_or_path} is a file; a checkpoint is a folder with config.json and *.safetensors")
    looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1
    if looks_like_path:
        raise CheckpointError(f"{name_or_path} does not exist, and a hub name has the form owner/model")
    return _download(name_or_path, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # imported late: it costs half a second and most runs are local
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "encoding/encoding_dsv32.py"]  # the last is read, never run
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{name} is no folder here and no model on the Hugging Face hub (or access is gated)"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name} has no revision {revision!r} on the Hugging Face hub") from None
    except HFValidationError as error:
        raise CheckpointError(f"{name} is no folder here and no hub name: {error}") from None
    except (
        Exception
    ) as error:  # the client raises its own, requests', httpx's and OS errors when the hub is out of reach
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise CheckpointError(
            f"{name} is no folder here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason})"
        ) from None


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Headers of all shards of a checkpoint folder, proven consistent with each other, the index and the file sizes.

    Raises:
        CheckpointError: listing every problem found.
    """
    problems: list[str] = []
    weight_map = _read_index(folder / INDEX_FILE, problems)
    files = _shards(folder, weight_map, problems)
    tensors: dict[str, StoredTensor] = {}
    readable: set[str] = set()
    for file in files:
        try:
            stored = read_header(file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        readable.add(file.name)
        for tensor in stored:
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                problems.append(f"{file.name}: tensor {tensor.name!r} is a duplicate; {first.file.name} holds it too")
    if weight_map is not None:
        problems.extend(_index_mismatches(weight_map, tensors, readable))
    raise_problems(problems, folder)
    return tensors


def _read_index(file: Path, problems: list[str]) -> dict[str, str] | None:
    if not os.path.lexists(file):
        return None
    if not is_regular(file):
        problems.append(f"{file.name}: expected a file, found {_kind(file)}")
        return None
    try:
        weight_map = json.loads(file.read_bytes(), object_pairs_hook=unique_keys)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problems.append(f"{file.name}: expected a JSON object with weight_map, found {_found(error)}")
        return None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        problems.append(f"{file.name}: weight_map must map tensor names to file names")
        return None
    if not weight_map:
        problems.append(f"{file.name}: weight_map is empty")
    return weight_map


def _shards(folder: Path, weight_map: dict[str, str] | None, problems: list[str]) -> list[Path]:
    if weight_map is None:
        files = sorted(folder.glob("*.safetensors"))
        if not files and not problems:
            problems.append(_no_safetensors(folder))
        return files
    files = []
    for name in sorted(set(weight_map.values())):
        file = folder / name
        if Path(name).name != name:  # an index is data from outside: it must not lead out of the folder
            problems.append(f"{INDEX_FILE}: shard {_short(name)!r} is not a plain file name")
        elif not is_regular(file):
            count = sum(shard == name for shard in weight_map.values())
            what = "that file does not exist" if not _lexists(file) else f"found {_kind(file)} in its place"
            problems.append(f"{INDEX_FILE}: names shard {_short(name)!r} with {count} tensors, but {what}")
        else:
            files.append(file)
    return files


def _no_safetensors(folder: Path) -> str:
    others = sorted(f.name for ending in ("*.bin", "*.pt", "*.pth", "*.gguf") for f in folder.glob(ending))
    if others:
        return f"{others[0]}: expected *.safetensors; .bin, .pt and .gguf files are refused (a pickle can run code)"
    partial = sorted(f.name for f in folder.glob("*.incomplete"))
    if partial:
        return f"{partial[0]}: expected *.safetensors; a download or a conversion has not ended"
    return "expected *.safetensors files, found none"


def _index_mismatches(
    weight_map: dict[str, str], tensors: dict[str, StoredTensor], readable: set[str]
) -> Iterable[str]:
    for name, shard in weight_map.items():
        if shard not in readable:
            continue  # already reported
        if name not in tensors:
            yield f"{shard}: tensor {name!r} is missing; {INDEX_FILE} places it in this file"
        elif tensors[name].file.name != shard:
            yield f"{tensors[name].file.name}: holds tensor {name!r}, which {INDEX_FILE} places in {shard}"
    for name, tensor in tensors.items():
        if name not in weight_map:
            yield f"{tensor.file.name}: holds tensor {name!r}, which {INDEX_FILE} does not list"


def read_header(file: Path) -> list[StoredTensor]:
    """Tensors of one safetensors file, after checking its header against itself and against the file's size.

    Raises:
        CheckpointError: the file is truncated, a git-LFS pointer, or its header is not a consistent one.
    """
    if not is_regular(file):  # opening a named pipe would wait for ever
        raise CheckpointError(f"{file.name}: expected a file, found {_kind(file)}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise CheckpointError(
                f"{file.name}: expected weights, found a git-LFS pointer; fetch it with 'git lfs pull'"
            )
        header_bytes = int.from_bytes(start[:8], "little")
        if size < 8 or (header_bytes <= MAX_HEADER_BYTES and 8 + header_bytes > size):
            raise CheckpointError(
                f"{file.name}: truncated, expected {8 + header_bytes} bytes of header, found {size} bytes"
            )
        if header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{file.name}: not a safetensors file, expected a header of at most {MAX_HEADER_BYTES} bytes, "
                f"found one of {header_bytes}"
            )
        stream.seek(8)
        header = _parse_header(file, stream.read(header_bytes))
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{file.name}: expected at most {MAX_TENSORS} tensors, found {len(header)}")
    spans = [_parse_entry(file, name, entry) for name, entry in header.items()]
    _check_layout(file, spans, data_bytes=size - 8 - header_bytes)
    return [tensor for _, tensor in spans]


def is_regular(file: Path) -> bool:
    """Whether there is a file, or a link to one; no folder, pipe, device or dead link, nor a name that no file has."""
    try:
        return file.is_file()
    except OSError:
        return False


def _lexists(file: Path) -> bool:
    try:
        return os.path.lexists(file)
    except ValueError:  # a NUL in the name
        return False


def _kind(file: Path) -> str:
    if file.is_symlink() and not os.path.exists(file):
        return "a link that leads nowhere"
    return "a folder" if file.is_dir() else "a pipe or a device"


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}…"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook for `json.loads`: an object, unless a key stands in it twice, of which readers take one or the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice!r}")
    return found


def _found(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200] or type(error).__name__


def _parse_header(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: expected a JSON header, found {_found(error)}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name}: expected a JSON object as header, found a {type(header).__name__}")
    return header


def _parse_entry(file: Path, name: str, entry: Any) -> tuple[int, StoredTensor]:
    """First data byte and description of one tensor."""
    where = f"{file.name}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} expected an object in the header, found {type(entry).__name__}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where} expected a known dtype, found {dtype!r}")
    if not isinstance(shape, list) or not _are_counts(shape):
        raise CheckpointError(f"{where} expected a shape of non-negative integers, found {shape!r}")
    if not isinstance(offsets, list) or not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} expected two non-negative data_offsets, found {offsets!r}")
    expected, found = math.prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if found != expected:
        raise CheckpointError(f"{where} expected {expected} bytes ({dtype} {shape}), found {found} in data_offsets")
    return offsets[0], StoredTensor(name, file, dtype, tuple(shape), expected)


def _are_counts(values: list[Any]) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in values)


def _check_layout(file: Path, spans: list[tuple[int, StoredTensor]], data_bytes: int) -> None:
    """The data section must be filled by the tensors exactly: no overlap, no hole, nothing cut off."""
    end, previous = 0, "the header"
    for begin, tensor in sorted(spans, key=lambda span: (span[0], span[1].num_bytes)):
        if begin != end:
            kind = "overlaps" if begin < end else "leaves a hole after"
            outside = [t.name for first, t in spans if first + t.num_bytes > data_bytes]
            beyond = f"; tensor {outside[0]!r} would lie beyond the end of the file" if outside else ""
            raise CheckpointError(
                f"{file.name}: tensor {tensor.name!r} {kind} {previous}, expected it at data byte {end}, found {begin}"
                f"{beyond}"
            )
        end, previous = begin + tensor.num_bytes, repr(tensor.name)
    if end != data_bytes:
        kind = "truncated" if data_bytes < end else "too long"
        raise CheckpointError(f"{file.name}: {kind}, expected {end} bytes of data, found {data_bytes}")
