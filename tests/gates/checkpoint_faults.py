"""What can be wrong with a checkpoint, one named fault at a time: how to make it, and what its refusal must say."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FP8_QUANTIZATION, TINY_CONFIGS
from torch import Tensor

from dsengine.model.checkpoint import INDEX_FILE
from dsengine.model.manifest import MANIFEST_FILE, write_manifest
from dsengine.model.random_checkpoint import write_random_checkpoint

PLAIN: dict[str, Any] = TINY_CONFIGS["v3"] | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 136,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "torch_dtype": "bfloat16",
    "num_nextn_predict_layers": 0,
}
FP8 = PLAIN | {"quantization_config": FP8_QUANTIZATION}
FILE = "model.safetensors"
SHARDS = [f"model-{number:05d}-of-000003.safetensors" for number in (1, 2, 3)]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
VICTIMS = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.kv_b_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.self_attn.q_a_proj.weight",
    "model.layers.1.mlp.gate.weight",
    EXPERT,
)
Break = Callable[[Path], object]


@dataclass(frozen=True)
class Fault:
    """A named way to break a sound checkpoint.

    Attributes:
        base: "plain" (one file), "fp8" (three shards and an index) or "listed" (one file and a manifest).
        words: each must stand in the refusal.
    """

    name: str
    base: str
    make: Break
    words: tuple[str, ...]
    tp_size: int = field(default=1)


def write_bases(folder: Path) -> None:
    """The sound checkpoints that faults are made in."""
    write_random_checkpoint(folder / "plain", PLAIN)
    write_random_checkpoint(folder / "fp8", FP8, num_shards=3)
    shutil.copytree(folder / "plain", folder / "listed")
    write_manifest(folder / "listed")


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def write_raw(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def all_faults() -> Iterator[Fault]:
    yield from _cuts()
    yield from _lengths()
    yield from _entries()
    yield from _tensors()
    yield from _scales()
    yield from _headers()
    yield from _indexes()
    yield from _files()
    yield from _configs()
    yield from _manifests()
    for size in (3, 5, 7, 8):
        yield Fault(f"spread over {size} ranks", "plain", lambda _: None, ("num_attention_heads", str(size)), size)


def _cuts() -> Iterator[Fault]:
    def cut(name: str, keep: int | float) -> Break:
        def make(folder: Path) -> None:
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])

        return make

    for keep in (0, 1, 7, 8, 9, 100, 0.02, 0.25, 0.5, 0.75, 0.99, -8, -1):
        yield Fault(f"cut at {keep}", "plain", cut(FILE, keep), (FILE, "truncated"))
    for name in SHARDS:
        for keep in (0, 8, 0.5, -1):
            yield Fault(f"{name} cut at {keep}", "fp8", cut(name, keep), (name, "truncated"))

    def append(tail: bytes) -> Break:
        return lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes() + tail)

    for tail in (b"\0", b"12345678", bytes(4096)):
        yield Fault(f"{len(tail)} bytes too many", "plain", append(tail), (FILE, "too long"))


def _lengths() -> Iterator[Fault]:
    def lie(change: Callable[[int], int]) -> Break:
        def make(folder: Path) -> None:
            raw = (folder / FILE).read_bytes()
            length = change(int.from_bytes(raw[:8], "little"))
            (folder / FILE).write_bytes(struct.pack("<Q", length) + raw[8:])

        return make

    changes: dict[str, Callable[[int], int]] = {
        "0": lambda n: 0,
        "1": lambda n: 1,
        "half": lambda n: n // 2,
        "8 too short": lambda n: n - 8,
        "1 too long": lambda n: n + 1,
        "8 too long": lambda n: n + 8,
        "2^24": lambda n: 2**24,
        "2^24 + 1": lambda n: 2**24 + 1,
        "2^32": lambda n: 2**32,
        "2^63": lambda n: 2**63,
        "2^64 - 1": lambda n: 2**64 - 1,
    }
    for name, change in changes.items():
        yield Fault(f"header length {name}", "plain", lie(change), (FILE,))


def _entries() -> Iterator[Fault]:
    """Lies of a header about one tensor, whose data stay where they are."""

    def lie(victim: str, change: Callable[[dict[str, Any]], Any]) -> Break:
        def make(folder: Path) -> None:
            header, data = split(folder / FILE)
            change(header[victim])
            write_raw(folder / FILE, json.dumps(header).encode(), data)

        return make

    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "dtype of twice the size": lambda e: e.update(dtype="F32"),
        "dtype unknown": lambda e: e.update(dtype="BF15"),
        "dtype missing": lambda e: e.pop("dtype"),
        "shape one row longer": lambda e: e.update(shape=[e["shape"][0] + 1, *e["shape"][1:]]),
        "shape negative": lambda e: e.update(shape=[-1]),
        "shape of fractions": lambda e: e.update(shape=[2.5]),
        "shape missing": lambda e: e.pop("shape"),
        "shape overflows": lambda e: e.update(shape=[2**62, 2**62]),
        "offsets reversed": lambda e: e.update(data_offsets=e["data_offsets"][::-1]),
        "offsets a byte on": lambda e: e.update(data_offsets=[o + 1 for o in e["data_offsets"]]),
        "offsets past the end": lambda e: e.update(data_offsets=[o + 10**9 for o in e["data_offsets"]]),
        "offsets negative": lambda e: e.update(data_offsets=[o - 10**9 for o in e["data_offsets"]]),
    }
    for victim in (EXPERT, "model.norm.weight"):
        for name, change in changes.items():
            yield Fault(f"{name} of {victim}", "plain", lie(victim, change), (FILE, victim.split(".")[-2]))
    same_size: Callable[[dict[str, Any]], Any] = lambda e: e.update(dtype="I16")  # noqa: E731
    for victim in VICTIMS:
        yield Fault(f"integer type of {victim}", "plain", lie(victim, same_size), (FILE, victim, "I16"))


def _tensors() -> Iterator[Fault]:
    """Whole tensors that are missing, added, renamed, reshaped or held twice; the files themselves are sound."""

    def edit(change: Callable[[dict[str, Tensor]], Any], file: str = FILE) -> Break:
        def make(folder: Path) -> None:
            tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
            change(tensors)
            save_file(tensors, folder / file)

        return make

    def twice(victim: str) -> Break:
        return lambda folder: save_file({victim: torch.zeros(2)}, folder / "second.safetensors")

    changes: dict[str, tuple[Callable[[dict[str, Tensor], str], Any], tuple[str, ...]]] = {
        "missing": (lambda t, v: t.pop(v), ("missing",)),
        "renamed": (lambda t, v: t.update({v + "s": t.pop(v)}), (FILE, "weights", "missing")),
        "longer": (lambda t, v: t.update({v: torch.cat((t[v], t[v]))}), (FILE, "shape")),
        "flat": (lambda t, v: t.update({v: t[v].view(1, -1)}), (FILE, "shape")),
        "in float64": (lambda t, v: t.update({v: t[v].double()}), (FILE, "F64")),
        "in FP8": (lambda t, v: t.update({v: t[v].to(torch.float8_e4m3fn)}), (FILE, "F8_E4M3")),
    }
    for victim in VICTIMS:
        for name, (change, words) in changes.items():
            yield Fault(f"{victim} {name}", "plain", edit(_of(change, victim)), (victim, *words))
        yield Fault(f"{victim} held twice", "plain", twice(victim), (victim, "duplicate", "second.safetensors", FILE))
    for extra in ("model.layers.2.input_layernorm.weight", "model.layers.1.mlp.experts.4.up_proj.weight", "junk", ""):
        yield Fault(f"extra {extra!r}", "plain", edit(partial(_add, name=extra)), (FILE, extra))


def _of(change: Callable[[dict[str, Tensor], str], Any], victim: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: change(tensors, victim)


def _add(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = torch.zeros(2)


def _scales() -> Iterator[Fault]:
    def edit(weight: str, change: Callable[[Tensor], Tensor | None]) -> Break:
        name = weight + "_scale_inv"

        def make(folder: Path) -> None:
            index = json.loads((folder / INDEX_FILE).read_text())
            file = folder / index["weight_map"][name]
            tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
            scale = change(tensors.pop(name))
            if scale is None:
                del index["weight_map"][name]
                (folder / INDEX_FILE).write_text(json.dumps(index))
            else:
                tensors[name] = scale.contiguous()
            save_file(tensors, file)

        return make

    changes: dict[str, Callable[[Tensor], Tensor | None]] = {
        "missing": lambda s: None,
        "transposed or longer": lambda s: s.repeat(1, 2),
        "flat": lambda s: s.flatten(),
        "in bf16": lambda s: s.bfloat16(),
        "zero": lambda s: s * 0,
        "negative": lambda s: -s,
        "NaN": lambda s: s * torch.nan,
        "infinite": lambda s: s * torch.inf,
    }
    for weight in (EXPERT, "model.layers.0.mlp.down_proj.weight"):
        for name, change in changes.items():
            yield Fault(f"scale of {weight} {name}", "fp8", edit(weight, change), (f"{weight}_scale_inv", "expected"))


def _headers() -> Iterator[Fault]:
    def write(raw: bytes) -> Break:
        return lambda folder: write_raw(folder / FILE, raw, bytes(64))

    entry = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    headers = {
        "empty": b"",
        "no JSON": b"{",
        "a list": b"[]",
        "a number": b"7",
        "null": b"null",
        "not UTF-8": b"\xff\xfe{}",
        "NUL bytes": bytes(64),
        "deep lists": b"[" * 200_000,
        "deep objects": b'{"a":' * 100_000,
        "a key twice": b'{"x":' + entry + b',"x":' + entry + b"}",
        "a field twice": b'{"x":{"dtype":"F32","dtype":"F32","shape":[16],"data_offsets":[0,64]}}',
        "a tensor that is a number": b'{"x":1}',
        "a tensor that is null": b'{"x":null}',
        "an empty entry": b'{"x":{}}',
        "one offset": b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0]}}',
        "offsets of words": b'{"x":{"dtype":"F32","shape":[2],"data_offsets":["0","8"]}}',
        "offsets of booleans": b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[false,true]}}',
        "a number of 5,000 digits": b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
        "infinity": b'{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}',
        "data without tensors": b"{}",
    }
    for name, raw in headers.items():
        yield Fault(f"header: {name}", "plain", write(raw), (FILE,))


def _indexes() -> Iterator[Fault]:
    def write(text: str) -> Break:
        return lambda folder: (folder / INDEX_FILE).write_text(text)

    def edit(change: Callable[[dict[str, str]], Any]) -> Break:
        def make(folder: Path) -> None:
            index = json.loads((folder / INDEX_FILE).read_text())
            change(index["weight_map"])
            (folder / INDEX_FILE).write_text(json.dumps(index))

        return make

    texts = {
        "empty": "",
        "no JSON": "{",
        "a list": "[]",
        "no map": "{}",
        "a map that is a list": '{"weight_map": []}',
        "a map to numbers": '{"weight_map": {"a": 1}}',
        "an empty map": '{"weight_map": {}}',
        "a key twice": '{"weight_map": {"a": "x", "a": "y"}}',
        "a path upwards": '{"weight_map": {"a": "../../etc/passwd"}}',
        "an absolute path": '{"weight_map": {"a": "/etc/passwd"}}',
        "a name of 5,000 letters": json.dumps({"weight_map": {"a": "x" * 5000}}),
        "a name with NUL": '{"weight_map": {"a": "x\\u0000.safetensors"}}',
        "the folder itself": '{"weight_map": {"a": "."}}',
        "an empty name": '{"weight_map": {"a": ""}}',
        "deep": '{"weight_map":' * 50_000,
    }
    for name, text in texts.items():
        yield Fault(f"index: {name}", "fp8", write(text), (INDEX_FILE,))
    yield Fault("index: ghost", "fp8", edit(lambda m: m.update(ghost=SHARDS[0])), (INDEX_FILE, "ghost", SHARDS[0]))
    yield Fault("index: unlisted", "fp8", edit(lambda m: m.pop(EXPERT)), (INDEX_FILE, EXPERT))
    yield Fault(
        "index: another shard", "fp8", edit(lambda m: m.update({EXPERT: "no.safetensors"})), ("no.safetensors",)
    )
    yield Fault(
        "index: all in one", "fp8", edit(lambda m: m.update(dict.fromkeys(m, SHARDS[0]))), (INDEX_FILE, "missing")
    )
    for shard in SHARDS:
        yield Fault(f"{shard} missing", "fp8", partial(_unlink, name=shard), (shard, "does not exist"))


def _files() -> Iterator[Fault]:
    def replace_by(make: Callable[[Path], Any], name: str = FILE) -> Break:
        def change(folder: Path) -> None:
            (folder / name).unlink()
            make(folder / name)

        return change

    def rename(name: str) -> Break:
        return lambda folder: (folder / FILE).rename(folder / name)

    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4302310000\n"
    kinds: dict[str, Callable[[Path], Any]] = {
        "a git-LFS pointer": lambda p: p.write_text(pointer),
        "a web page": lambda p: p.write_text("<!DOCTYPE html><html>404</html>"),
        "a zip file": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)),
        "a pickle": lambda p: p.write_bytes(b"\x80\x04\x95" + bytes(100)),
        "a folder": lambda p: p.mkdir(),
        "a link to itself": lambda p: p.symlink_to(p.name),
        "a link to nothing": lambda p: p.symlink_to("nothing"),
        "a link to the folder": lambda p: p.symlink_to("."),
        "a named pipe": lambda p: os.mkfifo(p),
        "a device": lambda p: p.symlink_to("/dev/zero"),
    }
    for name, make in kinds.items():
        yield Fault(f"{FILE} is {name}", "plain", replace_by(make), (FILE,))
        yield Fault(f"{SHARDS[1]} is {name}", "fp8", replace_by(make, SHARDS[1]), (SHARDS[1],))
        if name not in ("a git-LFS pointer",):
            yield Fault(f"config.json is {name}", "plain", replace_by(make, "config.json"), ("config.json",))
        yield Fault(f"index is {name}", "fp8", replace_by(make, INDEX_FILE), (INDEX_FILE,))
    for name in ("pytorch_model.bin", "consolidated.pth", "model.pt", "model.gguf"):
        yield Fault(f"weights are {name}", "plain", rename(name), (name, "refused"))
    yield Fault("weights are incomplete", "plain", rename(FILE + ".incomplete"), (FILE + ".incomplete",))
    yield Fault("no weights", "plain", lambda f: (f / FILE).unlink(), ("*.safetensors",))
    yield Fault("no config", "plain", lambda f: (f / "config.json").unlink(), ("config.json",))


def _configs() -> Iterator[Fault]:
    def edit(base: dict[str, Any], **fields: Any) -> Break:
        return lambda folder: (folder / "config.json").write_text(json.dumps(base | fields))

    def write(text: str) -> Break:
        return lambda folder: (folder / "config.json").write_text(text)

    tensor_of = {
        "vocab_size": "lm_head.weight",
        "hidden_size": "model.norm.weight",
        "intermediate_size": "mlp.down_proj.weight",
        "moe_intermediate_size": "mlp.experts.0.",
        "num_hidden_layers": "model.layers.",
        "num_attention_heads": "self_attn.",
        "q_lora_rank": "q_a_layernorm.weight",
        "kv_lora_rank": "kv_a_layernorm.weight",
        "qk_nope_head_dim": "self_attn.",
        "v_head_dim": "self_attn.o_proj.weight",
        "n_routed_experts": "mlp.gate.weight",
        "n_shared_experts": "shared_experts",
        "first_k_dense_replace": "model.layers.",
    }
    for name, tensor in tensor_of.items():
        for change in {"n_routed_experts": (2, 4), "first_k_dense_replace": (1, -1)}.get(name, (1, 2, -1)):
            if PLAIN[name] + change > 0:
                changed = edit(PLAIN, **{name: PLAIN[name] + change})
                yield Fault(f"config: {name} {change:+}", "plain", changed, (tensor,))
        values: tuple[Any, ...] = ("32", -1, 0, 2**40, 0.5, True, [1], {})
        for value in values:
            if not (value == 0 and name == "first_k_dense_replace") and not (value == 0 and name == "n_shared_experts"):
                yield Fault(f"config: {name} {value!r}", "plain", edit(PLAIN, **{name: value}), (name,))
    for name in ("num_hidden_layers", "n_routed_experts"):
        yield Fault(f"config: {name} 2^30", "plain", edit(PLAIN, **{name: 2**30}), (name,))
    yield Fault("config: not quantised", "fp8", edit(PLAIN), ("F8_E4M3", "_proj.weight"))
    quant: dict[str, dict[str, Any]] = {
        "weight_block_size": {"weight_block_size": [64, 64]},
        "quant_method": {"quant_method": "gptq"},
        "fmt": {"fmt": "e5m2"},
        "scale_fmt": {"scale_fmt": "ue9m0"},
    }
    for name, fields in quant.items():
        made = edit(FP8, quantization_config=FP8_QUANTIZATION | fields)
        yield Fault(f"config: {name} {fields[name]}", "fp8", made, (name,))
    for kind in ("llama", "deepseek_v4", "", 7, None, ["deepseek_v3"]):
        yield Fault(f"config: model_type {kind!r}", "plain", edit(PLAIN, model_type=kind), ("model_type",))
    for text in ("", "{", "[]", "7", "null", "[" * 100_000, "\x00", '{"a": NaN'):
        yield Fault(f"config: {text[:9]!r}", "plain", write(text), ("config.json",))
    doubled = json.dumps(PLAIN)[:-1] + ', "hidden_size": 32}'
    yield Fault("config: a key twice", "plain", write(doubled), ("config.json", "hidden_size"))


def _manifests() -> Iterator[Fault]:
    def write(text: str) -> Break:
        return lambda folder: (folder / MANIFEST_FILE).write_text(text)

    def edit(change: Callable[[dict[str, Any]], Any]) -> Break:
        def make(folder: Path) -> None:
            manifest = json.loads((folder / MANIFEST_FILE).read_text())
            change(manifest["files"])
            (folder / MANIFEST_FILE).write_text(json.dumps(manifest))

        return make

    for text in ("", "{}", "[]", "[" * 100_000, '{"format": 1, "files": {}}'):
        yield Fault(f"manifest: {text[:26]!r}", "listed", write(text), (MANIFEST_FILE,))
    yield Fault("manifest: other size", "listed", edit(lambda m: m[FILE].update(size=7)), (MANIFEST_FILE, FILE))
    yield Fault("manifest: other sum", "listed", edit(lambda m: m[FILE].update(sha256="0" * 64)), (MANIFEST_FILE, FILE))
    yield Fault("manifest: no sum", "listed", edit(lambda m: m[FILE].pop("sha256")), (MANIFEST_FILE, FILE))
    yield Fault("manifest: ghost", "listed", edit(lambda m: m.update({"x.json": m[FILE]})), (MANIFEST_FILE, "x.json"))
    yield Fault("manifest: unlisted", "listed", edit(lambda m: m.pop(FILE)), (MANIFEST_FILE, FILE))
    yield Fault("manifest: upwards", "listed", edit(lambda m: m.update({"../x": m[FILE]})), (MANIFEST_FILE, "../x"))
    yield Fault("manifest: file grew", "listed", lambda f: _append(f / "config.json"), (MANIFEST_FILE, "config.json"))
    yield Fault("manifest: file gone", "listed", lambda f: (f / FILE).unlink(), (MANIFEST_FILE, FILE))


def _unlink(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _append(file: Path) -> None:
    file.write_text(file.read_text() + "\n")
