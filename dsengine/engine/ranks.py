"""Several processes that run one model: how they come together, and what all but the first do from then on.

Every rank is a process with one device. Rank 0 is the engine that the front end knows (or the offline `LLM`); it starts
the other ranks of its machine. They load their parts, agree on the size of the cache, and then follow rank 0: it tells
them what it was told, and all take the same step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import zlib
from pathlib import Path

import msgspec
import torch.distributed

from dsengine.config import EngineConfig
from dsengine.engine.build import ProgressCallback, build_engine, resolve_device, resolve_dtype
from dsengine.engine.core import EngineCore
from dsengine.engine.leading_core import LeadingCore, Tick, answer_call, apply_messages
from dsengine.engine.messages import EngineFailure, RankInfo, StepOutput
from dsengine.engine.process_args import EngineProcessArgs
from dsengine.model.config import ModelConfig
from dsengine.model.loader import resolve_formats
from dsengine.model.sharding import check_layout
from dsengine.parallel.deep_ep import check_usable
from dsengine.parallel.groups import World, host_and_port, join_world
from dsengine.parallel.launch import RankProcesses
from dsengine.parallel.lifelines import open_lifelines
from dsengine.parallel.prefix_routing import PrefixRouter
from dsengine.parallel.watchdog import Watchdog

RANK_MODULE = "dsengine.engine.process"
_FOREVER = 7 * 86400.0  # the watchdogs know better when to give up than a collective does
Engine = EngineCore | LeadingCore


def open_engine(args: EngineProcessArgs, *, progress: ProgressCallback | None = None) -> Engine:
    """The engine that a configuration asks for: in this process alone, or with this process as rank 0 of several.

    Raises:
        ValueError: configuration and checkpoint do not fit each other or the machine.
        RanksFailedError: a rank died on the way.
    """
    config = msgspec.convert(args.config, EngineConfig)
    if config.tp_size == 1:
        return _build(args, config, args.weights, None, progress)
    check_ranks(config, Path(args.checkpoint))
    if torch.distributed.is_initialized():
        raise ValueError(
            f"tp_size is {config.tp_size}, and this process is a rank already; shut the other LLM down first"
        )
    with contextlib.ExitStack() as resources:
        if not args.folder:
            folder = resources.enter_context(tempfile.TemporaryDirectory(prefix="dsengine-"))
            args = msgspec.structs.replace(args, folder=folder)
        return _lead(args, config, progress, resources)


def _lead(
    args: EngineProcessArgs,
    config: EngineConfig,
    progress: ProgressCallback | None,
    resources: contextlib.ExitStack,
) -> LeadingCore:
    processes = RankProcesses(
        RANK_MODULE, rank_lines(args, args.folder, [rank for rank in config.local_ranks if rank != 0])
    )
    watchdog = Watchdog(0, config.dist_timeout, processes, lambda report: args.report(EngineFailure(report)))
    try:
        with watchdog.over("the meeting of the ranks", limited=config.nnodes > 1):
            world = _join(args, config, watchdog, resources)
            weights = world.broadcast_bytes(args.weights.encode(), 0).decode()
        core = _build(args, config, weights, world, progress)
        with watchdog.over("the end of loading", limited=False):
            data = world.gather_bytes(b"", 0)
        watchdog.loaded()
        assert data is not None
        others = [msgspec.msgpack.decode(item, type=RankInfo) for item in data[1:]]
        info = msgspec.structs.replace(core.info, ranks=[_describe(config, core, 0, world), *others])
        router = PrefixRouter(world.dp_size, core.info.block_size, core.info.num_blocks)
        return LeadingCore(core, world, processes, watchdog, router, info, resources.pop_all())
    except BaseException:
        watchdog.stop()
        processes.close()
        raise


def rank_lines(args: EngineProcessArgs, folder: str, ranks: list[int]) -> dict[int, bytes]:
    """What each of these ranks, as a child of this process, is told at its start."""
    args = msgspec.structs.replace(args, folder=folder, parent=os.getpid(), address="", weights="", show_progress=False)
    return {rank: msgspec.json.encode(msgspec.structs.replace(args, rank=rank)) for rank in ranks}


def follow(args: EngineProcessArgs) -> None:
    """What a rank other than 0 does: load, and then as it is told, until it is told to stop.

    Raises:
        ValueError: configuration and checkpoint do not fit each other or the machine; rank 0 knows.
        RanksFailedError: other ranks have failed.
    """
    with contextlib.ExitStack() as resources:
        _follow(args, msgspec.convert(args.config, EngineConfig), resources)


def _follow(args: EngineProcessArgs, config: EngineConfig, resources: contextlib.ExitStack) -> None:
    # Rank 0 has the shorter limit, so that it is the one to report.
    watchdog = Watchdog(args.rank, 2 * config.dist_timeout)
    with watchdog.over("the meeting of the ranks", limited=config.nnodes > 1):
        world = _join(args, config, watchdog, resources)
        weights = world.broadcast_bytes(None, 0).decode()
    core = _build(args, config, weights, world, None)
    with watchdog.over("the end of loading", limited=False):
        world.gather_bytes(msgspec.msgpack.encode(_describe(config, core, args.rank, world)), 0)
    decoder, encoder = msgspec.msgpack.Decoder(Tick), msgspec.msgpack.Encoder()
    while True:
        with watchdog.over(f"wait for rank 0 after step {core.num_steps}", limited=args.has_heartbeats):
            tick = decoder.decode(world.broadcast_bytes(None, 0))
        if tick.stops:
            break
        with watchdog.over(f"step {core.num_steps + 1}", limited=not tick.takes_long):
            _obey(core, world, tick, encoder)
    watchdog.stop()
    world.close()


def _obey(core: EngineCore, world: World, tick: Tick, encoder: msgspec.msgpack.Encoder) -> None:
    refused = apply_messages(core, tick, world.dp_rank)
    if not tick.steps:
        world.gather_bytes(encoder.encode(answer_call(core, tick, refused)), 0)
        return
    output = core.step(tick.now)
    if world.dp_size > 1:
        is_first = world.attention.rank == 0
        data = encoder.encode(StepOutput([*refused, *output.updates], output.stats)) if is_first else b""
        world.gather_bytes(data, 0)


def _join(args: EngineProcessArgs, config: EngineConfig, watchdog: Watchdog, resources: contextlib.ExitStack) -> World:
    world = join_world(
        args.rank,
        config.tp_size,
        attn_dp_size=config.attn_dp_size,
        device=resolve_device(config.device, args.rank - config.local_ranks.start),
        rendezvous=config.dist_init_addr or Path(args.folder) / "rendezvous",
        timeout_s=_FOREVER,
    )
    _compare_configs(world, config)
    if config.dist_init_addr is not None:
        host, _ = host_and_port(config.dist_init_addr)
        lifelines = open_lifelines(world, host, config.local_size, config.dist_timeout)
        resources.callback(lifelines.close)
        watchdog.watch(lifelines)
    return world


def _compare_configs(world: World, config: EngineConfig) -> None:
    """Prove that all ranks were started with the same flags, but those that may differ from machine to machine."""
    fields = dataclasses.asdict(dataclasses.replace(config, node_rank=0, model=None, num_threads=None))
    digests = [digest for [digest] in world.all_gather_ints([zlib.crc32(msgspec.json.encode(fields, order="sorted"))])]
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise ValueError(f"rank {rank} was started with other flags than rank 0; all machines need the same ones")


def check_ranks(config: EngineConfig, checkpoint: Path) -> None:
    """Prove that the model can be cut, and the machine has a device for each rank, before anything is started."""
    device = resolve_device(config.device)
    if config.moe_exchange in ("deepep", "deepep_normal"):
        check_usable(device, resolve_dtype(config.dtype, device))
    model_config = ModelConfig.from_hub(checkpoint)
    keep_fp8, _ = resolve_formats(config.weight_format, config.activation_format, device, model_config)
    check_layout(
        model_config,
        tp_size=config.tp_size,
        attn_dp_size=config.attn_dp_size,
        experts_whole=config.experts_whole,
        keeps_fp8=keep_fp8,
        moe_exchange=config.moe_exchange,
        redundant_experts=config.ep_num_redundant_experts,
        dense_over_world=config.dense_parallel == "world",
    )
    for rank in config.local_ranks:
        resolve_device(config.device, rank - config.local_ranks.start)


def _describe(config: EngineConfig, core: EngineCore, rank: int, world: World) -> RankInfo:
    return RankInfo(
        rank=rank,
        dp_rank=world.dp_rank,
        node_rank=rank // config.local_size,
        pid=os.getpid(),
        device=core.info.device,
        memory=core.info.memory,
    )


def _build(
    args: EngineProcessArgs,
    config: EngineConfig,
    weights: str,
    world: World | None,
    progress: ProgressCallback | None,
) -> EngineCore:
    return build_engine(
        config,
        Path(weights or args.checkpoint),
        eos_token_ids=frozenset(args.eos_token_ids),
        num_valid_tokens=args.num_valid_tokens,
        progress=progress,
        world=world,
    )
