"""`dsengine convert`: a checkpoint in another number format, and the manifest by which any checkpoint is verified."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsengine.cli_flags import UsageError
from dsengine.model.checkpoint import resolve_checkpoint
from dsengine.model.config import ModelConfig
from dsengine.model.conversion import TargetFormat, convert_checkpoint
from dsengine.model.manifest import read_manifest, write_manifest
from dsengine.progress import loading_progress


def run_convert(args: argparse.Namespace) -> int:
    """The `convert` sub-command; returns the exit status."""
    source = resolve_checkpoint(args.source)
    if args.manifest_only:
        _refuse_for_manifest(args)
        with loading_progress(enabled=True, label="reading") as progress:
            file = write_manifest(source, progress)
        print(f"{file}: sizes and SHA-256 sums of {len(read_manifest(source))} files")
        return 0
    if args.target is None:
        raise UsageError("dsengine convert: DST is missing: the new folder for the converted checkpoint")
    target = Path(args.target).expanduser()
    to: TargetFormat = args.format or ("fp8" if ModelConfig.from_hub(source).quantization is None else "bf16")
    with loading_progress(enabled=True, label="converting") as progress:
        done = convert_checkpoint(source, target, to, args.scale_fmt, progress=progress)
    print(
        f"{target}: {done.converted} of {done.tensors} tensors converted to {to}, {done.bytes_read / 1e9:.3f} GB read, "
        f"{done.bytes_written / 1e9:.3f} GB written in {done.shards} {'file' if done.shards == 1 else 'files'}"
    )
    return 0


def _refuse_for_manifest(args: argparse.Namespace) -> None:
    for name in ("target", "format", "scale_fmt"):
        if getattr(args, name) is not None:
            flag = "DST" if name == "target" else "--" + name.replace("_", "-")
            raise UsageError(f"dsengine convert: {flag} and --manifest-only contradict each other; give one")
