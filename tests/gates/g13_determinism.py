"""G13: the same prompts alone, in company, in chunks, from the cache, preempted and speculated on, on the CPU."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gate_frame import Findings, Outcome, Scale

from dsengine import LLM, RequestOutput, SamplingParams
from dsengine.engine.core import EngineCore

TITLE = "the same tokens however they are computed (CPU)"
TARGET = "500 prompts in 6 ways: equal tokens, log-probabilities within 2e-4 (float32 sums in another order)"
TOLERANCE = 2e-4
OUTPUT_TOKENS = 10
EXAMPLE = "347+285. ones: 7+5=12, write 2 carry 1. tens: 4+8+1=13, write 3 carry 1. hundreds: 3+2+1=6. Total 632."
NEXTN = {
    "speculative_algorithm": "NEXTN",
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 2,
    "speculative_adaptive": False,
}
WAYS: dict[str, dict[str, Any]] = {
    "in company": {"max_running_requests": 64, "disable_radix_cache": True},
    "chunked": {"chunked_prefill_size": 13, "disable_radix_cache": True},
    "cached": {"block_size": 4},
    "preempted": {"block_size": 4, "max_total_tokens": 260, "chunked_prefill_size": 48, "disable_radix_cache": True},
    "speculated on": NEXTN,
}


def run(scale: Scale, seed: int) -> Outcome:
    rng, found = random.Random(seed), Findings("G13")
    prompts = [_prompt(rng) for _ in range(scale.of(500, 16))]
    params = [_params(rng, number) for number in range(len(prompts))]
    with _engine(max_running_requests=1, disable_radix_cache=True) as llm:
        alone = llm.generate(prompts, params)
    num_tokens = sum(len(output.outputs[0].token_ids) for output in alone)
    seen, largest = {}, 0.0
    for way, options in WAYS.items():
        with _engine(**options) as llm:
            if way == "preempted":
                _promise_no_growth(llm)
            outputs = llm.generate(prompts, params)
            if way == "cached":  # the second time all is there
                outputs = llm.generate(prompts, params)
            seen[way] = _effect(way, llm, outputs)
            llm.core.check_integrity()
        if not seen[way]:
            found.fail(f"{way}: nothing of the kind happened")
        largest = max(largest, *(_differs(found, way, *pair) for pair in zip(alone, outputs, strict=True)))
    found.num_cases += len(prompts)  # those alone
    effects = ", ".join(f"{way} ({count:,})" for way, count in seen.items())
    return found.outcome(
        f"{found.num_cases:,} outputs of {num_tokens:,} tokens each way: alone, {effects}: "
        f"{len(found.failures)} differ, log-probabilities by {largest:.1e} at most"
    )


def _engine(**options: Any) -> LLM:
    return LLM(device="cpu", num_threads=1, progress=False, **({"max_total_tokens": 16_384} | options))


def _promise_no_growth(llm: LLM) -> None:
    """Admit requests without room for their outputs, so that some must give theirs up for others."""
    core = llm.core
    assert isinstance(core, EngineCore)
    reservations = core._scheduler._reservations
    reservations._config = replace(reservations._config, decode_reserve_tokens=0)


def _prompt(rng: random.Random) -> str:
    """The beginning of a sum in the demo model's own words: text that it continues surely, and drafts well."""
    example = f"{EXAMPLE} " if rng.random() < 0.5 else ""
    return f"{example}{rng.randrange(100, 999)}+{rng.randrange(100, 999)}. ones: "


def _params(rng: random.Random, number: int) -> SamplingParams:
    common: dict[str, Any] = {"max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "logprobs": 2}
    if number % 2:
        return SamplingParams(temperature=rng.choice((0.5, 1.0)), top_p=0.9, seed=number, **common)
    return SamplingParams(temperature=0.0, **common)


def _effect(way: str, llm: LLM, outputs: Sequence[RequestOutput]) -> int:
    """How often that happened which the way is named for."""
    stats = llm.core.stats()
    if way == "preempted":
        return stats.num_preemptions
    if way == "cached":
        return sum(output.metrics.num_cached_tokens for output in outputs)
    if way == "speculated on":
        assert stats.speculation is not None
        return sum(accepted * count for accepted, count in enumerate(stats.speculation.lengths))
    return stats.num_steps


def _differs(found: Findings, way: str, alone: RequestOutput, other: RequestOutput) -> float:
    """Compares one output with that of the request alone; returns the largest difference of a log-probability."""
    found.num_cases += 1
    [one], [two] = alone.outputs, other.outputs
    if (one.token_ids, one.text, one.finish_reason) != (two.token_ids, two.text, two.finish_reason):
        found.fail(f"{way}: {alone.prompt!r} continues with {two.text!r}, alone with {one.text!r}")
        return 0.0
    assert one.logprobs is not None and two.logprobs is not None
    largest = max(abs(a.logprob - b.logprob) for a, b in zip(one.logprobs, two.logprobs, strict=True))
    if largest > TOLERANCE:
        found.fail(f"{way}: {alone.prompt!r}: log-probabilities differ by {largest}")
    return largest
