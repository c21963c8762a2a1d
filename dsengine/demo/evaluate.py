"""Measures the demo checkpoint on the engine: `python -m dsengine.demo.evaluate`.

All problems are held out (their operands never occur in training), decoding is greedy, and the figures are a function
of the checkpoint alone. It takes the engine's flags; with speculation the plain engine solves the problems as well, and
the answers that are the same, token for token, are counted. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from dsengine import LLM, SamplingParams
from dsengine.cli_flags import (
    Parser,
    UsageError,
    add_config_flags,
    add_model_argument,
    build_config,
    given_fields,
    resolve_model,
)
from dsengine.config import EngineConfig
from dsengine.demo.batches import encode
from dsengine.demo.problems import (
    Problem,
    held_out_conversations,
    other_problems,
    parse_calls,
    three_digit_problems,
    tool_problems,
)
from dsengine.outputs import CompletionOutput
from dsengine.specdec.acceptance import first_draft_acceptance

MAX_TOKENS = 256
Figures = dict[str, float]


@dataclass(frozen=True)
class Problems:
    """What there is to solve."""

    sums: list[Problem]
    calls: list[Problem]
    thinking: list[Problem]
    plain: list[Problem]

    @classmethod
    def held_out(cls, arithmetic: int, tools: int, others: int) -> Problems:
        """So many problems of three-digit arithmetic, of tool use and of each other task."""
        return cls(
            three_digit_problems(arithmetic),
            tool_problems(tools),
            other_problems(others, thinking=True),
            other_problems(others, thinking=False),
        )

    @property
    def all(self) -> list[Problem]:
        return [*self.sums, *self.calls, *self.thinking, *self.plain]


def solve(llm: LLM, problems: Sequence[Problem]) -> list[CompletionOutput]:
    """Greedy answers."""
    prompts = [llm.tokenizer.encode(problem.prompt, add_special_tokens=False) for problem in problems]
    outputs = llm.generate(
        prompt_token_ids=prompts, sampling_params=SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    )
    return [output.outputs[0] for output in outputs]


def complete(llm: LLM, problems: Sequence[Problem]) -> list[str]:
    """Greedy completions, without the end of sentence."""
    return [answer.text for answer in solve(llm, problems)]


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


def grade(problems: Problems, texts: Sequence[str]) -> dict[str, Any]:
    """The share of right answers per task, given those to all problems in order."""
    left = iter(texts)
    sums, calls = [next(left) for _ in problems.sums], [next(left) for _ in problems.calls]
    thinking, plain = [next(left) for _ in problems.thinking], [next(left) for _ in problems.plain]
    right = [problem.grade(text) for problem, text in zip(problems.sums, sums, strict=True)]
    called = [problem.grade(text) for problem, text in zip(problems.calls, calls, strict=True)]
    return {
        "three-digit arithmetic": round(sum(right) / len(right), 4),
        **accuracy(problems.sums, sums),
        "tool call": round(sum(called) / len(called), 4),
        **accuracy(problems.calls, calls),
        "tool call well-formed": round(sum(parse_calls(text) is not None for text in calls) / len(calls), 4),
        "thinking": accuracy(problems.thinking, thinking),
        "not thinking": accuracy(problems.plain, plain),
    }


def compare(llm: LLM, problems: Problems, drafted: Sequence[CompletionOutput], speculating: LLM) -> dict[str, Any]:
    """What drafts changed in the answers, which should be nothing, and in the steps that led to them.

    Args:
        llm: an engine that does not draft.
        drafted: the other engine's answers to all problems, its first and only ones.
    """
    before = llm.core.stats().num_steps
    answers = solve(llm, problems.all)
    same = [
        (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        for ours, theirs in zip(drafted, answers, strict=True)
    ]
    stats = speculating.core.stats().speculation
    assert stats is not None
    return {
        "speculation": speculating.core.info.speculation,
        "answers": len(same),
        "answers as without": sum(same),
        "tokens": sum(len(answer.token_ids) for answer in answers),
        "trees": sum(stats.lengths),
        "drafts accepted": stats.num_accepted,
        "steps": speculating.core.stats().num_steps,
        "steps without": llm.core.stats().num_steps - before,
    }


def print_figures(figures: dict[str, Any], speculation: dict[str, Any]) -> None:
    table = Table("task", "share right", title="Demo model, held-out problems, greedy")
    for name, value in figures.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for task, share in rows:
            table.add_row(f"{task} ({name})" if task else name, f"{share:.1%}")
    for name, value in speculation.items():
        table.add_row(name, str(value))
    Console(width=100).print(table)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m dsengine.demo.evaluate", description=__doc__)
    parser.add_argument("--arithmetic", type=int, default=300, help="three-digit additions and subtractions [300]")
    parser.add_argument("--tools", type=int, default=100, help="requests with a matching tool [100]")
    parser.add_argument("--others", type=int, default=30, help="problems of each other task [30]")
    add_model_argument(parser)
    add_config_flags(parser, EngineConfig, "engine", skip={"model"})
    args = parser.parse_args(argv)
    for name in ("arithmetic", "tools", "others"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    resolve_model(args)
    build_config(args, EngineConfig)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    options = given_fields(args, EngineConfig)
    problems = Problems.held_out(args.arithmetic, args.tools, args.others)
    started, speculation = time.monotonic(), dict[str, Any]()
    with LLM(progress=False, **options) as llm:
        answers = solve(llm, problems.all)
        figures = grade(problems, [answer.text for answer in answers])
        figures["nextn acceptance"] = acceptance(llm, 2 * args.others)
        dtype = llm.core.info.dtype
        if "speculative_algorithm" in options:
            plain = {name: value for name, value in options.items() if not name.startswith("speculative_")}
            with LLM(progress=False, **plain) as other:
                speculation = compare(other, problems, answers, llm)
    print_figures(figures, speculation)
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"benchmark": "demo", "dtype": dtype, "seconds": seconds, **figures, **speculation}))


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(str(error))
