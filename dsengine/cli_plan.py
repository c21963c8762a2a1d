"""`dsengine plan`: what a model needs of which GPUs and how fast it could be at best, before any of it is at hand."""

from __future__ import annotations

import argparse
import json

from dsengine.cli_flags import UsageError, build_config
from dsengine.cli_simulate import check_no_simulation, run_simulation
from dsengine.config import EngineConfig
from dsengine.plan.hardware import find_gpu
from dsengine.plan.planner import Question, make_plan
from dsengine.plan.report import as_data, print_plan
from dsengine.plan.source import find_model
from dsengine.progress import table_console


def run_plan(args: argparse.Namespace) -> int:
    """The `plan` sub-command; returns the exit status."""
    config = build_config(args, EngineConfig)
    for name, values in (
        ("--num-gpus", [args.num_gpus]),
        ("--batch-size", args.batch_size),
        ("--context", args.context),
    ):
        if min(values) < 1:
            raise UsageError(f"{name} is {min(values)}; it must be at least 1")
    model = find_model(config.model_or_demo, config.revision)
    if args.simulate:
        return run_simulation(args, config, model)
    check_no_simulation(args)
    question = Question(
        gpu=find_gpu(args.gpu),
        num_gpus=args.num_gpus,
        requests=tuple(sorted(set(args.batch_size))),
        contexts=tuple(sorted(set(args.context))),
        mem_fraction=getattr(args, "mem_fraction_static", None),
        block_size=config.block_size_on("cuda"),
        chunk_tokens=config.chunked_prefill_size,
        is_fp8_cache=config.kv_cache_dtype == "fp8_e4m3",
        dense_over_world=config.dense_parallel == "world",
        lm_head_over_world=config.lm_head_parallel == "world",
    )
    plan = make_plan(model, question)
    if args.json:
        print(json.dumps(as_data(plan)))
    else:
        print_plan(plan, table_console())
    return 0
