"""Converted checkpoints: what each weight becomes, what the files look like, what Hugging Face computes with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import FP8_QUANTIZATION, TINY_CONFIGS, Session, load_tiny, save_hf_model
from torch import Tensor

from dsengine.model import conversion
from dsengine.model.checkpoint import INDEX_FILE, CheckpointError, read_checkpoint
from dsengine.model.conversion import convert_checkpoint
from dsengine.model.manifest import verify_manifest
from dsengine.model.random_checkpoint import write_random_checkpoint
from dsengine.model.tensors import SCALE_SUFFIX
from dsengine.quant.block_fp8 import dequantize_block_fp8, is_ue8m0

# Ragged blocks in both directions, and a matrix of more rows than one panel has.
SIZES = {"hidden_size": 200, "intermediate_size": 2120, "num_hidden_layers": 2, "n_routed_experts": 8}
PLAIN = TINY_CONFIGS["v3"] | SIZES | {"torch_dtype": "bfloat16"}
FP8 = PLAIN | {"quantization_config": FP8_QUANTIZATION}


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def logits_of(folder: Path, tokens: list[int]) -> Tensor:
    return Session(load_tiny(folder), max_tokens=64, num_requests=1).run([(0, tokens)])[0]


def test_to_bf16_is_the_reference_dequantisation(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "fp8", FP8, num_shards=3)
    before = stored_tensors(tmp_path / "fp8")
    done = convert_checkpoint(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    after = stored_tensors(tmp_path / "bf16")
    assert after.keys() == {name for name in before if not name.endswith(SCALE_SUFFIX)}
    assert done.converted == sum(name.endswith(SCALE_SUFFIX) for name in before) > 0
    for name, tensor in after.items():
        if before[name].dtype == torch.float8_e4m3fn:
            assert torch.equal(tensor, dequantize_block_fp8(before[name], before[name + SCALE_SUFFIX]))
        else:
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_round_trip_stays_within_the_format(tmp_path: Path, scale_fmt: Any) -> None:
    """e4m3 has 3 bits after the leading one: half a step is 1/16 of the value, or of the block's smallest normal."""
    write_random_checkpoint(tmp_path / "plain", PLAIN)
    convert_checkpoint(tmp_path / "plain", tmp_path / "fp8", "fp8", scale_fmt)
    convert_checkpoint(tmp_path / "fp8", tmp_path / "back", "bf16")
    plain, fp8, back = (stored_tensors(tmp_path / name) for name in ("plain", "fp8", "back"))
    assert back.keys() == plain.keys()
    for name, tensor in plain.items():
        if name + SCALE_SUFFIX not in fp8:
            assert torch.equal(back[name], tensor)
            continue
        scale = fp8[name + SCALE_SUFFIX]
        assert scale_fmt is None or is_ue8m0(scale)
        limit = tensor.float().abs() / 16 * 1.07 + scale.max() * 2**-10  # 1.07: bf16 rounds once more
        assert ((back[name].float() - tensor.float()).abs() <= limit).all(), name
    again = tmp_path / "again"
    convert_checkpoint(tmp_path / "back", again, "fp8", "ue8m0" if scale_fmt else None)
    if scale_fmt:  # such values are exact in bf16: a second round changes no weight
        second = stored_tensors(again)
        for name in (name for name in plain if name + SCALE_SUFFIX in fp8):
            first, then = ((t[name], t[name + SCALE_SUFFIX]) for t in (fp8, second))
            assert torch.equal(
                dequantize_block_fp8(*first, dtype=torch.float32), dequantize_block_fp8(*then, dtype=torch.float32)
            )


def test_logits_are_hugging_faces_on_the_dequantised_weights(tmp_path: Path) -> None:
    save_hf_model("v3", tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "fp8", "fp8", "ue8m0")
    convert_checkpoint(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "bf16", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    tokens = torch.randint(0, 320, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    for folder in ("fp8", "bf16"):
        torch.testing.assert_close(logits_of(tmp_path / folder, tokens), expected, atol=5e-5, rtol=0)
    assert (logits_of(tmp_path / "hf", tokens) - expected).abs().max() > 1e-3  # the rounding is there to be seen


def test_shards_index_and_other_files(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "plain", PLAIN)
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    (tmp_path / "plain" / "pytorch_model.bin").write_bytes(b"not ours")
    steps: list[tuple[int, int]] = []
    done = convert_checkpoint(
        tmp_path / "plain",
        tmp_path / "fp8",
        "fp8",
        max_shard_bytes=500_000,
        progress=lambda done, total: steps.append((done, total)),
    )
    files = sorted(path.name for path in (tmp_path / "fp8").glob("*.safetensors"))
    assert done.shards == len(files) > 3 and files[0] == f"model-00001-of-{len(files):06d}.safetensors"
    tensors = read_checkpoint(tmp_path / "fp8")  # proves headers, index and sizes
    for name in files:
        assert sum(tensor.num_bytes for tensor in tensors.values() if tensor.file.name == name) <= 500_000
    index = json.loads((tmp_path / "fp8" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.num_bytes for tensor in tensors.values())
    assert (tmp_path / "fp8" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "fp8" / "pytorch_model.bin").exists()
    assert verify_manifest(tmp_path / "fp8", "on") > 0
    assert steps[-1] == (done.bytes_read, done.bytes_read) and steps == sorted(steps)
    load_tiny(tmp_path / "fp8")


def test_nothing_remains_of_a_conversion_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoint(tmp_path / "plain", PLAIN)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_manifest", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(tmp_path / "plain", tmp_path / "fp8", "fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "plain", PLAIN)
    write_random_checkpoint(tmp_path / "fp8", FP8)
    with pytest.raises(CheckpointError, match="is not quantised; there is nothing to convert to bf16"):
        convert_checkpoint(tmp_path / "plain", tmp_path / "new", "bf16")
    with pytest.raises(CheckpointError, match="is quantised already"):
        convert_checkpoint(tmp_path / "fp8", tmp_path / "new", "fp8")
    with pytest.raises(ValueError, match="exists; the converted checkpoint needs a folder of its own"):
        convert_checkpoint(tmp_path / "plain", tmp_path / "fp8", "fp8")
    with pytest.raises(ValueError, match="only FP8 weights have scales"):
        convert_checkpoint(tmp_path / "fp8", tmp_path / "new", "bf16", "ue8m0")
    (tmp_path / "new.incomplete").mkdir()
    with pytest.raises(ValueError, match=r"new\.incomplete is left from a conversion that did not end"):
        convert_checkpoint(tmp_path / "plain", tmp_path / "new", "fp8")


def test_a_weight_that_cannot_be_quantised_is_named(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "plain", PLAIN)
    file = tmp_path / "plain" / "model.safetensors"
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    stored = next(t for t in read_checkpoint(tmp_path / "plain").values() if t.name == name)
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    at = 8 + int.from_bytes(file.read_bytes()[:8], "little") + header[name]["data_offsets"][0]
    data = bytearray(file.read_bytes())
    data[at : at + 2] = b"\xff\x7f"  # a NaN in bfloat16
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{stored.file.name}: tensor '{name}': weight holds a NaN"):
        convert_checkpoint(tmp_path / "plain", tmp_path / "new", "fp8")
    assert not list(tmp_path.glob("new*"))


_CONVERT = """
import resource, sys
from pathlib import Path
from dsengine.model.conversion import convert_checkpoint
source, target = map(Path, sys.argv[1:])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint(source, target, "fp8")
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_a_matrix(tmp_path: Path) -> None:
    """A matrix of 128 MB in float32 is quantised in panels of 8 MB; all of it at once would take over 300 MB more."""
    rows = 65536
    write_random_checkpoint(tmp_path / "plain", PLAIN | {"intermediate_size": rows, "hidden_size": 512})
    command = [sys.executable, "-c", _CONVERT, str(tmp_path / "plain"), str(tmp_path / "fp8")]
    words = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    before, after = (int(word) * 1024 for word in words)
    mapped = (tmp_path / "plain" / "model.safetensors").stat().st_size  # pages of the files count while they are mapped
    assert after - before < mapped + 100e6
