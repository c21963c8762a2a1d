"""A DeepSeek-V3 with random weights, large enough that arithmetic and not Python decides how fast it runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from dsengine.model.random_checkpoint import write_random_checkpoint

_VOCAB_SIZE = 16384
_EOS = "<｜end▁of▁sentence｜>"

# True MLA head dimensions; 0.4 B parameters, of which 0.1 B work on a token.
_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": _VOCAB_SIZE,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": _VOCAB_SIZE - 1,
}


def write_random_v3(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint, with a tokenizer that knows every id; returns its folder."""
    write_random_checkpoint(folder, _CONFIG, seed=seed)
    alphabet = sorted(ByteLevel.alphabet())
    pairs = ("".join(pair) for pair in itertools.product(alphabet, repeat=2))
    words = itertools.islice(itertools.chain(alphabet, pairs), _VOCAB_SIZE - 1)
    tokenizer = tokenizers.Tokenizer(BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([_EOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": _EOS}), encoding="utf-8")
    return folder
