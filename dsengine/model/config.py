"""What a checkpoint's config.json says, checked once, in one frozen object that the rest of the code can trust.

Hub configs of one architecture come in several spellings: DeepSeek's own (`rope_scaling` + `rope_theta`,
`torch_dtype`), the one of transformers 5 (`rope_parameters`, `dtype`, no `topk_method` for V3) and derivatives that
leave out what they do not use. All are read here and nowhere else; what this engine cannot serve is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsengine.model.checkpoint import is_regular, unique_keys
from dsengine.model.config_reader import ConfigReader
from dsengine.model.config_refusal import refuse_unsupported

TopkMethod = Literal["greedy", "group_limited_greedy", "noaux_tc"]
ScoringFunc = Literal["softmax", "sigmoid"]
StoredDType = Literal["bfloat16", "float16", "float32"]

LATENT_NORM_EPS = 1e-6
"""Epsilon of q_a_layernorm and kv_a_layernorm: the remote code builds them with its default, whatever rms_norm_eps
says (Kimi-K2 and Moonlight set 1e-5 there)."""


_MAX_EXPERTS = 131_072
"""In all layers together, eight times DeepSeek-V3's: a lie about either number must not cost minutes and gigabytes."""


def yarn_mscale(factor: float, mscale: float) -> float:
    """Amplitude correction of YaRN: 0.1 * mscale * ln(factor) + 1 where the context is stretched, else 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class YarnScaling:
    """The `rope_scaling` block of type yarn."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    @property
    def attention_factor(self) -> float:
        """Factor on cos and sin; 1.0 for every published checkpoint of this family."""
        return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)


@dataclass(frozen=True)
class Fp8Quantization:
    """Block-FP8 weights: e4m3 values, one float32 scale per block of rows × columns.

    Attributes:
        scale_fmt: "ue8m0" where scales (of activations too) are powers of two, else None.
    """

    weight_block_size: tuple[int, int]
    scale_fmt: Literal["ue8m0"] | None


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V2/V3-architecture model, under the config's own names.

    Build it with `from_hub`; the constructor does not check.

    Attributes:
        q_lora_rank: None where queries come from one plain projection (V2-Lite, Moonlight).
        n_shared_experts: 0 where there are none.
        dtype: type the checkpoint names for its unquantised weights.
        rope_scaling: None where positions are not stretched.
        quantization: None where no weight is quantised.
        eos_token_ids: any of these ends a generation; () where the config names none.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    topk_method: TopkMethod
    scoring_func: ScoringFunc
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: YarnScaling | None
    quantization: Fp8Quantization | None
    dtype: StoredDType
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hub(cls, config: Mapping[str, Any] | str | Path) -> ModelConfig:
        """Reads a hub config: its dictionary, the path of config.json, or of the folder that holds it.

        Raises:
            ValueError: a model of another architecture, or a field that is missing, of the wrong type or inconsistent.
        """
        hub = config if isinstance(config, Mapping) else read_config_file(Path(config))
        refuse_unsupported(hub)
        return _build(ConfigReader(hub))

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one token in the KV cache: latent, then rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-½ · m², with m YaRN's amplitude for all dimensions (DeepSeek-V2's remote code)."""
        scale = 1.0 / math.sqrt(self.qk_head_dim)
        if self.rope_scaling is None or not self.rope_scaling.mscale_all_dim:
            return scale
        m = yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim)
        return scale * m * m

    @property
    def has_router_bias(self) -> bool:
        return self.topk_method == "noaux_tc"

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts, which are one fused MLP."""
        return self.n_shared_experts * self.moe_intermediate_size

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (the NextN layer is `num_hidden_layers`) has experts."""
        return layer >= self.first_k_dense_replace


def read_config_file(path: Path) -> dict[str, Any]:
    """The dictionary in config.json; `path` is the file or its folder."""
    file = path / "config.json" if path.is_dir() else path
    if not is_regular(file):
        raise ValueError(f"{file} does not exist; a checkpoint folder must hold config.json")
    try:
        hub = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(hub, dict):
        raise ValueError(f"{file} holds a JSON {type(hub).__name__}; it must hold an object")
    return hub


def _build(hub: ConfigReader) -> ModelConfig:
    scoring_func, topk_method = _routing(hub)
    yarn = _yarn(hub)
    config = ModelConfig(
        model_type=hub.string("model_type"),
        vocab_size=hub.integer("vocab_size"),
        hidden_size=hub.integer("hidden_size"),
        intermediate_size=hub.integer("intermediate_size"),
        moe_intermediate_size=hub.integer("moe_intermediate_size"),
        num_hidden_layers=hub.integer("num_hidden_layers"),
        num_nextn_predict_layers=hub.integer("num_nextn_predict_layers", default=0, minimum=0),
        first_k_dense_replace=hub.integer("first_k_dense_replace", default=0, minimum=0),
        num_attention_heads=hub.integer("num_attention_heads"),
        q_lora_rank=hub.optional_integer("q_lora_rank"),
        kv_lora_rank=hub.integer("kv_lora_rank"),
        qk_nope_head_dim=hub.integer("qk_nope_head_dim"),
        qk_rope_head_dim=hub.integer("qk_rope_head_dim"),
        v_head_dim=hub.integer("v_head_dim"),
        n_routed_experts=hub.integer("n_routed_experts"),
        n_shared_experts=hub.integer("n_shared_experts", default=0, minimum=0),
        num_experts_per_tok=hub.integer("num_experts_per_tok"),
        n_group=hub.integer("n_group", default=1),
        topk_group=hub.integer("topk_group", default=1),
        topk_method=topk_method,
        scoring_func=scoring_func,
        norm_topk_prob=hub.boolean("norm_topk_prob", default=scoring_func == "sigmoid"),
        routed_scaling_factor=hub.number("routed_scaling_factor", default=1.0),
        rms_norm_eps=hub.number("rms_norm_eps", default=1e-6),
        max_position_embeddings=hub.integer("max_position_embeddings"),
        rope_theta=hub.rope_theta(),
        rope_scaling=yarn,
        quantization=_quantization(hub),
        dtype=_dtype(hub),
        bos_token_id=hub.optional_integer("bos_token_id", minimum=0),
        eos_token_ids=hub.integer_list("eos_token_id"),
    )
    _check_fixed_choices(hub)
    _check_consistency(config)
    return config


def _routing(hub: ConfigReader) -> tuple[ScoringFunc, TopkMethod]:
    """Scoring and selection; both follow from the family where the config leaves them out (transformers 5 does)."""
    is_v2 = hub.string("model_type") == "deepseek_v2"
    scoring = hub.choice("scoring_func", ("softmax", "sigmoid"), default="softmax" if is_v2 else "sigmoid")
    grouped = hub.integer("n_group", default=1) > 1
    v2_method = "group_limited_greedy" if grouped else "greedy"
    default = v2_method if is_v2 else "noaux_tc"
    hub_method = hub.string("topk_method", default=default)
    if hub_method == "gready":  # the spelling of the remote code's default
        hub_method = "greedy"
    methods: tuple[TopkMethod, ...] = ("greedy", "group_limited_greedy", "noaux_tc")
    for method in methods:
        if hub_method == method:
            needed: ScoringFunc = "sigmoid" if method == "noaux_tc" else "softmax"
            if scoring != needed:
                raise ValueError(f"scoring_func is {scoring!r}; with topk_method {method!r} it must be {needed!r}")
            return needed, method
    raise ValueError(f"topk_method is {hub_method!r}; it must be one of {', '.join(methods)}")


def _yarn(hub: ConfigReader) -> YarnScaling | None:
    scaling = hub.rope_scaling()
    if scaling is None:
        return None
    kind = scaling.string("rope_type", default=scaling.string("type", default="default"))
    if kind in ("default", "none"):
        return None
    if kind != "yarn":
        raise ValueError(f"{scaling.prefix}rope_type is {kind!r}; it must be 'yarn' or 'default'")
    return YarnScaling(
        factor=scaling.number("factor", minimum=1.0),
        original_max_position_embeddings=scaling.integer("original_max_position_embeddings"),
        beta_fast=scaling.number("beta_fast", default=32.0),
        beta_slow=scaling.number("beta_slow", default=1.0),
        mscale=scaling.number("mscale", default=1.0, minimum=0.0),
        mscale_all_dim=scaling.number("mscale_all_dim", default=0.0, minimum=0.0),
    )


def _quantization(hub: ConfigReader) -> Fp8Quantization | None:
    quant = hub.section("quantization_config")
    if quant is None:
        return None
    method = quant.string("quant_method")
    if method != "fp8":
        raise ValueError(f"{quant.prefix}quant_method is {method!r}; only block-FP8 ('fp8') checkpoints can be served")
    quant.choice("fmt", ("e4m3", "float8_e4m3fn"), default="e4m3")
    quant.choice("activation_scheme", ("dynamic",), default="dynamic")
    block = quant.integer_list("weight_block_size")
    if block != (128, 128):
        raise ValueError(f"{quant.prefix}weight_block_size is {list(block)}; it must be [128, 128]")
    scale_fmt = quant.choice("scale_fmt", ("ue8m0", "float32"), default="float32")
    return Fp8Quantization(weight_block_size=(128, 128), scale_fmt="ue8m0" if scale_fmt == "ue8m0" else None)


def _dtype(hub: ConfigReader) -> StoredDType:
    key = "dtype" if hub.has("dtype") else "torch_dtype"
    name = hub.string(key, default="bfloat16").removeprefix("torch.")
    known: tuple[StoredDType, ...] = ("bfloat16", "float16", "float32")
    for dtype in known:
        if name == dtype:
            return dtype
    raise ValueError(f"{key} is {name!r}; it must be one of {', '.join(known)}")


def _check_fixed_choices(hub: ConfigReader) -> None:
    hub.choice("hidden_act", ("silu",), default="silu")
    fixed: tuple[tuple[str, bool | int], ...] = (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("tie_word_embeddings", False),
        ("rope_interleave", True),
        ("moe_layer_freq", 1),
    )
    for name, right in fixed:
        value = hub.get(name)
        if value is not None and value != right:
            raise ValueError(f"{name} is {value!r}; only {right!r} is supported")


def _check_consistency(config: ModelConfig) -> None:
    experts, groups = config.n_routed_experts, config.n_group
    selectable = experts // groups * config.topk_group if config.topk_method != "greedy" else experts
    checks: tuple[tuple[bool, str, Any, str], ...] = (
        (config.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", config.qk_rope_head_dim, "be even"),
        (experts % groups == 0, "n_group", groups, f"divide n_routed_experts ({experts})"),
        (config.topk_group <= groups, "topk_group", config.topk_group, f"be at most n_group ({groups})"),
        (
            not (config.topk_method == "noaux_tc" and groups > 1) or experts // groups >= 2,
            "n_group",
            groups,
            f"leave at least two of the {experts} experts in each group",
        ),
        (
            config.num_experts_per_tok <= selectable,
            "num_experts_per_tok",
            config.num_experts_per_tok,
            f"be at most the {selectable} experts that the kept groups hold",
        ),
        (
            config.first_k_dense_replace <= config.num_hidden_layers,
            "first_k_dense_replace",
            config.first_k_dense_replace,
            f"be at most num_hidden_layers ({config.num_hidden_layers})",
        ),
        (
            config.num_nextn_predict_layers <= 1,
            "num_nextn_predict_layers",
            config.num_nextn_predict_layers,
            "be 0 or 1",
        ),
        (
            config.num_hidden_layers * experts <= _MAX_EXPERTS,
            "num_hidden_layers · n_routed_experts",
            config.num_hidden_layers * experts,
            f"be at most {_MAX_EXPERTS}",
        ),
        (config.rms_norm_eps > 0, "rms_norm_eps", config.rms_norm_eps, "be positive"),
        (config.rope_theta > 1, "rope_theta", config.rope_theta, "be above 1"),
        (config.routed_scaling_factor > 0, "routed_scaling_factor", config.routed_scaling_factor, "be positive"),
    )
    for holds, name, value, rule in checks:
        if not holds:
            raise ValueError(f"{name} is {value}; it must {rule}")
    for token in (config.bos_token_id, *config.eos_token_ids):
        if token is not None and token >= config.vocab_size:
            raise ValueError(f"a special token's id is {token}; it must be below vocab_size ({config.vocab_size})")
