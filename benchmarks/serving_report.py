"""From the records of a run to its figures, a table and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving_client import Record

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` % lie, interpolated between neighbours; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles in milliseconds; None where there is nothing to measure."""
    if not seconds:
        return dict.fromkeys(("mean", "max", *(f"p{p}" for p in PERCENTILES)))
    figures = {"mean": sum(seconds) / len(seconds), "max": max(seconds)}
    figures |= {f"p{p}": percentile(seconds, p) for p in PERCENTILES}
    return {name: round(value * 1000, 3) for name, value in figures.items()}


def summarize(
    records: Sequence[Record], slo_ttft_ms: float | None = None, slo_itl_ms: float | None = None
) -> dict[str, Any]:
    """The figures of a run.

    Goodput counts the requests whose TTFT and mean time per output token (TPOT) both meet their targets, per second.
    """
    good = [record for record in records if record.error is None]
    duration = max((r.end for r in records), default=0.0) - min((r.start for r in records), default=0.0)
    per_second = 1 / duration if duration > 0 else 0.0
    prompt_tokens = sum(r.prompt_tokens for r in good)
    output_tokens = sum(r.output_tokens for r in good)
    cached_tokens = sum(r.cached_tokens for r in good)
    figures: dict[str, Any] = {
        "completed": len(good),
        "failed": len(records) - len(good),
        "errors": sorted({r.error for r in records if r.error is not None})[:5],
        "duration_s": round(duration, 3),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached_tokens,
        "cache_hit_rate": round(cached_tokens / prompt_tokens, 4) if prompt_tokens else None,
        "output_tokens": output_tokens,
        "requests_per_s": round(len(good) * per_second, 3),
        "prompt_tokens_per_s": round(prompt_tokens * per_second, 2),
        "output_tokens_per_s": round(output_tokens * per_second, 2),
        "ttft_ms": spread([r.ttft for r in good]),
        "tpot_ms": spread([r.tpot for r in good if r.tpot is not None]),
        "itl_ms": spread([gap for r in good for gap in r.gaps]),
        "e2e_ms": spread([r.latency for r in good]),
    }
    if slo_ttft_ms is not None or slo_itl_ms is not None:
        met = [r for r in good if meets(r, slo_ttft_ms, slo_itl_ms)]
        figures |= {
            "slo_ttft_ms": slo_ttft_ms,
            "slo_itl_ms": slo_itl_ms,
            "goodput_requests_per_s": round(len(met) * per_second, 3),
            "slo_attainment": round(len(met) / len(records), 4) if records else None,
        }
    return figures


def meets(record: Record, slo_ttft_ms: float | None, slo_itl_ms: float | None) -> bool:
    in_time = slo_ttft_ms is None or record.ttft * 1000 <= slo_ttft_ms
    return in_time and (slo_itl_ms is None or record.tpot is None or record.tpot * 1000 <= slo_itl_ms)


def print_tables(title: str, figures: dict[str, Any]) -> None:
    console = Console(width=100)
    table = Table(title=title, show_header=False)
    for name, value in figures.items():
        if not isinstance(value, dict):
            table.add_row(name.replace("_", " "), str(value))
    console.print(table)
    latency = Table(title="milliseconds")
    for heading in ("", "mean", "p50", "p90", "p99", "max"):
        latency.add_column(heading, justify="right")
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        values = figures[name]
        cells = ("-" if values[k] is None else f"{values[k]:.1f}" for k in ("mean", "p50", "p90", "p99", "max"))
        latency.add_row(name.removesuffix("_ms").upper(), *cells)
    console.print(latency)


def plot(records: Sequence[Record], title: str, path: Path) -> None:
    """Draw the distributions of TTFT, ITL and latency, and the throughput over time.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [record for record in records if record.error is None]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    curves = (
        ("time to first token (ms)", [r.ttft for r in good]),
        ("inter-token latency (ms)", [gap for r in good for gap in r.gaps]),
        ("end-to-end latency (ms)", [r.latency for r in good]),
    )
    for axis, (label, seconds) in zip(axes.flat, curves, strict=False):
        ordered = sorted(value * 1000 for value in seconds)
        axis.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], drawstyle="steps-post")
        axis.set(xlabel=label, ylabel="fraction of all", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    _plot_throughput(axes.flat[3], good)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_throughput(axis: Any, records: Sequence[Record]) -> None:
    times = [time for record in records for time in record.chunk_times]
    start, end = min(times, default=0.0), max(times, default=1.0)
    num_bins = 50
    width = max((end - start) / num_bins, 1e-6)
    bins = [0] * num_bins
    for time in times:
        bins[min(int((time - start) / width), num_bins - 1)] += 1
    axis.plot([start + (i + 0.5) * width for i in range(num_bins)], [count / width for count in bins])
    axis.set(xlabel="seconds since start", ylabel="chunks per second", ylim=(0, None))
    axis.grid(alpha=0.3)
