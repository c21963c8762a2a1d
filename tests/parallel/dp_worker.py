"""One of four ranks of models with attention groups, started by test_dp_attention.py; writes what its group answers.

Usage: dp_worker.py RANK FOLDER ADDRESS, where FOLDER holds cases.json: [{name, checkpoint, options, size, attn_dp_size,
layout, schedules}]. A case of two ranks runs on ranks 0 and 1, and once more on 2 and 3. Where experts are balanced,
those of one layer move after each schedule.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from dp_steps import GroupRun, options_of
from safetensors.torch import save_file
from tiny_checkpoints import CPU, load_tiny
from torch import Tensor

from dsengine.model.rebalance import ExpertBalancer
from dsengine.parallel.collectives import Group, SingleProcess
from dsengine.parallel.groups import World, attention_group, join_world
from dsengine.parallel.layout import Layout

SIZE = 4
TIMEOUT = timedelta(seconds=120)


def main(rank: int, folder: Path, address: str) -> None:
    torch.set_num_threads(1)
    world = join_world(rank, SIZE, device=CPU, rendezvous=address, timeout_s=120)
    check_messages(world)
    pair = attention_group(SIZE, rank, 2, "gloo", TIMEOUT)
    everyone: dict[int, Group] = {4: world.everyone, 2: pair}
    # Each rank by itself, in pairs, all four.
    groups: dict[tuple[int, int], Group] = {(size, size): SingleProcess() for size in (2, 4)}
    groups |= {(size, 1): everyone[size] for size in (2, 4)}
    groups[4, 2] = pair
    results: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    for case in json.loads((folder / "cases.json").read_text()):
        size, attn_dp_size = case["size"], case["attn_dp_size"]
        layout = Layout(everyone[size], groups[size, attn_dp_size], **case["layout"])
        model = load_tiny(Path(case["checkpoint"]), layout=layout, **options_of(case))
        before = layout.world.traffic.copy()
        balancer = ExpertBalancer(model, threshold=1.0) if layout.balances_experts else None
        moved = 0
        for number, schedule in enumerate(case["schedules"]):
            run = GroupRun(model, layout.dp_rank, attn_dp_size)
            for key, value in run.answers(schedule).items():
                results[f"{case['name']}/{number}/{key}"] = value.contiguous()
            if balancer is not None:
                if not balancer.is_moving:
                    balancer.begin()
                moved += balancer.advance()
        told[case["name"]] = {"traffic": asdict(layout.world.traffic.since(before)), "moved": moved}
    told["listens on"] = listening_addresses()
    save_file(results, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
    world.close()


def check_messages(world: World) -> None:
    """Short, long and empty ones, from and to ranks other than the first."""
    rank = world.rank
    for data in (b"", b"tick", bytes(range(256)) * 15, bytes(range(256)) * 60):
        assert world.broadcast_bytes(data if rank == 2 else None, 2) == data
    gathered = world.gather_bytes(bytes([rank]) * 3000 * rank, 1)
    assert gathered == ([bytes([r]) * 3000 * r for r in range(SIZE)] if rank == 1 else None)
    assert world.all_gather_ints([rank, -rank << 40]) == [[r, -r << 40] for r in range(SIZE)]
    assert world.all_gather_ints([]) == [[]] * SIZE


def listening_addresses() -> list[str]:
    """Where sockets of this process wait for connections, as the kernel writes addresses."""
    own = {os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.append(fields[1].partition(":")[0])
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
