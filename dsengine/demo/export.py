"""Writes a training run as a hub-format DeepSeek-V3 checkpoint: `python -m dsengine.demo.export RUN_DIR [OUT_DIR]`.

Linear weights become block-FP8 with `weight_scale_inv`; embeddings, head, router, eh_proj and norms bf16; the router
bias float32. `shared_head.head` and the NextN `embed_tokens` equal the main ones in DeepSeek's checkpoints and are left
out here, as a loader aliases them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from dsengine.demo import CHECKPOINT_DIR
from dsengine.demo.model import Attention, DemoConfig, DemoModel, Layer, Mlp, Moe
from dsengine.demo.tokenizer import save_tokenizer
from dsengine.model.manifest import write_manifest
from dsengine.quant.block_fp8 import dequantize_block_fp8, quantize_block_fp8

Tensors = dict[str, Tensor]
ATTENTION_MATRICES = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def hub_config(config: DemoConfig) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": config.routed_scaling_factor,
        "first_k_dense_replace": config.first_k_dense_replace,
        "moe_layer_freq": 1,
        "ep_size": 1,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": int(config.rope_theta),
        "rope_scaling": {
            "type": "yarn",
            "factor": int(config.yarn_factor),
            "original_max_position_embeddings": config.yarn_original,
            "beta_fast": int(config.yarn_beta_fast),
            "beta_slow": int(config.yarn_beta_slow),
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    }


GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "do_sample": False,
}


@dataclass(frozen=True)
class Stored:
    """A parameter of the model, or a part of one, and how a checkpoint holds it: "fp8", "bf16" or "float32"."""

    name: str
    value: Tensor
    form: str


def gated(prefix: str, gate_up: Tensor, down: Tensor) -> Iterator[Stored]:
    gate, up = gate_up.chunk(2)
    for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        yield Stored(f"{prefix}.{name}.weight", weight, "fp8")


def attention_parameters(prefix: str, attention: Attention) -> Iterator[Stored]:
    for name in ATTENTION_MATRICES:
        yield Stored(f"{prefix}.{name}.weight", getattr(attention, name), "fp8")
    yield Stored(f"{prefix}.q_a_layernorm.weight", attention.q_a_layernorm.weight, "bf16")
    yield Stored(f"{prefix}.kv_a_layernorm.weight", attention.kv_a_layernorm.weight, "bf16")


def moe_parameters(prefix: str, moe: Moe) -> Iterator[Stored]:
    yield Stored(f"{prefix}.gate.weight", moe.gate, "bf16")
    yield Stored(f"{prefix}.gate.e_score_correction_bias", moe.bias, "float32")
    for index, (gate_up, down) in enumerate(zip(moe.experts_gate_up, moe.experts_down, strict=True)):
        yield from gated(f"{prefix}.experts.{index}", gate_up, down)
    yield from gated(f"{prefix}.shared_experts", moe.shared_experts.gate_up_proj, moe.shared_experts.down_proj)


def layer_parameters(prefix: str, layer: Layer) -> Iterator[Stored]:
    yield Stored(f"{prefix}.input_layernorm.weight", layer.input_layernorm.weight, "bf16")
    yield Stored(f"{prefix}.post_attention_layernorm.weight", layer.post_attention_layernorm.weight, "bf16")
    yield from attention_parameters(f"{prefix}.self_attn", layer.self_attn)
    if isinstance(layer.mlp, Mlp):
        yield from gated(f"{prefix}.mlp", layer.mlp.gate_up_proj, layer.mlp.down_proj)
    else:
        yield from moe_parameters(f"{prefix}.mlp", layer.mlp)


def trunk_parameters(model: DemoModel) -> Iterator[Stored]:
    yield Stored("model.embed_tokens.weight", model.embed_tokens, "bf16")
    yield Stored("model.norm.weight", model.norm.weight, "bf16")
    yield Stored("lm_head.weight", model.lm_head, "bf16")
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        yield from layer_parameters(f"model.layers.{index}", layer)


def nextn_parameters(model: DemoModel) -> Iterator[Stored]:
    prefix = f"model.layers.{model.config.num_hidden_layers}"
    yield from layer_parameters(prefix, model.nextn)
    yield Stored(f"{prefix}.enorm.weight", model.enorm.weight, "bf16")
    yield Stored(f"{prefix}.hnorm.weight", model.hnorm.weight, "bf16")
    yield Stored(f"{prefix}.eh_proj.weight", model.eh_proj, "bf16")
    yield Stored(f"{prefix}.shared_head.norm.weight", model.nextn_norm.weight, "bf16")


@torch.no_grad()
def hub_tensors(parameters: Iterable[Stored]) -> Tensors:
    out: Tensors = {}
    for stored in parameters:
        if stored.form == "fp8":
            values, scales = quantize_block_fp8(stored.value.float(), (128, 128))
            out[stored.name], out[f"{stored.name}_scale_inv"] = values.contiguous(), scales.contiguous()
        else:
            dtype = torch.bfloat16 if stored.form == "bf16" else torch.float32
            out[stored.name] = stored.value.to(dtype).clone().contiguous()
    return out


@torch.no_grad()
def load_export(directory: Path) -> tuple[DemoModel, Tokenizer]:
    """The model of an exported checkpoint in its training form, with the values that the checkpoint holds."""
    tensors = load_file(directory / "model.safetensors")
    model = DemoModel(DemoConfig())
    for stored in (*trunk_parameters(model), *nextn_parameters(model)):
        value = tensors[stored.name]
        if stored.form == "fp8":
            value = dequantize_block_fp8(value, tensors[f"{stored.name}_scale_inv"], (128, 128))
        stored.value.copy_(value)
    return model, Tokenizer.from_file(str(directory / "tokenizer.json"))


def save_tensors(tensors: Tensors, directory: Path) -> None:
    partial = directory / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(directory / "model.safetensors")


def export(model: DemoModel, tokenizer: Tokenizer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(hub_tensors((*trunk_parameters(model), *nextn_parameters(model))), directory)
    for name, content in (("config", hub_config(model.config)), ("generation_config", GENERATION_CONFIG)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, directory)
    write_manifest(directory)


def load_run(directory: Path) -> tuple[DemoModel, Tokenizer, int]:
    """Model, tokenizer and step of a training run."""
    state = torch.load(directory / "state.pt", weights_only=True)
    model = DemoModel(DemoConfig())
    model.load_state_dict(state["model"])
    return model.eval(), Tokenizer.from_file(str(directory / "tokenizer.json")), state["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=CHECKPOINT_DIR)
    arguments = parser.parse_args()
    model, tokenizer, step = load_run(arguments.run)
    export(model, tokenizer, arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"exported step {step} to {arguments.out}: {size} bytes")


if __name__ == "__main__":
    main()
