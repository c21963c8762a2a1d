"""From an `EngineConfig` to a running `EngineCore`: choose the kernels, load the model, set up the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dsengine.config import EngineConfig
from dsengine.engine.agreement import Agreement, Alone, RankAgreement
from dsengine.engine.core import EngineCore
from dsengine.engine.cuda_graphs import CudaGraphs
from dsengine.engine.device_setup import CacheRow, DeviceSetup, available_memory, refusing, total_memory
from dsengine.engine.jump_forward import JumpForward
from dsengine.engine.latency import LatencyController
from dsengine.engine.launch import DeviceQueue, DirectQueue, StepLauncher
from dsengine.engine.memory_ledger import MemoryLedger
from dsengine.engine.memory_probe import CudaMemory
from dsengine.engine.messages import EngineInfo
from dsengine.engine.model_runner import ModelRunner
from dsengine.engine.sampler import Sampler
from dsengine.engine.scheduler import Scheduler, SchedulerConfig
from dsengine.engine.self_test import verified_kernels
from dsengine.engine.self_test_probes import ProbeMaker
from dsengine.engine.speculation_setup import describe, make_book
from dsengine.kernels.registry import Kernels, select_kernels
from dsengine.memory.block_manager import BlockManager
from dsengine.memory.kv_cache import KVCachePool
from dsengine.memory.radix_cache import RadixCache
from dsengine.model.config import ModelConfig
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.loader import load_model, resolve_formats
from dsengine.model.manifest import verify_manifest
from dsengine.model.rebalance import ExpertBalancer
from dsengine.parallel.groups import World
from dsengine.parallel.layout import Layout

ProgressCallback = Callable[[int, int], None]


def build_engine(
    config: EngineConfig,
    checkpoint: Path,
    *,
    eos_token_ids: frozenset[int],
    num_valid_tokens: int,
    progress: ProgressCallback | None = None,
    queue: DeviceQueue | None = None,
    world: World | None = None,
) -> EngineCore:
    """Load a checkpoint, or this rank's part of it, and make an engine of it.

    Args:
        checkpoint: local folder of the checkpoint.
        eos_token_ids: ids that end a request.
        num_valid_tokens: ids from here on are never drawn (the tokenizer does not know them).
        progress: called with (bytes loaded, bytes in all).
        queue: carries out the steps' work, overlapped with the host's; None: the device's own queue.
        world: the ranks that run the model together; None: this process runs it alone.

    Raises:
        ValueError: configuration and checkpoint do not fit each other or the machine.
    """
    started = time.monotonic()
    device = resolve_device(config.device, None if world is None else world.rank % config.local_size)
    dtype = resolve_dtype(config.dtype, device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif config.local_size > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.local_size))
    model_config = _verified_config(config, checkpoint, world, progress)
    context_length = _context_length(config, model_config)
    row = CacheRow.of(config.kv_cache_dtype, model_config, dtype)
    kernels = _kernels(config, checkpoint, model_config, device, dtype, row)
    memory = CudaMemory(device) if device.type == "cuda" else None
    others = memory.total() - memory.free() if memory is not None else total_memory() - available_memory()
    agreement: Agreement = Alone() if world is None else RankAgreement(world)
    with refusing(f"the weights of {config.model_or_demo} do not fit into the memory of {device}"):
        model = load_model(
            checkpoint,
            model_config,
            device=device,
            dtype=dtype,
            weight_format=config.weight_format,
            activation_format=config.activation_format,
            kernels=kernels,
            progress=progress,
            layout=_layout(config, world),
        )
    sampler = Sampler(kernels, min(num_valid_tokens, model_config.vocab_size), agreement.tokens)
    setup = DeviceSetup(
        config,
        model,
        kernels,
        sampler,
        row=row,
        context_length=context_length,
        others=others,
        agreement=agreement,
    )
    runner, ledger = setup.on_cpu() if memory is None else setup.on_cuda(memory, lambda: CudaGraphs(device))
    book = make_book(config, runner, agreement.seconds)
    overlap = book is None and not config.disable_overlap_schedule and (queue is not None or device.type == "cuda")
    info = _info(
        config, checkpoint, runner, kernels, ledger, context_length=context_length, started=started, overlap=overlap
    )
    return EngineCore(
        _scheduler(config, runner.pool, context_length),
        StepLauncher(runner, sampler, queue if queue is not None else DirectQueue(), _balancer(config, model)),
        info,
        eos_token_ids=eos_token_ids,
        seed=config.seed,
        overlap=overlap,
        book=book,
        agreement=agreement,
        jumps=_jumps(config, has_graphs=runner.graphs is not None),
        latency=_latency(config),
        verify=partial(_verify, config, world),
    )


def _info(
    config: EngineConfig,
    checkpoint: Path,
    runner: ModelRunner,
    kernels: Kernels,
    ledger: MemoryLedger,
    *,
    context_length: int,
    started: float,
    overlap: bool,
) -> EngineInfo:
    model, pool = runner.model, runner.pool
    cache_dtype = pool.layers[0].dtype
    return EngineInfo(
        model=str(checkpoint),
        context_length=context_length,
        block_size=pool.block_size,
        num_blocks=pool.num_blocks,
        vocab_size=model.config.vocab_size,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        kernels=kernels.table(),
        load_seconds=time.monotonic() - started,
        kv_cache_dtype=config.kv_cache_dtype if cache_dtype == torch.uint8 else str(cache_dtype).removeprefix("torch."),
        cuda_graph_bs=runner.graphs.sizes if runner.graphs is not None else [],
        overlap_schedule=overlap,
        speculation=describe(config),
        memory=ledger,
    )


def _layout(config: EngineConfig, world: World | None) -> Layout | None:
    if world is None:
        return None
    return world.layout(
        experts_whole=config.experts_whole,
        moe_exchange=config.moe_exchange,
        redundant_experts=config.ep_num_redundant_experts,
        balances_experts=config.enable_eplb,
        dense_over_world=config.dense_parallel == "world",
        lm_head_over_world=config.lm_head_parallel == "world",
    )


def _balancer(config: EngineConfig, model: DeepseekModel) -> ExpertBalancer | None:
    if not config.enable_eplb:
        return None
    return ExpertBalancer(model, nodes=config.nnodes, interval=config.eplb_rebalance_num_iterations)


def _verified_config(
    config: EngineConfig, checkpoint: Path, world: World | None, progress: ProgressCallback | None
) -> ModelConfig:
    """The checkpoint's config, after the first rank of each machine has compared the files with their manifest."""
    _verify(config, world, checkpoint, progress)
    return ModelConfig.from_hub(checkpoint)


def _verify(
    config: EngineConfig, world: World | None, checkpoint: Path, progress: ProgressCallback | None = None
) -> None:
    if world is None or world.rank % config.local_size == 0:
        verify_manifest(checkpoint, config.verify_checksums, progress)


def _kernels(
    config: EngineConfig,
    checkpoint: Path,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    row: CacheRow,
) -> Kernels:
    """The kernels for this device, tested on the checkpoint where the configuration wants it."""
    is_tested = config.self_test == "on" or (config.self_test == "auto" and model_config.quantization is not None)
    if not is_tested:
        return select_kernels(device, config.forced_kernels)
    keep_fp8, activations = resolve_formats(config.weight_format, config.activation_format, device, model_config)
    maker = ProbeMaker(
        checkpoint,
        model_config,
        device=device,
        dtype=dtype,
        keep_fp8=keep_fp8,
        activations=activations,
        fp8_cache=row.dtype == torch.uint8,
    )
    with torch.inference_mode():
        kernels, _ = verified_kernels(device, config.forced_kernels, maker.probes())
    return kernels


def _jumps(config: EngineConfig, *, has_graphs: bool) -> JumpForward | None:
    return None if config.disable_jump_forward else JumpForward(config.max_running_requests, has_graphs=has_graphs)


def _latency(config: EngineConfig) -> LatencyController | None:
    if config.target_itl_ms is None:
        return None
    ttft = None if config.target_ttft_ms is None else config.target_ttft_ms / 1000
    return LatencyController(config.chunked_prefill_size, config.target_itl_ms / 1000, ttft)


def _scheduler(config: EngineConfig, pool: KVCachePool, context_length: int) -> Scheduler:
    block_manager = BlockManager(pool.num_blocks)
    radix_cache = None if config.disable_radix_cache else RadixCache(block_manager, pool.block_size)
    return Scheduler(
        SchedulerConfig(
            block_size=pool.block_size,
            max_running_requests=config.max_running_requests,
            token_budget=config.chunked_prefill_size,
            context_length=context_length,
            lookahead=int(config.speculative_algorithm == "NEXTN"),
        ),
        block_manager,
        radix_cache,
    )


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device meant by `--device`; "auto" prefers CUDA.

    Args:
        local_rank: number of this rank on its machine, where several run the model; each takes a device of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None:
        return _device_of_rank(resolve_device(name), local_rank)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch {torch.__version__} sees no CUDA device; use cpu or auto")
    return device


def _device_of_rank(device: torch.device, local_rank: int) -> torch.device:
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise ValueError(f"device is '{device}', but several ranks need a device each; use cuda")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"this machine has {torch.cuda.device_count()} CUDA devices, and rank {local_rank} on it has none; lower "
            "tp_size, or spread the ranks over more machines with nnodes"
        )
    return torch.device("cuda", local_rank)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Activations are bfloat16 on a GPU; a CPU is exact and, without AMX, no slower in float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _context_length(config: EngineConfig, model_config: ModelConfig) -> int:
    longest = model_config.max_position_embeddings
    if config.context_length is None:
        return longest
    if config.context_length > longest:
        raise ValueError(
            f"context_length is {config.context_length}; this checkpoint has positions for {longest} tokens"
        )
    return config.context_length
