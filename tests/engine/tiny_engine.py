"""A tiny random model with the demo's tokenizer, and requests for it: shared by the tests that run a whole engine."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from dsengine import LLM, RequestOutput, SamplingParams
from dsengine.demo import CHECKPOINT_DIR
from dsengine.engine.build import build_engine
from dsengine.engine.core import EngineCore
from dsengine.engine.launch import DeviceQueue
from dsengine.model.random_checkpoint import write_random_checkpoint
from dsengine.tokenizer.tokenizer import Tokenizer

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "torch_dtype": "float32",
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
TOKENIZER_SIZE = Tokenizer.from_checkpoint(CHECKPOINT_DIR).vocab_size


def write_tiny_checkpoint(folder: Path) -> Path:
    write_random_checkpoint(folder, {**CONFIG, "vocab_size": TOKENIZER_SIZE + 8}, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT_DIR / name, folder)
    return folder


def random_prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(3, TOKENIZER_SIZE) for _ in range(longest)]
    prompts = []
    for _ in range(count):
        prefix = shared[: rng.choice((0, 7, 16, 33))]
        prompts.append(prefix + [rng.randrange(3, TOKENIZER_SIZE) for _ in range(rng.randrange(1, longest))])
    return prompts


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [o.token_ids for output in outputs for o in output.outputs]


def core_of(llm: LLM) -> EngineCore:
    """The core of an engine that runs in this process alone."""
    assert isinstance(llm.core, EngineCore)
    return llm.core


def use_queue(llm: LLM, checkpoint: Path, queue: DeviceQueue) -> LLM:
    """Gives an LLM a new engine whose steps run on `queue`, overlapped unless its configuration forbids that."""
    llm._core = build_engine(
        llm.config,
        checkpoint,
        eos_token_ids=llm.tokenizer.eos_token_ids,
        num_valid_tokens=llm.tokenizer.vocab_size,
        queue=queue,
    )
    return llm
