"""How the processes that run one model find each other, and the groups that they form.

Nothing listens on more than it is given: gloo, NCCL and NVSHMEM get the one interface that leads to the other ranks,
and the store of ranks on several machines a socket that is bound already, because torch's own would listen everywhere.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store, TCPStore

from dsengine.parallel.collectives import ControlGroup, DistributedGroup, Group, SingleProcess, new_group
from dsengine.parallel.layout import Layout, MoeExchange

_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class World:
    """All ranks, of which this process is one.

    Attributes:
        everyone: all ranks; what is sent lies on the device.
        attention: the ranks that have this rank's requests.
    """

    everyone: Group
    attention: Group
    _control: ControlGroup

    @property
    def rank(self) -> int:
        return self.everyone.rank

    @property
    def size(self) -> int:
        return self.everyone.size

    @property
    def dp_rank(self) -> int:
        """Number of this rank's attention-DP group."""
        return self.rank // self.attention.size

    @property
    def dp_size(self) -> int:
        """Attention-DP groups: they have requests of their own."""
        return self.size // self.attention.size

    def layout(
        self,
        *,
        experts_whole: bool,
        moe_exchange: MoeExchange = "gather",
        redundant_experts: int = 0,
        balances_experts: bool = False,
        dense_over_world: bool = False,
        lm_head_over_world: bool = False,
    ) -> Layout:
        """How a model is spread over these ranks."""
        return Layout(
            self.everyone,
            self.attention,
            experts_whole,
            moe_exchange,
            redundant_experts,
            balances_experts,
            dense_over_world,
            lm_head_over_world,
        )

    def broadcast_bytes(self, data: bytes | None, src: int = 0) -> bytes:
        """See `ControlGroup.broadcast_bytes`."""
        return self._control.broadcast_bytes(data, src)

    def gather_bytes(self, data: bytes, dst: int = 0) -> list[bytes] | None:
        """See `ControlGroup.gather_bytes`."""
        return self._control.gather_bytes(data, dst)

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """See `ControlGroup.all_gather_ints`."""
        return self._control.all_gather_ints(values)

    def close(self) -> None:
        """Undo `join_world`."""
        dist.destroy_process_group()


def join_world(
    rank: int,
    size: int,
    *,
    attn_dp_size: int = 1,
    device: torch.device,
    rendezvous: Path | str,
    timeout_s: float,
) -> World:
    """Meet the other ranks; each calls this once.

    Args:
        rank: in [0, size), different in every process. Rank r is number r % (size / attn_dp_size) of the attention
            group r // (size / attn_dp_size).
        attn_dp_size: attention groups; divides `size`.
        device: of this rank; made the current one if it is a CUDA device.
        rendezvous: where the ranks of one machine meet, a file that does not exist yet; or where those of several do,
            "HOST:PORT" of rank 0, which listens there and nowhere else.
        timeout_s: after which a collective that some rank does not reach raises.

    Raises:
        ValueError: the numbers are impossible, or the address is.
        OSError: the address cannot be listened on, or no interface leads to it.
        torch.distributed.DistError: the others did not come in time.
    """
    if size < 2:
        raise ValueError(f"size is {size}; a world has at least 2 ranks (one process needs no group)")
    if not 0 <= rank < size:
        raise ValueError(f"rank is {rank}; it must be from 0 to {size - 1} in a world of {size}")
    if attn_dp_size < 1 or size % attn_dp_size:
        raise ValueError(f"attn_dp_size is {attn_dp_size}; it must divide the number of ranks, {size}")
    timeout = timedelta(seconds=timeout_s)
    if isinstance(rendezvous, Path):
        interface = "lo"
        store: Store = FileStore(str(rendezvous), size)
    else:
        host, port = host_and_port(rendezvous)
        interface = interface_towards(host)
        store = _open_store(host, port, rank, size, timeout)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    os.environ.setdefault("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", interface)  # below DeepEP
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    control = ControlGroup(new_group(range(size), "gloo", timeout))
    everyone = DistributedGroup()
    attention = everyone if attn_dp_size == 1 else attention_group(size, rank, attn_dp_size, backend, timeout)
    return World(everyone, attention, control)


def attention_group(size: int, rank: int, count: int, backend: str, timeout: timedelta) -> Group:
    """This rank's of `count` groups of neighbouring ranks; all ranks make all groups."""
    width = size // count
    if width == 1:
        return SingleProcess()
    groups = [new_group(range(first, first + width), backend, timeout) for first in range(0, size, width)]
    return DistributedGroup(groups[rank // width])


def _open_store(host: str, port: int, rank: int, size: int, timeout: timedelta) -> Store:
    if rank != 0:
        return TCPStore(host, port, size, False, timeout, wait_for_workers=False)
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, port), family=family, backlog=size)
    return TCPStore(host, port, size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of "HOST:PORT".

    Raises:
        ValueError: it is something else.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"the address is {address!r}; it must have the form HOST:PORT, as in 10.0.0.1:20000")
    return host.strip("[]"), int(port)


def interface_towards(host: str) -> str:
    """The network interface of this machine whose address is used on the way to `host` (IPv4, Linux).

    Raises:
        OSError: there is none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing: only asks the routing table
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    raise OSError(f"no network interface of this machine has the address {address}, which leads to {host}")
