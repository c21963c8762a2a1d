"""Where memory goes: the arithmetic, and the whole set-up of a device whose memory is a fake's invention."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from replayed_graphs import ReplayedGraphs
from tiny_engine import CONFIG, GREEDY, TOKENIZER_SIZE, random_prompts, tokens

from dsengine import LLM
from dsengine.config import EngineConfig
from dsengine.engine.device_setup import RESERVE_BYTES, CacheRow, DeviceSetup
from dsengine.engine.launch import DirectQueue, StepLauncher
from dsengine.engine.lock_step import StepKind
from dsengine.engine.memory_ledger import DeviceBudget, MemoryLedger
from dsengine.engine.memory_probe import weigh
from dsengine.engine.memory_profile import largest_step
from dsengine.engine.messages import EngineInfo
from dsengine.engine.model_runner import ModelRunner
from dsengine.engine.sampler import Sampler
from dsengine.kernels.registry import Choice, Kernels, select_kernels
from dsengine.model.config import ModelConfig
from dsengine.model.loader import load_model
from dsengine.specdec.controller import ladder
from dsengine.specdec.shape import TreeShape

CPU = torch.device("cpu")
MIB = 2**20
GIB = 2**30


def budget(**changes: Any) -> DeviceBudget:
    made = DeviceBudget(
        total=100 * GIB, free=60 * GIB, activations=4 * GIB, graphs=GIB, reserve=GIB, static_fraction=0.9
    )
    return replace(made, **changes)


def test_the_cache_gets_what_either_bound_leaves() -> None:
    assert budget().cache_bytes == 49 * GIB, "a tenth of the device is kept clear"
    assert budget(activations=20 * GIB).cache_bytes == 38 * GIB, "the largest step needs more than that"
    assert budget(static_fraction=0.98).cache_bytes == 54 * GIB
    for each in (budget(), budget(activations=20 * GIB), budget(static_fraction=0.98)):
        held = each.total - each.free
        static = held + each.graphs + each.cache_bytes
        assert static <= each.static_fraction * each.total
        assert static + each.activations + each.reserve <= each.total


def test_wanted_tokens_are_given_if_they_fit() -> None:
    assert budget().num_blocks(GIB, 16, None) == 49
    assert budget().num_blocks(GIB, 16, 170) == 10
    with pytest.raises(ValueError, match=r"of 800 tokens needs 50.00 GiB, 49.00 GiB are left .*\(at most 784 fit\)"):
        budget().num_blocks(GIB, 16, 800)
    with pytest.raises(ValueError, match="max_total_tokens is 31; it must be at least two blocks of 16"):
        budget().num_blocks(GIB, 16, 31)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"free": 11 * GIB}, "raise --mem-fraction-static"),
        ({"activations": 59 * GIB}, "lower --chunked-prefill-size"),
        ({"graphs": 55 * GIB}, "--cuda-graph-max-bs"),
        ({"free": 0}, "0.0 MiB are left for it"),
    ],
)
def test_what_cannot_fit_is_refused_with_advice(changes: dict[str, int], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        budget(**changes).num_blocks(GIB, 16, None)


def test_a_ledger_adds_up_and_crosses_the_socket() -> None:
    ledger = MemoryLedger("cuda:0", 141 * GIB, GIB, 90 * GIB, 2 * GIB, GIB, 30 * GIB, 500_000, 4 * GIB, GIB // 2)
    assert ledger.unassigned == int(12.5 * GIB)
    text = "\n".join(ledger.lines())
    assert "141.00 GiB" in text and "KV cache" in text and "500000 tokens" in text and "63.8%" in text
    assert "reserve" in text and "others" in text
    info = EngineInfo("m", 1, 1, 1, 1, "f", "cpu", {}, 0.0, memory=ledger)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(info), type=EngineInfo) == info


class FakeMemory:
    """A device of which a model takes `held` bytes, a step `step` and each capture what `graphs` says, in turn."""

    def __init__(self, total: int, held: int, step: int, graphs: list[int]) -> None:
        self._total = total
        self._held = held
        self._step = step
        self.graphs = graphs
        self.tried = 0

    def total(self) -> int:
        return self._total

    def free(self) -> int:
        gc.collect()
        return self._total - self._held

    def extra_needed(self, work: Callable[[], object]) -> int:
        work()
        self.tried += 1
        return self._step

    def hold(self, size: int) -> None:
        self._held += size


class FakeGraphs(ReplayedGraphs):
    """Takes some of a fake's memory when the first graph is captured, and gives it back when it is dropped."""

    def __init__(self, memory: FakeMemory) -> None:
        super().__init__()
        self._memory = memory
        self._size = memory.graphs.pop(0)
        memory.hold(self._size)

    def __del__(self) -> None:
        self._memory.hold(-self._size)


def capturable(kernels: Kernels) -> Kernels:
    return replace(kernels, choices=tuple(Choice(c.operation, "triton", "") for c in kernels.choices))


@pytest.fixture(scope="module")
def parts(checkpoint: Path) -> tuple[Any, Kernels]:
    config = ModelConfig.from_hub(checkpoint)
    kernels = select_kernels(CPU)
    return load_model(checkpoint, config, device=CPU, dtype=torch.float32, kernels=kernels), kernels


def set_up(
    parts: tuple[Any, Kernels], memory: FakeMemory, *, may_capture: bool = True, **options: Any
) -> tuple[ModelRunner, MemoryLedger]:
    model, kernels = parts
    options = {"block_size": 8, "chunked_prefill_size": 40, "max_running_requests": 12, **options}
    config = EngineConfig(**options)
    row = CacheRow.of(config.kv_cache_dtype, model.config, torch.float32)
    setup = DeviceSetup(
        config,
        model,
        capturable(kernels) if may_capture else kernels,
        Sampler(kernels, TOKENIZER_SIZE),
        row=row,
        context_length=64,
        others=MIB,
    )
    return setup.on_cuda(memory, lambda: FakeGraphs(memory))


def test_a_device_is_set_up_within_its_memory(parts: tuple[Any, Kernels]) -> None:
    # Trial captures: one that warms up, the largest, the two largest; then all of 1, 2, 4, 8, 12.
    memory = FakeMemory(800 * MIB, 100 * MIB, 30 * MIB, [9 * MIB, 6 * MIB, 8 * MIB, 14 * MIB])
    runner, ledger = set_up(parts, memory, mem_fraction_static=0.2)
    assert memory.tried == 2 and memory.graphs == []
    assert runner.graphs is not None and runner.graphs.sizes == [1, 2, 4, 8, 12]
    # 800 - 100 in use, less 30 + 512 for steps and reserve (0.8 · 800 = 640 is more), less 6 + 4 · 2 for graphs.
    room = (700 - 640 - 14) * MIB
    assert runner.pool.num_bytes <= room < runner.pool.num_bytes + runner.pool.num_bytes // runner.pool.num_blocks
    assert (ledger.graphs, ledger.activations, ledger.reserve) == (14 * MIB, 30 * MIB, RESERVE_BYTES)
    assert ledger.kv_cache == runner.pool.num_bytes and ledger.others == MIB


def test_graphs_that_outgrow_their_trial_are_refused(parts: tuple[Any, Kernels]) -> None:
    memory = FakeMemory(800 * MIB, 100 * MIB, 30 * MIB, [6 * MIB, 6 * MIB, 8 * MIB, 690 * MIB])
    with pytest.raises(ValueError, match=r"5 batch sizes took 690.0 MiB.*14.0 MiB.*10.0 MiB are left.*30.0 MiB"):
        set_up(parts, memory, mem_fraction_static=0.2)


def test_a_device_too_small_for_a_step_is_refused(parts: tuple[Any, Kernels]) -> None:
    with pytest.raises(ValueError, match=r"lower --chunked-prefill-size"):
        set_up(parts, FakeMemory(800 * MIB, 400 * MIB, 390 * MIB, []), disable_cuda_graph=True)


def test_a_step_that_does_not_fit_at_all_is_refused(parts: tuple[Any, Kernels]) -> None:
    class FullMemory(FakeMemory):
        def extra_needed(self, work: Callable[[], object]) -> int:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ValueError, match=r"largest step does not fit.*chunked_prefill_size 40.*lower --chunked"):
        set_up(parts, FullMemory(800 * MIB, 100 * MIB, 0, []))


def test_graphs_are_left_out_with_one_line_that_names_the_operation(
    parts: tuple[Any, Kernels], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        runner, ledger = set_up(parts, FakeMemory(800 * MIB, 100 * MIB, MIB, []), may_capture=False)
    assert runner.graphs is None and ledger.graphs == 0
    assert len(caplog.records) == 1 and f"moe_experts={parts[1].table()['moe_experts']}" in caplog.text
    runner, _ = set_up(parts, FakeMemory(800 * MIB, 100 * MIB, MIB, []), disable_cuda_graph=True)
    assert runner.graphs is None


def test_tokens_that_are_sent_to_their_experts_keep_steps_from_being_captured(
    parts: tuple[Any, Kernels], caplog: pytest.LogCaptureFixture
) -> None:
    ranks: dict[str, Any] = {"tp_size": 2, "attn_dp_size": 2, "ep_size": 2}
    with caplog.at_level(logging.WARNING):
        runner, _ = set_up(parts, FakeMemory(800 * MIB, 100 * MIB, MIB, []), moe_exchange="all_to_all", **ranks)
    assert runner.graphs is None and "the host waits to learn how many tokens go to which rank" in caplog.text


def test_the_largest_step_is_one_the_engine_can_have(parts: tuple[Any, Kernels]) -> None:
    model, kernels = parts
    pool = set_up(parts, FakeMemory(800 * MIB, 100 * MIB, MIB, []), disable_cuda_graph=True)[0].pool
    launcher = StepLauncher(ModelRunner(model, pool), Sampler(kernels, TOKENIZER_SIZE), DirectQueue())
    step = largest_step(5, 35, context_length=64, block_size=8)
    assert step.inputs.num_tokens == 40 and len(step.sampled) == 6 and step.prompts == ()
    launcher.compute(step, None)
    whole = largest_step(0, 150, context_length=64, block_size=8)  # more than a context: several prompts
    assert sorted(whole.inputs.query_lens) == [22, 64, 64] and len(whole.prompts) == 3
    result = launcher.compute(whole, None)
    assert sum(len(piece.fetch()) for _, pieces in result.scores for piece in pieces) == 147
    assert all(not layer.any() for layer in pool.layers), "nothing is stored"


def test_weights_are_counted_once(checkpoint: Path, parts: tuple[Any, Kernels]) -> None:
    model, _ = parts
    weights = weigh(model)
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    table = model.cos_sin.nbytes
    assert abs(weights.main + weights.nextn - table - stored) < 64 * 1024  # headers
    assert 0 < weights.nextn < weights.main and not weights.has_fp8


def test_rows_of_the_cache() -> None:
    config = ModelConfig.from_hub({**CONFIG, "vocab_size": 64})
    large = ModelConfig.from_hub({**CONFIG, "vocab_size": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert CacheRow.of("auto", config, torch.float32) == CacheRow(48, torch.float32)
    assert CacheRow.of("bfloat16", large, torch.bfloat16) == CacheRow(576, torch.bfloat16)
    assert CacheRow.of("fp8_e4m3", large, torch.bfloat16) == CacheRow(656, torch.uint8)
    with pytest.raises(ValueError, match="kv_lora_rank is 32; it must be a multiple of 128"):
        CacheRow.of("fp8_e4m3", config, torch.bfloat16)
    with pytest.raises(ValueError, match="kv_cache_dtype is bfloat16, but activations are float32"):
        CacheRow.of("bfloat16", config, torch.float32)


def test_a_cpu_shows_its_ledger_too(checkpoint: Path) -> None:
    with LLM(str(checkpoint), block_size=8) as llm:
        ledger = llm.core.info.memory
        assert ledger is not None and ledger.weights > ledger.nextn > 0
        assert ledger.kv_tokens == 8 * llm.core.info.num_blocks and ledger.activations == ledger.graphs == 0
        assert ledger.kv_cache == ledger.kv_tokens * 4 * 48 * 4
        assert llm.core.info.kv_cache_dtype == "float32" and not llm.core.info.overlap_schedule
        [prompt] = random_prompts(1)
        assert len(tokens(llm.generate(prompt_token_ids=prompt, sampling_params=GREEDY))[0]) == 12


@pytest.mark.parametrize("topk", [1, 3])
def test_steps_with_trees_are_tried_and_captured(parts: tuple[Any, Kernels], topk: int) -> None:
    memory = FakeMemory(800 * MIB, 100 * MIB, 30 * MIB, [9 * MIB, 6 * MIB, 8 * MIB, 14 * MIB])
    options: dict[str, Any] = {"speculative_eagle_topk": topk, "speculative_num_draft_tokens": 4}
    runner, _ = set_up(parts, memory, mem_fraction_static=0.2, speculative_algorithm="NEXTN", **options)
    assert memory.tried == 3 and memory.graphs == []
    assert runner.graphs is not None and runner.tree_graphs is not None and runner.speculator is not None
    assert runner.graphs.sizes == [1, 2, 4, 8, 12]
    # Every tree that may be chosen has its graphs: chains of each depth, and trees of each number of generations.
    for shape in ladder(TreeShape(3, topk, 4)):
        graphs = runner.tree_graphs.of(StepKind.of_trees(shape))
        assert graphs is not None and graphs.sizes == runner.graphs.sizes
    assert runner.tree_graphs.of(StepKind.of_trees(TreeShape(5, 1, 6))) is None
