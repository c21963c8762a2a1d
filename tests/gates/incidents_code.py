"""Replays that no request can show: what the source may not contain, what may be listened to, what may be loaded."""

from __future__ import annotations

import json
import re
import stat
import tempfile
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from incident_rig import ROOT, Rig, absent, replay, source
from packaging.requirements import Requirement
from packaging.version import Version

from dsengine.async_engine import AsyncEngine
from dsengine.config import EngineConfig
from dsengine.demo import CHECKPOINT_DIR
from dsengine.engine.messages import EngineStats, RequestUpdate, StepOutput
from dsengine.memory.radix_cache import block_keys
from dsengine.model.checkpoint import CheckpointError, read_checkpoint
from dsengine.tokenizer.chat_template import ChatTemplate

# They read what the same program wrote before, with weights_only, and are no part of serving.
TRAINING = ("dsengine/demo/export.py", "dsengine/demo/train.py")
# The oldest versions without a known advisory that would touch this server.
PINS = {"starlette": "1.0.1", "h11": "0.16", "jinja2": "3.1.6", "torch": "2.6"}


@replay("1 CVE-2025-32444 vLLM: pickle from a socket")
def _pickle(rig: Rig) -> None:
    absent(r"\b(import|from) +(pickle|dill|cloudpickle|marshal|shelve|joblib)\b|\bpickle\.")


@replay("5 CVE-2024-50050 llama-stack (ShadowMQ): recv_pyobj")
def _pyobj(rig: Rig) -> None:
    absent(r"(recv|send)_pyobj|(recv|send|broadcast|gather|scatter)_object|all_gather_object")


@replay("4 CVE-2025-30165 vLLM: objects between hosts; multiprocessing, which pickles them")
def _multiprocessing(rig: Rig) -> None:
    absent(r"\bmultiprocessing\b|\bmp\.Queue\b|concurrent\.futures.*ProcessPool")


@replay("11 CVE-2025-24357, CVE-2025-32434 vLLM, torch: torch.load")
def _torch_load(rig: Rig) -> None:
    absent(r"torch\.load\(|torch\.jit\.load|np\.load\(.*allow_pickle", TRAINING)
    absent(r"torch\.load\((?!.*weights_only=True)")


@replay("13 CVE-2025-9141 vLLM: eval")
def _eval(rig: Rig) -> None:
    absent(r"(?<![\w.])(eval|exec)\(|yaml\.(unsafe_)?load\(|\bliteral_eval\b")


@replay("7 a shell")
def _shell(rig: Rig) -> None:
    absent(r"shell=True|os\.(system|popen)\(|create_subprocess_shell|getoutput\(")


@replay("10 CVE-2025-66448, CVE-2026-22807 vLLM: code of a checkpoint")
def _remote_code(rig: Rig) -> None:
    absent(r"trust_remote_code|auto_map|AutoConfig|AutoTokenizer|AutoModel")


@replay("17 CVE-2024-3568 transformers: nothing of it is imported")
def _transformers(rig: Rig) -> None:
    absent(r"^\s*(import|from) transformers")
    absent(r"^\s*(import|from) (ray|gradio|mooncake)\b")


@replay("2 CVE-2025-47277 vLLM: a store that listens on all interfaces")
def _store(rig: Rig) -> None:
    absent(r"init_method=|[\"'](tcp|env)://")
    for path, text in source().items():
        # A store that listens is handed a socket that was bound where it should be.
        for call in re.findall(r"TCPStore\([^)]*True[^)]*\)+", text):
            assert "master_listen_fd" in call, f"{path}: {call}"


@replay("3 CVE-2025-30202 vLLM: sockets between processes that others can reach")
def _ipc(rig: Rig) -> None:
    absent(r"zmq\.(XPUB|PUB|SUB|XSUB)\b|\.bind\(f?[\"']tcp")
    folder = tempfile.TemporaryDirectory()
    with folder:  # the engine's socket lies in a folder like this one
        assert stat.S_IMODE(Path(folder.name).stat().st_mode) == 0o700


@replay("6 CVE-2026-3989 SGLang: crash dumps that are pickles")
def _dumps(rig: Rig) -> None:
    absent(r"torch\.save\(", TRAINING)


@replay("25 CVE-2025-25183 vLLM: prefixes that meet by a collision of hashes")
def _collisions(rig: Rig) -> None:
    # Keys are the tokens themselves: equal keys are equal prefixes. hash(-1) == hash(-2) was the published case.
    keys = [block_keys(tokens, 2, salt) for tokens in ([1, 2], [1, 3], [2, 1]) for salt in ("", "a")]
    assert len({tuple(map(repr, key)) for key in keys}) == len(keys)


@replay("32 F32: clocks that jump")
def _clocks(rig: Rig) -> None:
    # Time of day is for what is shown, never for deadlines.
    absent(r"time\.time\(\) *[-+<>]|[-+<>] *time\.time\(\)")


@replay("18 LiteLLM 1.82.7: files that run at the interpreter's start")
def _pth(rig: Rig) -> None:
    for distribution in ("dsengine", "fastapi", "starlette", "uvicorn", "h11", "msgspec", "pyzmq", "xgrammar"):
        for file in metadata.files(distribution) or ():
            if file.suffix != ".pth" or "dsengine" in file.name:
                continue
            raise AssertionError(f"{distribution} brings {file}")


@replay("48 CVE-2025-43859 h11, CVE-2024-47874 and CVE-2025-54121 Starlette, CVE-2025-27516 Jinja: versions")
def _versions(rig: Rig) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {r.name.lower(): r.specifier for r in map(Requirement, project["dependencies"])}
    for name, oldest in PINS.items():
        lowest = [s.version for s in wanted[name] if s.operator in (">=", "==", "~=")]
        assert lowest and Version(lowest[0]) >= Version(oldest), f"{name} may be older than {oldest}"
        assert Version(metadata.version(name).split("+")[0]) >= Version(oldest)


@replay("8 CVE-2026-5760 SGLang: a checkpoint's template that reaches for Python")
def _template(rig: Rig) -> None:
    attacks = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('x') }}",
        "{{ messages.append(1) }}",
        "{{ self._TemplateReference__context }}{{ lipsum.__globals__ }}",
        "{% for i in range(10**9) %}{% for j in range(10**9) %}a{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
    ]
    for attack in attacks:
        try:
            text = ChatTemplate(attack).render([{"role": "user", "content": "hi"}])
        except ValueError:
            continue
        assert "class" not in text and "os" not in text and len(text) < 1000, (attack, text[:100])


def checkpoint_replay(name: str, change: Callable[[Path], object]) -> None:
    @replay(name)
    def refused(rig: Rig) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file in CHECKPOINT_DIR.iterdir():
                if file.suffix == ".safetensors" or file.name.endswith("index.json"):
                    (folder / file.name).write_bytes(file.read_bytes())
            read_checkpoint(folder)
            change(next(iter(sorted(folder.glob("*.safetensors")))))
            try:
                read_checkpoint(folder)
            except CheckpointError:
                return
            raise AssertionError("the checkpoint was taken")


def _header(file: Path, change: Callable[[dict[str, dict[str, list[int]]]], None]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change({name: entry for name, entry in header.items() if name != "__metadata__"})
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _stretch(entries: dict[str, dict[str, list[int]]]) -> None:
    first = next(iter(entries.values()))
    first["shape"] = [2**40, 2**40]


def _overlap(entries: dict[str, dict[str, list[int]]]) -> None:
    one, two, *_ = entries.values()
    two["data_offsets"] = one["data_offsets"]


checkpoint_replay("14 CVE-2026-53923 vLLM, CVE-2025-53630 llama.cpp: dimensions whose product overflows",
                  lambda file: _header(file, _stretch))  # fmt: skip
checkpoint_replay("14 CVE-2026-7482 Ollama: tensors that read each other's bytes", lambda file: _header(file, _overlap))
checkpoint_replay("53 safetensors: a header larger than its file",
                  lambda file: file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:]))  # fmt: skip
checkpoint_replay("53 safetensors: a header of 50 MB",
                  lambda file: file.write_bytes((50 * 2**20).to_bytes(8, "little") + b" " * (50 * 2**20)))  # fmt: skip
checkpoint_replay("11 vLLM: pickles in place of tensors", lambda file: file.rename(file.with_suffix(".bin")))


@replay("52 SGLang 6888: a leak ends the server")
def _leak_check(rig: Rig) -> None:
    # The check is there to be asked for by tests; what a server does never depends on it.
    assert not [path for path, text in source().items() if "server" in path.parts and "check_integrity" in text]


@replay("50 LMCache 4185: a late event of a request that is gone ends the engine for all")
def _late_event(rig: Rig) -> None:
    engine = AsyncEngine(EngineConfig())
    engine._dispatch(StepOutput([RequestUpdate("gone", (1,), "stop")], EngineStats()))
    engine.abort("gone")
    assert engine.abort_response("gone") == 0
