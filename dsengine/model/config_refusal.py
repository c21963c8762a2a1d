"""Refusing, by name, the models that resemble DeepSeek-V3 on the hub but are something else.

Without this, R1-Distill would fail with a missing field and V3.2 would load and answer nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SERVED_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")

_SERVED = "dsengine serves DeepSeek V2, V2.5, Coder-V2, V3, R1 and V3.1, Kimi-K2 and Moonlight"
_DENSE = "an ordinary dense transformer without MLA (the R1-Distill models are of this kind)"
_REASONS = {
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "llama": _DENSE,
    "deepseek": "DeepSeek's first MoE model, which has no MLA",
    "deepseek_v32": "DeepSeek-V3.2, whose sparse attention (DSA) is not supported yet",
    "glm_moe_dsa": "GLM-5, whose sparse attention (DSA) is not supported",
    "deepseek_v4": "DeepSeek-V4, another architecture (no MLA, compressed sparse attention, hyper-connections)",
    "deepseek_v41": "DeepSeek-V4.1, another architecture (no MLA, compressed sparse attention, hyper-connections)",
    "kimi_k25": "Kimi-K2.5, a vision-language wrapper with int4 experts",
    "deepseek_vl_v2": "DeepSeek-VL2, a vision-language model",
}


def refuse_unsupported(hub: Mapping[str, Any]) -> None:
    """Raises ValueError that names the model and the reason, unless the config is of a served architecture."""
    model_type = hub.get("model_type")
    if model_type not in SERVED_TYPES:
        reason = _REASONS.get(model_type) if isinstance(model_type, str) else None
        detail = f", which is {reason}" if reason else ""
        raise ValueError(f"model_type is {model_type!r}{detail}; {_SERVED}")
    if hub.get("index_topk") is not None:
        raise ValueError(f"index_topk is {hub['index_topk']!r}: this is {_REASONS['deepseek_v32']}; {_SERVED}")
    quantization = hub.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method == "compressed-tensors":
        raise ValueError(
            "quantization_config.quant_method is 'compressed-tensors' (int4 experts, as in Kimi-K2-Thinking), "
            "which is not supported; only block-FP8 ('fp8') and unquantised checkpoints can be served"
        )
