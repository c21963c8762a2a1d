"""What do ranks send each other and hold, layout by layer, and is it what the plan says?

A small DeepSeek-V3 in block FP8 with random weights runs decode steps on 2 to 4 processes over gloo. Bytes put into
collectives are counted, per step and per layer, beside the plan's formula; bytes of weights beside the plan's ledger;
cache tokens are what the plan's rule leaves on an H200 beside the weights counted, and beside those planned. The time
of a step is a smoke figure: gloo, on cores that the processes share. Ends with one JSON line; fails where counts
differ.

    python -m benchmarks.parallel [--requests 4]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_model import decode_batch
from dsengine.kernels.registry import select_kernels
from dsengine.model.checkpoint import read_checkpoint
from dsengine.model.config import ModelConfig
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.loader import load_model
from dsengine.model.random_checkpoint import write_random_checkpoint
from dsengine.parallel.groups import World, join_world
from dsengine.plan.builtin import DEEPSEEK_V3
from dsengine.plan.hardware import GPUS
from dsengine.plan.layout import Layout
from dsengine.plan.memory import cache_bytes_per_token, cache_tokens, weigh
from dsengine.plan.source import PlannedModel
from dsengine.plan.traffic import StepTraffic, step_traffic

LAYOUTS = (
    Layout(2, 1, "tp"), Layout(2, 1, "ep"), Layout(4, 1, "tp"), Layout(4, 1, "ep"),
    Layout(1, 2, "ep"), Layout(2, 2, "ep"), Layout(1, 4, "ep"),
    Layout(1, 2, "ep", 0, True, True), Layout(2, 2, "ep", 0, True, False), Layout(2, 2, "ep", 0, False, True),
    Layout(2, 2, "ep", 0, True, True), Layout(1, 4, "ep", 0, True, True),
)  # fmt: skip
HUB_CONFIG: dict[str, Any] = DEEPSEEK_V3 | {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 512,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 8, "q_lora_rank": 256,
    "kv_lora_rank": 256, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
}  # fmt: skip
CONTEXT, BLOCK_SIZE, STEPS = 64, 16, 3
CPU = torch.device("cpu")
TIMEOUT_S = 300


def work(rank: int, folder: Path) -> None:
    """One rank of one layout: run steps, and write down what was counted."""
    torch.set_num_threads(1)
    case = json.loads((folder / "case.json").read_text())
    rendezvous, size, dp_size = folder / "rendezvous", case["size"], case["dp_size"]
    world = join_world(rank, size, attn_dp_size=dp_size, device=CPU, rendezvous=rendezvous, timeout_s=TIMEOUT_S)
    checkpoint = Path(case["checkpoint"])
    model = load_model(
        checkpoint,
        ModelConfig.from_hub(checkpoint),
        device=CPU,
        dtype=torch.bfloat16,
        weight_format="fp8",
        activation_format="float",
        kernels=select_kernels(CPU),
        layout=world.layout(**case["layout"]),
    )
    found = run_steps(world, model, case["requests"])
    (folder / f"rank{rank}.json").write_text(json.dumps(found | {"weight_bytes": held_bytes(model)}))
    world.close()


def run_steps(world: World, model: DeepseekModel, requests: int) -> dict[str, Any]:
    config = model.config
    blocks = requests * -(-CONTEXT // BLOCK_SIZE)
    batch = decode_batch(requests, CONTEXT, blocks, BLOCK_SIZE, CPU)
    # The ranks of a group need the same tokens: only then are their parts parts of one sum.
    batch = dataclasses.replace(batch, input_ids=torch.arange(requests) + 100 * world.dp_rank)
    if world.dp_size > 1:
        batch = dataclasses.replace(batch, rank_tokens=(requests,) * world.dp_size)
    shape = (blocks, BLOCK_SIZE, config.latent_dim)
    caches = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(config.num_hidden_layers + 1)]
    times, sent = [], 0
    for _ in range(STEPS):
        before, began = count_sent(world), time.perf_counter()
        with torch.inference_mode():
            model.compute_logits(model.forward(batch, caches), batch.rank_tokens)
        times.append(time.perf_counter() - began)
        sent = count_sent(world) - before
    return {"sent": sent, "step_s": statistics.median(times)}


def count_sent(world: World) -> int:
    groups = {id(group): group for group in (world.everyone, world.attention)}.values()
    return sum(sum(dataclasses.asdict(group.traffic).values()) for group in groups)


def held_bytes(model: DeepseekModel) -> int:
    """Of all tensors that the model holds, each storage once; the rotary table is no weight."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    queue: list[object] = [model]
    while queue:
        item = queue.pop()
        if id(item) in seen or item is model.cos_sin:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, list | tuple):
            queue.extend(item)
        elif type(item).__module__.startswith("dsengine.model"):
            queue.extend(vars(item).values())
    return sum(storages.values())


def run_layout(folder: Path, checkpoint: Path, layout: Layout, requests: int) -> list[dict[str, Any]]:
    """What each rank counted; no rank outlives this call."""
    folder.mkdir()
    (folder / "case.json").write_text(json.dumps({
        "checkpoint": str(checkpoint), "size": layout.world, "dp_size": layout.attn_dp,
        "layout": {
            "experts_whole": layout.experts == "ep",
            "dense_over_world": layout.dense_over_world, "lm_head_over_world": layout.lm_head_over_world,
        },
        "requests": requests,
    }))  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.parallel", "--folder", str(folder), "--rank"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank)], env=env) for rank in range(layout.world)]
    try:
        codes = [rank.wait(timeout=TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(codes):
        raise SystemExit(f"{layout.name}: ranks ended with {codes}")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(layout.world)]


def compare(model: PlannedModel, layout: Layout, found: list[dict[str, Any]], requests: int) -> dict[str, Any]:
    """Counts beside the plan's figures."""
    gpu, planned = GPUS["h200"], weigh(model, GPUS["h200"]).bytes_per_rank(layout)
    traffic: StepTraffic = step_traffic(model.config, layout, requests, requests)
    row = cache_bytes_per_token(model.config)
    held = max(rank["weight_bytes"] for rank in found)
    counted, expected = (cache_tokens(gpu, size, 0, row, 0.85, BLOCK_SIZE) for size in (held, planned))
    return {
        "layout": layout.name,
        "sent_per_step": [rank["sent"] for rank in found],
        "planned_per_step": traffic.step,
        "planned_per_moe_layer": traffic.moe_layer,
        "planned_per_dense_layer": traffic.dense_layer,
        "weight_bytes": held,
        "planned_weight_bytes": planned,
        "cache_tokens_per_group": counted,
        "planned_cache_tokens_per_group": expected,
        "cache_tokens": counted * layout.attn_dp,
        "gloo_step_ms": round(1e3 * max(rank["step_s"] for rank in found), 2),
    }


def check(rows: list[dict[str, Any]]) -> list[str]:
    """Where counts and plan differ."""
    wrong = []
    for row in rows:
        if any(sent != row["planned_per_step"] for sent in row["sent_per_step"]):
            wrong.append(f"{row['layout']}: {row['sent_per_step']} bytes were sent, planned {row['planned_per_step']}")
        for name in ("weight_bytes", "cache_tokens_per_group"):
            if abs(row[name] / row[f"planned_{name}"] - 1) > 0.01:
                wrong.append(f"{row['layout']}: {name} is {row[name]}, planned {row[f'planned_{name}']}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4, help="decoded by each attention group [4]")
    parser.add_argument("--layouts", nargs="+", help="some of them, by name, as in TP2 'DP2 EP2'")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        work(args.rank, args.folder)
        return
    rows = []
    headings = (
        "layout",
        "sent/step",
        "planned",
        "MoE layer",
        "dense",
        "weights",
        "planned",
        "cache tokens",
        "gloo step",
    )
    print(f"{headings[0]:>24}" + "".join(f"{heading:>13}" for heading in headings[1:]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = write_random_checkpoint(folder / "model", HUB_CONFIG)
        model = PlannedModel("random", "random weights", config, read_checkpoint(folder / "model"))
        for number, layout in enumerate(each for each in LAYOUTS if args.layouts is None or each.name in args.layouts):
            found = run_layout(folder / str(number), folder / "model", layout, args.requests)
            row = compare(model, layout, found, args.requests)
            rows.append(row)
            print(
                f"{row['layout']:>24}{max(row['sent_per_step']):13,}{row['planned_per_step']:13,}"
                f"{row['planned_per_moe_layer']:13,}{row['planned_per_dense_layer']:13,}{row['weight_bytes']:13,}"
                f"{row['planned_weight_bytes']:13,}{row['cache_tokens']:13,}{row['gloo_step_ms']:10.0f} ms",
                flush=True,
            )
    wrong = check(rows)
    print(json.dumps({"benchmark": "parallel", "requests_per_group": args.requests, "layouts": rows, "wrong": wrong}))
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
