"""The shipped checkpoint: names, shapes and dtypes of the hub layout, and its size."""

import json
import struct

import pytest
import torch

from dsengine.demo import CHECKPOINT_DIR
from dsengine.demo.export import hub_config, hub_tensors, nextn_parameters, trunk_parameters
from dsengine.demo.model import DemoConfig, DemoModel

DTYPES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
KEPT_WIDE = ("embed_tokens", "lm_head", "norm.weight", "layernorm.weight", "mlp.gate.", "eh_proj")


@pytest.fixture(scope="module")
def header():
    with (CHECKPOINT_DIR / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries


def test_size_budget():
    assert sum(path.stat().st_size for path in CHECKPOINT_DIR.iterdir()) <= 15_500_000


def test_header_is_what_the_export_writes(header):
    model = DemoModel(DemoConfig())
    expected = hub_tensors((*trunk_parameters(model), *nextn_parameters(model)))
    assert header.keys() == expected.keys()
    for name, tensor in expected.items():
        assert header[name]["shape"] == list(tensor.shape), name
        assert header[name]["dtype"] == DTYPES[tensor.dtype], name


def test_fp8_weights_have_ceil_divided_scales(header):
    for name, entry in header.items():
        if name.endswith("weight_scale_inv"):
            rows, columns = header[name.removesuffix("_scale_inv")]["shape"]
            assert entry["shape"] == [-(-rows // 128), -(-columns // 128)]
            assert entry["dtype"] == "F32"
        elif name.endswith("e_score_correction_bias"):
            assert entry["dtype"] == "F32"
        elif any(part in name for part in (*KEPT_WIDE, "enorm", "hnorm")):
            assert entry["dtype"] == "BF16", name
        else:
            assert entry["dtype"] == "F8_E4M3" and f"{name}_scale_inv" in header, name


def test_nextn_layer_is_present(header):
    names = {name.removeprefix("model.layers.4.") for name in header if name.startswith("model.layers.4.")}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} <= names
    assert header["model.layers.4.eh_proj.weight"]["shape"] == [256, 512]


def test_config_is_the_code_and_loads_in_transformers():
    config = json.loads((CHECKPOINT_DIR / "config.json").read_text())
    assert config == hub_config(DemoConfig())
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoConfig.from_pretrained(CHECKPOINT_DIR)
    assert loaded.model_type == "deepseek_v3" and loaded.rope_parameters["rope_type"] == "yarn"
