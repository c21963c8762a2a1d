"""`torchrun … -m dsengine serve MODEL`: every process that torchrun starts takes care of one rank.

To the rest of the server each of them is a machine with one device. Process 0 serves the requests. torchrun's own store
is asked for the address to meet at, so that no port need be given; pickle is not spoken there.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import MutableMapping
from datetime import timedelta

from dsengine.config import EngineConfig

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MEETING_SECONDS = 600


def configure_under_torchrun(config: EngineConfig, environment: MutableMapping[str, str]) -> EngineConfig:
    """The configuration of this process, if torchrun has started it; `config` as it is, if not.

    Args:
        environment: the process's variables; of several CUDA devices only this process's own is left visible.

    Raises:
        ValueError: the flags say something else than torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in environment or any(name not in environment for name in _NAMES):
        return config
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if size == 1:
        return config
    if config.nnodes > 1 or config.tp_size not in (1, size):
        raise ValueError(
            f"torchrun has started {size} processes, but tp_size is {config.tp_size} and nnodes is {config.nnodes}; "
            "leave nnodes, node_rank and dist_init_addr to torchrun, and tp_size too or make it the number of processes"
        )
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    local_rank = int(environment["LOCAL_RANK"])
    environment["CUDA_VISIBLE_DEVICES"] = visible[local_rank] if local_rank < len(visible) else str(local_rank)
    return dataclasses.replace(
        config, tp_size=size, nnodes=size, node_rank=rank, dist_init_addr=_meeting_place(rank, environment)
    )


def _meeting_place(rank: int, environment: MutableMapping[str, str]) -> str:
    host, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return f"{host}:{port}"  # nobody listens there yet
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it

    store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=_MEETING_SECONDS))
    key = f"dsengine/{environment['TORCHELASTIC_RUN_ID']}/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank == 0:
        with socket.create_server((host, 0)) as probe:
            store.set(key, f"{host}:{probe.getsockname()[1]}")
    address: str = store.get(key).decode()
    return address
