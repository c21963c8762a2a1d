"""One rank of a sharded model, started by test_sharded_model.py: writes what the model answers, and what it holds.

Usage: rank_worker.py RANK SIZE FOLDER, where FOLDER holds cases.json: [{name, checkpoint, options, experts_whole}].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from step_answers import answers
from tiny_checkpoints import CPU, load_tiny

from benchmarks.parallel import held_bytes
from dsengine.parallel.groups import join_world


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    world = join_world(rank, size, device=CPU, rendezvous=folder / "rendezvous", timeout_s=60)
    held = {}
    results = {}
    for case in json.loads((folder / "cases.json").read_text()):
        layout = world.layout(experts_whole=case["experts_whole"])
        model = load_tiny(Path(case["checkpoint"]), layout=layout, **case["options"])
        before = world.everyone.traffic.all_reduce_bytes
        for key, value in answers(model).items():
            results[f"{case['name']}/{key}"] = value.contiguous()
        held[case["name"]] = {"bytes": held_bytes(model), "sent": world.everyone.traffic.all_reduce_bytes - before}
    save_file(results, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(held))
    world.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
