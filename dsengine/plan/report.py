"""A plan in words, tables and plain data, with everything said that a reader could otherwise take for a promise."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsengine.plan.planner import LayoutPlan, Plan, StepBound, overhead_bytes, suggested_flags, suggestions

_GIB = 2**30
LIMITS = (
    "Times are rooflines: every operation at the GPU's practical bandwidth or arithmetic rate, uniform routing, "
    "nothing for launches, communication, norms, routing and sampling. They are bounds for comparison, not "
    "forecasts; nothing here was measured."
)
SEVERAL = (
    "Layouts of several GPUs add no time for exchanges between them, which can be most of a step (--simulate counts "
    "them); they have been served on CPUs only, not yet on GPUs."
)


def remarks(plan: Plan) -> list[str]:
    """What must be known before the numbers are used."""
    found = [LIMITS]
    if plan.question.num_gpus > 1:
        found.append(SEVERAL)
    if plan.model.config.quantization is not None and plan.question.gpu.fp8_flops is None:
        found.append(f"{plan.question.gpu.name} has no FP8 tensor cores: FP8 weights are dequantised to bf16 at load.")
    if all(layout.cache_tokens == 0 for layout in plan.layouts):
        found.append(
            f"The weights do not fit on {plan.question.num_gpus} of these GPUs; more or larger ones are needed."
        )
    best = [layout for layout in plan.layouts if layout.cache_tokens]
    if len(best) > 1:
        found.append(_compare(plan, best))
    return found


def _compare(plan: Plan, fitting: list[LayoutPlan]) -> str:
    """Which layout is quickest at the smallest and at the largest load that any of them holds."""
    context = plan.question.contexts[0]
    words = []
    for requests in sorted({plan.question.requests[0], plan.question.requests[-1]}):
        steps = {
            layout.layout.name: step
            for layout in fitting
            for step in layout.steps
            if (step.requests, step.context) == (requests, context) and step.fits
        }
        if steps:
            name = min(steps, key=lambda name: steps[name].step)
            words.append(f"{name} for {requests} requests ({steps[name].step * 1e3:.2f} ms a step)")
    return f"Least roofline at {context} tokens each: {', '.join(words) or 'none of these loads fits'}."


def as_data(plan: Plan) -> dict[str, Any]:
    """The whole plan as JSON-ready data; bytes, seconds and counts."""
    question, weights, config = plan.question, plan.weights, plan.model.config
    return {
        "model": {
            "name": plan.model.name,
            "origin": plan.model.origin,
            "parameters": weights.parameters,
            "active_parameters": weights.active_parameters,
            "nextn_parameters": weights.nextn_parameters,
            "stored_bytes": weights.stored_bytes,
            "layers": config.num_hidden_layers,
            "max_position_embeddings": config.max_position_embeddings,
        },
        "gpu": {
            "name": question.gpu.name,
            "count": question.num_gpus,
            "memory_bytes": question.gpu.memory_bytes,
            "bandwidth": question.gpu.bandwidth,
            "bf16_flops": question.gpu.bf16_flops,
            "fp8_flops": question.gpu.fp8_flops,
            "source": question.gpu.source,
        },
        "mem_fraction_static": plan.mem_fraction,
        "cache_bytes_per_token": plan.token_bytes,
        "overhead_bytes_estimated": overhead_bytes(plan),
        "layouts": [_layout_data(layout) for layout in plan.layouts],
        "serve": {best: _command(plan, layout) for best, layout in suggestions(plan).items()},
        "remarks": remarks(plan),
    }


def _command(plan: Plan, layout: LayoutPlan) -> list[str]:
    return ["dsengine", "serve", plan.model.name, *suggested_flags(plan, layout)]


def _layout_data(plan: LayoutPlan) -> dict[str, Any]:
    return {
        "layout": plan.layout.name,
        "attn_tp": plan.layout.attn_tp,
        "attn_dp": plan.layout.attn_dp,
        "experts": plan.layout.experts,
        "dense_over_world": plan.layout.dense_over_world,
        "lm_head_over_world": plan.layout.lm_head_over_world,
        "weight_bytes_per_gpu": plan.weight_bytes,
        "part_bytes_per_gpu": plan.part_bytes,
        "fits": plan.cache_tokens > 0,
        "cache_tokens_per_group": plan.cache_tokens,
        "longest_context": plan.longest_context,
        "most_requests_by_context": plan.most_requests,
        "decode": [_step_data(step, plan.layout.world) for step in plan.steps],
    }


def _step_data(step: StepBound, world: int) -> dict[str, Any]:
    return {
        "requests": step.requests,
        "context": step.context,
        "fits": step.fits,
        "moe_layer_us": round(step.moe_layer * 1e6, 2),
        "dense_layer_us": round(step.dense_layer * 1e6, 2),
        "step_ms": round(step.step * 1e3, 4),
        "tokens_per_s": round(step.tokens_per_second, 1),
        "tokens_per_s_per_gpu": round(step.tokens_per_second / world, 1),
        "tokens_per_s_per_user": round(step.tokens_per_second_per_user, 2),
        "operations_us": {name: round(seconds * 1e6, 2) for name, seconds in step.operations.items()},
    }


def print_plan(plan: Plan, console: Console) -> None:
    """Tables for a reader."""
    weights, question = plan.weights, plan.question
    console.print(f"[bold]{escape(plan.model.name)}[/] from {escape(plan.model.origin)}", soft_wrap=True)
    nextn = f", NextN layer {_billions(weights.nextn_parameters)}" if weights.nextn_parameters else ""
    stored = ", ".join(f"{dtype} {size / 1e9:.2f} GB" for dtype, size in weights.stored_bytes.items())
    console.print(
        f"{_billions(weights.parameters)} parameters, {_billions(weights.active_parameters)} per token{nextn}; "
        f"files: {stored}; {_cache_name(plan)} cache: {plan.token_bytes / 1024:.1f} KiB per token",
        soft_wrap=True,
    )
    console.print(f"{question.num_gpus} x {question.gpu.name} ({escape(question.gpu.source)})", soft_wrap=True)
    console.print(_memory_table(plan))
    for layout in plan.layouts:
        if layout.cache_tokens:
            console.print(_speed_table(layout))
    for remark in remarks(plan):
        console.print(f"- {escape(remark)}")
    for best, chosen in _distinct(suggestions(plan)).items():
        console.print(f"\nfor {best} ({chosen.layout.name}):")
        console.print(escape(" ".join(_command(plan, chosen))), soft_wrap=True)


def _distinct(chosen: dict[str, LayoutPlan]) -> dict[str, LayoutPlan]:
    """Layouts by all that they are best at."""
    merged: dict[str, LayoutPlan] = {}
    for layout in {id(layout): layout for layout in chosen.values()}.values():
        merged[" and ".join(best for best, each in chosen.items() if each is layout)] = layout
    return merged


def _cache_name(plan: Plan) -> str:
    return "FP8" if plan.question.is_fp8_cache else "bf16"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _memory_table(plan: Plan) -> Table:
    contexts = plan.question.contexts
    table = Table(
        title=f"memory of each GPU in GiB, at --mem-fraction-static {plan.mem_fraction}", title_justify="left"
    )
    table.add_column("layout")
    headings = ["weights", "experts", "attention", "cache", "longest context"]
    for heading in [*headings, *(f"requests of {context}" for context in contexts)]:
        table.add_column(heading, justify="right")
    for layout in plan.layouts:
        parts = layout.part_bytes
        attention = sum(size for name, size in parts.items() if name.startswith("attention"))
        cache = layout.cache_tokens * plan.token_bytes
        row = [layout.weight_bytes, parts.get("routed experts", 0), attention, cache]
        fits = (str(layout.longest_context), *(str(layout.most_requests[context]) for context in contexts))
        table.add_row(
            layout.layout.name,
            *(f"{size / _GIB:.1f}" for size in row),
            *(fits if layout.cache_tokens else ("does not fit", *("-" for _ in contexts))),
        )
    return table


def _speed_table(plan: LayoutPlan) -> Table:
    table = Table(title=f"{plan.layout.name}: decode at best (rooflines)", title_justify="left")
    headings = (
        "context",
        "requests",
        "layer us",
        "dense layer us",
        "step ms",
        "tok/s",
        "tok/s/GPU",
        "tok/s/user",
        "most",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for step in plan.steps:
        slowest = max(step.operations, key=lambda name: step.operations[name])
        cells = (
            str(step.context),
            str(step.requests),
            f"{step.moe_layer * 1e6:.0f}",
            f"{step.dense_layer * 1e6:.0f}",
            f"{step.step * 1e3:.2f}",
            f"{step.tokens_per_second:.0f}",
            f"{step.tokens_per_second / plan.layout.world:.0f}",
            f"{step.tokens_per_second_per_user:.1f}",
            f"{slowest} {step.operations[slowest] / step.moe_layer:.0%}",
        )
        table.add_row(*cells, style="" if step.fits else "dim", end_section=False)
    table.caption = "Dim rows do not fit into the cache at once." if any(not step.fits for step in plan.steps) else None
    return table
