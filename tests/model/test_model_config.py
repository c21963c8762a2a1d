"""Reading hub configs: all served families in every spelling, and refusals that say what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hub_configs import KIMI_K2, MOONLIGHT, SERVED, V2, V2_LITE, V3, V3_1

from dsengine.model.config import ModelConfig
from dsengine.model.tensors import SCALE_SUFFIX, expected_tensors, nextn_copies, nextn_tensors


@pytest.mark.parametrize("name", SERVED)
def test_served_families_keep_their_figures(name: str) -> None:
    hub = SERVED[name]
    config = ModelConfig.from_hub(hub)
    same_names = set(hub) & set(ModelConfig.__dataclass_fields__) - {"rope_scaling"}
    assert len(same_names) > 20
    for field in same_names:
        assert getattr(config, field) == hub[field], field
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (hub["eos_token_id"],)
    assert config.latent_dim == 576
    assert config.qk_head_dim == 192


@pytest.mark.parametrize(
    ("hub", "scale"),
    [(V3, 0.13523378), (V2_LITE, 0.11472139), (KIMI_K2, 0.13086080), (MOONLIGHT, 0.07216878)],
)
def test_softmax_scale(hub: dict[str, Any], scale: float) -> None:
    assert ModelConfig.from_hub(hub).softmax_scale == pytest.approx(scale, rel=1e-6)


def test_softmax_scale_at_factor_64() -> None:
    scaling = KIMI_K2["rope_scaling"] | {"factor": 64}
    assert ModelConfig.from_hub(KIMI_K2 | {"rope_scaling": scaling}).softmax_scale == pytest.approx(
        0.14467963, rel=1e-6
    )


def test_quantization() -> None:
    assert ModelConfig.from_hub(V2).quantization is None
    plain, ue8m0 = ModelConfig.from_hub(V3).quantization, ModelConfig.from_hub(V3_1).quantization
    assert plain is not None
    assert ue8m0 is not None
    assert plain.weight_block_size == ue8m0.weight_block_size == (128, 128)
    assert (plain.scale_fmt, ue8m0.scale_fmt) == (None, "ue8m0")


def test_number_of_stored_tensors_and_parameters() -> None:
    """The table of tensors gives V3's published 91 991 tensors and V2-Lite's 15 706 484 224 parameters."""
    v3 = ModelConfig.from_hub(V3)
    weights = expected_tensors(v3) | nextn_tensors(v3) | nextn_copies(v3)
    assert len(weights) + sum(tensor.may_be_fp8 for tensor in weights.values()) == 91991
    lite = expected_tensors(ModelConfig.from_hub(V2_LITE))
    assert len(lite) == 5291
    assert sum(math.prod(tensor.shape) for tensor in lite.values()) == 15_706_484_224
    assert SCALE_SUFFIX == "_scale_inv"


def test_layers_with_experts() -> None:
    config = ModelConfig.from_hub(V3)
    assert [config.is_moe_layer(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]


def _as_transformers_5(hub: dict[str, Any]) -> dict[str, Any]:
    new = {k: v for k, v in hub.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype", "topk_method")}
    scaling = dict(hub["rope_scaling"] or {})
    kind = scaling.pop("type", "default")
    new["rope_parameters"] = scaling | {"rope_type": kind, "rope_theta": hub["rope_theta"]}
    new["dtype"] = hub["torch_dtype"]
    return new


@pytest.mark.parametrize("name", SERVED)
def test_transformers_5_spelling(name: str) -> None:
    hub = SERVED[name]
    new = _as_transformers_5(hub)
    assert ModelConfig.from_hub(new) == ModelConfig.from_hub(hub)
    both = new | {"rope_theta": hub["rope_theta"], "rope_scaling": hub["rope_scaling"]}
    assert ModelConfig.from_hub(both) == ModelConfig.from_hub(hub)


def test_other_spellings() -> None:
    scaling = {k: v for k, v in V3["rope_scaling"].items() if k != "type"} | {"rope_type": "yarn"}
    assert ModelConfig.from_hub(V3 | {"rope_scaling": scaling}) == ModelConfig.from_hub(V3)
    floats = V3 | {"hidden_size": 7168.0, "rope_theta": 10000.0, "torch_dtype": "torch.bfloat16"}
    assert ModelConfig.from_hub(floats) == ModelConfig.from_hub(V3)
    without_query_rank = {k: v for k, v in V2_LITE.items() if k != "q_lora_rank"}
    assert ModelConfig.from_hub(without_query_rank) == ModelConfig.from_hub(V2_LITE)
    assert ModelConfig.from_hub(V2_LITE | {"topk_method": "gready"}).topk_method == "greedy"
    assert ModelConfig.from_hub(KIMI_K2 | {"eos_token_id": [163585, 163586]}).eos_token_ids == (163585, 163586)
    without_eos = {k: v for k, v in V3.items() if k not in ("eos_token_id", "bos_token_id", "num_nextn_predict_layers")}
    config = ModelConfig.from_hub(without_eos)
    assert (config.eos_token_ids, config.bos_token_id, config.num_nextn_predict_layers) == ((), None, 0)


@pytest.mark.parametrize("leave_out", [("topk_method",), ("topk_method", "scoring_func")])
@pytest.mark.parametrize(("hub", "method"), [(V2_LITE, "greedy"), (V2, "group_limited_greedy"), (V3, "noaux_tc")])
def test_routing_is_derived_where_it_is_left_out(hub: dict[str, Any], method: str, leave_out: tuple[str, ...]) -> None:
    config = ModelConfig.from_hub({k: v for k, v in hub.items() if k not in leave_out})
    assert config.topk_method == method
    assert config.scoring_func == hub["scoring_func"]


def test_from_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3))
    assert ModelConfig.from_hub(tmp_path) == ModelConfig.from_hub(V3)
    assert ModelConfig.from_hub(str(tmp_path / "config.json")) == ModelConfig.from_hub(V3)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", "[" * 100_000])
def test_unreadable_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelConfig.from_hub(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        ModelConfig.from_hub(tmp_path)


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        ({"model_type": "qwen2"}, "R1-Distill"),
        ({"model_type": "qwen3"}, "R1-Distill"),
        ({"model_type": "llama"}, "R1-Distill"),
        (V3 | {"model_type": "deepseek_v32", "index_topk": 2048}, r"V3\.2.*DSA.*not supported yet"),
        (V3 | {"index_topk": 2048}, r"index_topk.*V3\.2"),
        ({"model_type": "deepseek_v4"}, "DeepSeek-V4,"),
        ({"model_type": "deepseek_v41"}, r"V4\.1"),
        ({"model_type": "deepseek"}, "no MLA"),
        ({"model_type": "mixtral"}, "'mixtral'"),
        ({}, "model_type is None"),
        ({"model_type": ["deepseek_v3"]}, "model_type is"),
        (KIMI_K2 | {"quantization_config": {"quant_method": "compressed-tensors"}}, "int4.*Kimi-K2-Thinking"),
        (V3 | {"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
    ],
)
def test_refusals_name_the_model(hub: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hub(hub)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "7168"}, "hidden_size is '7168'; it must be an integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 0}, r"hidden_size is 0; it must lie in \[1,"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 1.5}, r"num_hidden_layers is 1\.5"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; it must be even"),
        ({"n_group": 7}, r"n_group is 7; it must divide n_routed_experts \(256\)"),
        ({"topk_group": 9}, r"topk_group is 9; it must be at most n_group \(8\)"),
        ({"n_group": 256}, "n_group is 256; it must leave at least two"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok is 129; it must be at most the 128 experts"),
        ({"first_k_dense_replace": 62}, "first_k_dense_replace is 62"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2; it must be 0 or 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; it must be a finite number"),
        ({"routed_scaling_factor": -1}, "routed_scaling_factor"),
        ({"rope_theta": 1}, "rope_theta is"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type is 'linear'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": V3["rope_scaling"] | {"factor": 0.5}}, r"rope_scaling.factor is 0\.5"),
        ({"topk_method": "best"}, "topk_method is 'best'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; with topk_method 'noaux_tc' it must be 'sigmoid'"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        ({"eos_token_id": 129280}, "129280; it must be below vocab_size"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id is 'x'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        (
            {"quantization_config": V3["quantization_config"] | {"weight_block_size": [64, 64]}},
            r"it must be \[128, 128\]",
        ),
        ({"quantization_config": V3["quantization_config"] | {"scale_fmt": "e5"}}, "scale_fmt is 'e5'"),
        ({"quantization_config": V3["quantization_config"] | {"activation_scheme": "static"}}, "activation_scheme"),
    ],
)
def test_errors_name_field_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hub(V3 | change)
