"""Block-FP8 checkpoints: kept as stored or dequantised, they must equal the model of their dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import FP8_QUANTIZATION, TINY_CONFIGS, Session, cpu_kernels, load_tiny
from torch import Tensor

from dsengine.model.checkpoint import INDEX_FILE
from dsengine.model.dense import DenseMLP
from dsengine.model.moe import MixtureOfExperts
from dsengine.model.random_checkpoint import write_random_checkpoint, write_shards
from dsengine.model.tensors import SCALE_SUFFIX
from dsengine.quant.block_fp8 import dequantize_block_fp8

# Every linear layer has ragged blocks: 200 columns, 136 rows of latents and rope, 72 wide experts …
RAGGED = {
    "hidden_size": 200,
    "intermediate_size": 328,
    "moe_intermediate_size": 72,
    "kv_lora_rank": 120,
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
}
# … and here fused projections end at block edges, as in V3.
ALIGNED = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 120,
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
}


def fp8_config(name: str, sizes: dict[str, Any], scale_fmt: str | None = None) -> dict[str, Any]:
    quantization = FP8_QUANTIZATION | ({"scale_fmt": scale_fmt} if scale_fmt else {})
    return TINY_CONFIGS[name] | sizes | {"quantization_config": quantization}


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def write_dequantized(source: Path, target: Path) -> None:
    """The same model, dequantised by the formula rather than by the loader, as an unquantised checkpoint."""
    hub = json.loads((source / "config.json").read_text())
    del hub["quantization_config"]
    target.mkdir()
    (target / "config.json").write_text(json.dumps(hub))
    stored = stored_tensors(source)
    plain = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        scale = stored.get(name + SCALE_SUFFIX)
        if scale is not None:
            rows, columns = tensor.shape
            each = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            tensor = tensor.float() * each
        plain[name] = tensor
    write_shards(target, [plain])


def logits_of(folder: Path, **options: Any) -> Tensor:
    session = Session(load_tiny(folder, **options), max_tokens=64, num_requests=1)
    tokens = torch.randint(0, 320, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.cat([session.run([(0, tokens[:30])])[0], session.run([(0, tokens[30:])], num_decodes=1)[0]])


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize(("name", "sizes"), [("v2_lite", RAGGED), ("v3", RAGGED), ("v3", ALIGNED)])
def test_equal_to_its_own_dequantisation(
    tmp_path: Path, name: str, sizes: dict[str, Any], scale_fmt: str | None
) -> None:
    write_random_checkpoint(tmp_path / "fp8", fp8_config(name, sizes, scale_fmt), seed=1, num_shards=3)
    write_dequantized(tmp_path / "fp8", tmp_path / "plain")
    expected = logits_of(tmp_path / "plain")
    assert torch.equal(logits_of(tmp_path / "fp8", weight_format="dequantized"), expected)
    assert torch.equal(logits_of(tmp_path / "fp8", weight_format="auto"), expected)
    kept = logits_of(tmp_path / "fp8", weight_format="fp8")
    torch.testing.assert_close(kept, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ["cpu", "ref"])
def test_backends_of_fp8_operations(tmp_path: Path, backend: str) -> None:
    write_random_checkpoint(tmp_path, fp8_config("v3", RAGGED), num_shards=2)
    expected = logits_of(tmp_path, weight_format="dequantized")
    kernels = cpu_kernels(gemm_fp8_block=backend, moe_experts=backend)
    got = logits_of(tmp_path, weight_format="fp8", kernels=kernels)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_scales_lie_in_other_shards_than_their_weights(tmp_path: Path) -> None:
    """What the other tests rely on."""
    write_random_checkpoint(tmp_path, fp8_config("v3", RAGGED), num_shards=3)
    weight_map = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    scales = [name for name in weight_map if name.endswith(SCALE_SUFFIX)]
    assert len(scales) > 50
    assert all(weight_map[name] != weight_map[name.removesuffix(SCALE_SUFFIX)] for name in scales)
    assert set(weight_map.values()) == {f"model-{i:05d}-of-000003.safetensors" for i in (1, 2, 3)}


def test_memory_holds_the_stored_codes(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, fp8_config("v3", RAGGED), num_shards=2)
    stored = stored_tensors(tmp_path)
    model = load_tiny(tmp_path, weight_format="fp8")
    moe, dense = model.layers[1].mlp, model.layers[0].mlp
    assert isinstance(moe, MixtureOfExperts)
    assert isinstance(dense, DenseMLP)
    for expert in range(8):
        prefix = f"model.layers.1.mlp.experts.{expert}."
        gate, up, down = (stored[f"{prefix}{kind}_proj.weight"] for kind in ("gate", "up", "down"))
        assert torch.equal(moe.w_gate_up[expert].float(), torch.cat((gate, up)).float())
        assert torch.equal(moe.w_down[expert].float(), down.float())
        assert moe.w_gate_up_scale is not None
        assert moe.w_down_scale is not None
        assert torch.equal(moe.w_gate_up_scale[expert, 1], stored[f"{prefix}up_proj.weight{SCALE_SUFFIX}"])
        assert torch.equal(moe.w_down_scale[expert], stored[f"{prefix}down_proj.weight{SCALE_SUFFIX}"])
    attention = model.layers[0].attention
    for linear in (attention.qkv_a, attention.o_proj, dense.mlp.gate_up, dense.mlp.down):
        assert linear.weight.dtype == torch.float8_e4m3fn
        assert linear.scale is not None
    assert attention.kv_b.dtype == torch.float32  # both forms of attention multiply by it in every step
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    expected = dequantize_block_fp8(stored[name], stored[name + SCALE_SUFFIX], dtype=torch.float32)
    assert torch.equal(attention.kv_b, expected)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.nextn is not None
    assert model.nextn.eh_proj.scale is None


def test_dequantised_to_bfloat16(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, fp8_config("v3", ALIGNED), num_shards=2)
    stored = stored_tensors(tmp_path)
    model = load_tiny(tmp_path, weight_format="dequantized", dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.o_proj.weight"
    exact = dequantize_block_fp8(stored[name], stored[name + SCALE_SUFFIX], dtype=torch.float32)
    assert torch.equal(model.layers[0].attention.o_proj.weight, exact.bfloat16())


@pytest.mark.parametrize("weight_format", ["fp8", "dequantized"])
def test_partly_quantised_checkpoint(tmp_path: Path, weight_format: str) -> None:
    """A checkpoint may leave some layers unquantised; a fused parameter stays FP8 only if all its parts are FP8."""
    write_random_checkpoint(tmp_path / "fp8", fp8_config("v3", RAGGED))
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    for name in ("layers.0.self_attn.o_proj", "layers.0.mlp.up_proj", "layers.1.mlp.experts.5.down_proj"):
        weight, scale = f"model.{name}.weight", f"model.{name}.weight{SCALE_SUFFIX}"
        tensors[weight] = dequantize_block_fp8(tensors[weight], tensors.pop(scale), dtype=torch.float32)
    write_shards(tmp_path / "fp8", [tensors])
    write_dequantized(tmp_path / "fp8", tmp_path / "plain")
    got = logits_of(tmp_path / "fp8", weight_format=weight_format)
    torch.testing.assert_close(got, logits_of(tmp_path / "plain"), atol=2e-5, rtol=0)


def test_fp8_format_of_an_unquantised_checkpoint_changes_nothing(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, TINY_CONFIGS["v2"])
    assert torch.equal(logits_of(tmp_path, weight_format="fp8"), logits_of(tmp_path))
