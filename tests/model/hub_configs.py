"""config.json of the published models, as far as an engine reads them (from model cards and inventories)."""

from __future__ import annotations

from typing import Any


def _yarn(factor: float = 40, mscale: float = 1.0, beta_fast: int = 32) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "beta_fast": beta_fast,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


_MLA: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_layer_freq": 1,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "ep_size": 1,
    "pretraining_tp": 1,
}
_SOFTMAX: dict[str, Any] = {"scoring_func": "softmax", "norm_topk_prob": False}
_NOAUX: dict[str, Any] = {"scoring_func": "sigmoid", "norm_topk_prob": True, "topk_method": "noaux_tc"}
_FP8: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}

V2_LITE = (
    _MLA
    | _SOFTMAX
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "rope_scaling": _yarn(mscale=0.707),
        "bos_token_id": 100000,
        "eos_token_id": 100001,
    }
)

V2 = (
    _MLA
    | _SOFTMAX
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "first_k_dense_replace": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "rope_scaling": _yarn(),
        "bos_token_id": 100000,
        "eos_token_id": 100001,
    }
)

V3 = (
    _MLA
    | _NOAUX
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "quantization_config": _FP8,
        "rope_scaling": _yarn(),
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
)

V3_1 = V3 | {"quantization_config": _FP8 | {"scale_fmt": "ue8m0"}}

KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "rope_theta": 50000.0,
    "rope_scaling": _yarn(factor=32.0, beta_fast=1),
    "max_position_embeddings": 131072,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
}

MOONLIGHT = (
    _MLA
    | _NOAUX
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 8192,
        "bos_token_id": 163584,
        "eos_token_id": 163586,
    }
)

SERVED: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": V2_LITE,
    "DeepSeek-Coder-V2-Lite": V2_LITE,
    "DeepSeek-V2.5": V2,
    "DeepSeek-V3": V3,
    "DeepSeek-V3.1": V3_1,
    "Kimi-K2-Instruct": KIMI_K2,
    "Moonlight-16B-A3B": MOONLIGHT,
}
