"""One of four ranks of models with attention groups, started by test_dp_attention.py; writes what its group answers.

Usage: dp_worker.py RANK FOLDER, where FOLDER holds cases.json: [{name, checkpoint, options, size, attn_dp_size, layout,
schedules}]. A case of two ranks runs on ranks 0 and 1, and once more on 2 and 3. Where experts are balanced, those
of one layer move after each schedule.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from dp_steps import GroupRun
from safetensors.torch import save_file
from tiny_checkpoints import CPU, load_tiny

from dsengine.model.rebalance import ExpertBalancer
from dsengine.parallel.collectives import Group, SingleProcess
from dsengine.parallel.groups import attention_group, join_world
from dsengine.parallel.layout import Layout

SIZE = 4
TIMEOUT = timedelta(seconds=120)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    world = join_world(rank, SIZE, device=CPU, rendezvous=folder / "rendezvous", timeout_s=120)
    pair = attention_group(SIZE, rank, 2, "gloo", TIMEOUT)
    everyone: dict[int, Group] = {4: world.everyone, 2: pair}
    # Each rank by itself, in pairs, all four.
    groups: dict[tuple[int, int], Group] = {(size, size): SingleProcess() for size in (2, 4)}
    groups |= {(size, 1): everyone[size] for size in (2, 4)}
    groups[4, 2] = pair
    results, told = {}, {}
    for case in json.loads((folder / "cases.json").read_text()):
        size, attn_dp_size = case["size"], case["attn_dp_size"]
        layout = Layout(everyone[size], groups[size, attn_dp_size], **case["layout"])
        model = load_tiny(Path(case["checkpoint"]), layout=layout, **case["options"])
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
    save_file(results, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
    world.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
