"""Measures the demo checkpoint on the engine: `python -m dsengine.demo.evaluate`.

All problems are held out (their operands never occur in training), decoding is greedy, and the figures are a function
of the checkpoint alone. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from dsengine import LLM, SamplingParams
from dsengine.demo.batches import encode
from dsengine.demo.problems import (
    Problem,
    held_out_conversations,
    other_problems,
    parse_calls,
    three_digit_problems,
    tool_problems,
)
from dsengine.specdec.acceptance import first_draft_acceptance

MAX_TOKENS = 256
Figures = dict[str, float]


def complete(llm: LLM, problems: Sequence[Problem]) -> list[str]:
    """Greedy completions, without the end of sentence."""
    prompts = [llm.tokenizer.encode(problem.prompt, add_special_tokens=False) for problem in problems]
    outputs = llm.generate(
        prompt_token_ids=prompts, sampling_params=SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    )
    return [output.outputs[0].text for output in outputs]


def accuracy(problems: Sequence[Problem], completions: Sequence[str]) -> Figures:
    """Share of right completions per task."""
    marks: dict[str, list[bool]] = defaultdict(list)
    for problem, text in zip(problems, completions, strict=True):
        marks[problem.task].append(problem.grade(text))
    return {task: round(sum(right) / len(right), 4) for task, right in marks.items()}


def acceptance(llm: LLM, count: int) -> float:
    """How often NextN's first draft is the model's own choice, on the assistant's part of held-out conversations."""
    tokenizer = Tokenizer.from_file(str(Path(llm.core.info.model) / "tokenizer.json"))
    samples = [encode(tokenizer, conversation) for conversation in held_out_conversations(count)]
    tokens, masks = [ids for ids, _ in samples], [written for _, written in samples]
    return round(first_draft_acceptance(llm.core.model, tokens, masks).rate, 4)


def evaluate(llm: LLM, arithmetic: int, tools: int, others: int) -> dict[str, Any]:
    """All figures, for so many problems of three-digit arithmetic, of tool use and of each other task."""
    sums = three_digit_problems(arithmetic)
    sum_texts = complete(llm, sums)
    calls = tool_problems(tools)
    call_texts = complete(llm, calls)
    thinking, plain = other_problems(others, thinking=True), other_problems(others, thinking=False)
    right = [problem.grade(text) for problem, text in zip(sums, sum_texts, strict=True)]
    called = [problem.grade(text) for problem, text in zip(calls, call_texts, strict=True)]
    return {
        "three-digit arithmetic": round(sum(right) / len(right), 4),
        **accuracy(sums, sum_texts),
        "tool call": round(sum(called) / len(called), 4),
        **accuracy(calls, call_texts),
        "tool call well-formed": round(sum(parse_calls(text) is not None for text in call_texts) / len(calls), 4),
        "thinking": accuracy(thinking, complete(llm, thinking)),
        "not thinking": accuracy(plain, complete(llm, plain)),
        "nextn acceptance": acceptance(llm, 2 * others),
    }


def print_figures(figures: dict[str, Any]) -> None:
    table = Table("task", "share right", title="Demo model, held-out problems, greedy")
    for name, value in figures.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for task, share in rows:
            table.add_row(f"{task} ({name})" if task else name, f"{share:.1%}")
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="another checkpoint of the same tokenizer; the embedded one by default")
    parser.add_argument("--arithmetic", type=int, default=300, help="three-digit additions and subtractions")
    parser.add_argument("--tools", type=int, default=100, help="requests with a matching tool")
    parser.add_argument("--others", type=int, default=30, help="problems of each other task")
    arguments = parser.parse_args()
    started = time.monotonic()
    with LLM(arguments.model, progress=False) as llm:
        figures = evaluate(llm, arguments.arithmetic, arguments.tools, arguments.others)
        dtype = llm.core.info.dtype
    print_figures(figures)
    print(json.dumps({"benchmark": "demo", "dtype": dtype, "seconds": round(time.monotonic() - started, 1), **figures}))


if __name__ == "__main__":
    main()
