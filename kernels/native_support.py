"""Builds the C kernels with the machine's own compiler and loads them; imported by `native.py` files only.

A CPU decodes a few tokens at a time: general libraries' products of a few rows are slow, and a call of torch costs more
than what it computes. The `native.c` files of all operations become one library, for exactly this processor, when a
CPU backend is first chosen (a second or two); it is kept in the user's cache directory. Without a compiler the
operations have their torch backends.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
BUILD_SECONDS = 120.0
_FOLDER = Path(__file__).resolve().parent

Pointer = ctypes.c_void_p
Integer = ctypes.c_int64
Real = ctypes.c_float


class BuildError(Exception):
    """The C kernels cannot be built or loaded here; the message says why."""


def needs_compiler(device: torch.device) -> str | None:
    """Why the C kernels do not run here, or None; builds them."""
    try:
        loaded_kernels()
    except BuildError as error:
        return str(error)
    return None


def c_function(name: str, *arguments: type) -> Callable[..., None]:
    """The C function `name`, which returns nothing; arguments are `Pointer` (of `data_ptr()`), `Integer` or `Real`."""
    found = loaded_kernels()[name]
    found.argtypes, found.restype = arguments, None
    called: Callable[..., None] = found
    return called


@cache
def loaded_kernels() -> ctypes.CDLL:
    """The C kernels.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        raise BuildError("needs a C compiler, and there is neither cc nor gcc")
    try:
        folder = _cache_folder()
        if folder is not None:
            return _built(compiler, folder)
        with tempfile.TemporaryDirectory() as temporary:  # what is loaded stays loaded
            return _built(compiler, Path(temporary))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"cannot be built with {compiler}: {error}") from error


def _built(compiler: str, folder: Path) -> ctypes.CDLL:
    # torch's own OpenMP: another one in the process would bring a second set of threads.
    openmp = sorted(map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")))[:1]
    flags = [*FLAGS, "-fopenmp" if openmp else "-fopenmp-simd"]
    sources = sorted(_FOLDER.glob("*/native.c"))
    target = folder / f"{_fingerprint([compiler, *flags, *openmp], sources)}.so"
    if not target.exists():
        unit = "".join(f'#include "{source}"\n' for source in sources)
        # Made elsewhere first: another process may be building or loading the same.
        with tempfile.TemporaryDirectory(dir=folder) as work:
            compiled, linked = os.path.join(work, "kernels.o"), os.path.join(work, "kernels.so")
            _run([compiler, *flags, "-x", "c", "-c", "-", "-o", compiled], unit)
            _run([compiler, "-shared", compiled, *openmp, "-lm", "-o", linked])
            os.replace(linked, target)
    return ctypes.CDLL(str(target))


def _run(command: list[str], source: str = "") -> None:
    result = subprocess.run(
        command, input=source, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False, errors="replace"
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"cannot be built with {command[0]}: {said[:300]}")


def _fingerprint(command: list[str], sources: list[Path]) -> str:
    """Of all that the library depends on: a home directory may be shared by machines with different processors."""
    digest = hashlib.sha256("\0".join(command).encode())
    for source in (_FOLDER / "native.h", *sources):
        digest.update(source.read_bytes())
    compiler = Path(command[0]).resolve().stat()
    digest.update(f"{compiler.st_size} {compiler.st_mtime_ns}".encode())
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    wanted = ("flags", "Features", "model", "cpu family", "CPU implementer", "CPU part", "CPU variant")
    digest.update("\n".join(line for line in processor.splitlines() if line.startswith(wanted)).encode())
    return digest.hexdigest()[:32]


def _cache_folder() -> Path | None:
    """A folder that nobody else can write to, since what lies in it is loaded; None if there is none."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "dsengine" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
    except OSError:
        return None
    is_ours = info.st_uid == os.geteuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if is_ours and os.access(folder, os.W_OK) else None
