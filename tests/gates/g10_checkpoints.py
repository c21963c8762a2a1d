"""G10: broken checkpoints. Named faults of structure, random damage to headers, cuts, and flipped bits of data."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_faults import FILE, Fault, all_faults, write_bases
from checkpoint_worker import CheckpointWorker
from gate_frame import Findings, Outcome, Scale

from dsengine.model.checkpoint import INDEX_FILE
from dsengine.model.manifest import MANIFEST_FILE

TITLE = "broken checkpoints"
TARGET = (
    ">= 200 named faults and 2,800 mutations: no crash, no hang; every structural fault refused <= 2 s with file and "
    "tensor named; every flipped bit caught by the manifest"
)
MAX_SECONDS = 2.0
JSON_BYTES = b'0123456789[]{},":.-eE \\tfn'


def run(scale: Scale, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return _Corpus(Path(folder), random.Random(seed)).run(scale)


class _Corpus:
    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._folder = folder
        self._rng = rng
        self._found = Findings("G10")
        self._slowest = 0.0
        self._counts = Counter[str]()
        write_bases(folder)

    def run(self, scale: Scale) -> Outcome:
        self._worker = CheckpointWorker()
        try:
            self._digests = {base: self._worker.load(self._folder / base)["digest"] for base in ("plain", "fp8")}
            faults = list(all_faults())
            for fault in faults if not scale.quick else self._rng.sample(faults, 60):
                self._named(fault)
            for _ in range(scale.of(1_000, 60)):
                self._header_damage()
            for _ in range(scale.of(600, 20)):
                self._wrong_length()
            for _ in range(scale.of(1_200, 60)):
                self._flipped_bit()
        finally:
            self._worker.close()
        counts = self._counts
        return self._found.outcome(
            f"{counts['named']} named faults and {self._found.num_cases - counts['named']:,} mutations: "
            f"{self._worker.deaths} crashes or hangs, slowest refusal {self._slowest:.2f} s, "
            f"{counts['flips caught']:,} of {counts['flips']:,} flipped bits caught by the manifest, "
            f"{counts['harmless']} damaged headers that changed nothing"
        )

    def _load(self, base: str, make: Callable[[Path], object], tp_size: int = 1) -> dict[str, Any]:
        case = self._folder / "case"
        shutil.copytree(self._folder / base, case)
        try:
            make(case)
            return self._worker.load(case, tp_size)
        finally:
            shutil.rmtree(case)

    def _judge(self, name: str, answer: dict[str, Any], words: tuple[str, ...]) -> None:
        self._found.num_cases += 1
        self._slowest = max(self._slowest, answer["seconds"])
        if "digest" in answer:
            self._found.fail(f"{name}: loaded")
        elif answer["kind"] != "refusal":
            self._found.fail(f"{name}: {answer['kind']}: {answer['error'][-300:]}")
        elif missing := [word for word in words if word not in answer["error"]]:
            self._found.fail(f"{name}: the refusal does not say {missing}: {answer['error'][:300]}")
        elif answer["seconds"] > MAX_SECONDS:
            self._found.fail(f"{name}: refused after {answer['seconds']:.1f} s")

    def _named(self, fault: Fault) -> None:
        self._counts["named"] += 1
        self._judge(fault.name, self._load(fault.base, fault.make, fault.tp_size), fault.words)

    def _header_damage(self) -> None:
        """Some bytes of a header, the index or the config: refused, or what is loaded is the same to the bit."""
        base = self._rng.choice(("plain", "fp8"))
        files = [path.name for path in (self._folder / base).iterdir()]
        name = self._rng.choice([file for file in files if file != "config.json"])

        def damage(folder: Path) -> None:
            data = bytearray((folder / name).read_bytes())
            end = len(data) if name == INDEX_FILE else 8 + int.from_bytes(data[:8], "little")
            for _ in range(self._rng.choice((1, 1, 2, 5))):
                data[self._rng.randrange(end)] = self._rng.choice((self._rng.randrange(256), *JSON_BYTES))
            (folder / name).write_bytes(data)

        answer = self._load(base, damage)
        if answer.get("digest") == self._digests[base]:
            self._counts["harmless"] += 1
            self._found.num_cases += 1
        else:
            self._judge(f"damaged {name}", answer, (name.split("-of-")[0],) if name != INDEX_FILE else ())

    def _wrong_length(self) -> None:
        base = self._rng.choice(("plain", "fp8"))
        name = self._rng.choice([path.name for path in (self._folder / base).glob("*.safetensors")])

        def change(folder: Path) -> None:
            data = (folder / name).read_bytes()
            if self._rng.random() < 0.8:
                data = data[: self._rng.randrange(len(data))]
            else:
                data += self._rng.randbytes(self._rng.randrange(1, 5000))
            (folder / name).write_bytes(data)

        self._judge(f"{name} of another length", self._load(base, change), (name,))

    def _flipped_bit(self) -> None:
        self._counts["flips"] += 1

        def flip(folder: Path) -> None:
            files = [path for path in folder.iterdir() if path.name != MANIFEST_FILE]
            file = self._rng.choice([folder / FILE, *files])
            self._hit = file.name
            data = bytearray(file.read_bytes())
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
            file.write_bytes(data)

        answer = self._load("listed", flip)
        self._counts["flips caught"] += "error" in answer and MANIFEST_FILE in answer["error"]
        self._judge("flipped bit", answer, (self._hit, MANIFEST_FILE, "damaged"))
