"""What does structured output cost per token, and what do jumps over fixed texts gain?

Two questions. How long does it take to follow a grammar: a token's mask, the acceptance of a token, the search for a
proposal, on the demo's vocabulary and on a made-up one of V3's size? And how much sooner are answers in a JSON schema
done when what the schema fixes is proposed in one piece (`--disable-jump-forward` against the default)? Both engines
take turns within every round; their answers must be the same, token for token.

    python benchmarks/structured.py [--batch-size 1 8] [--rounds 3] [--num-threads 1] [--speculative-algorithm NEXTN]

The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import xgrammar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsengine import LLM, SamplingParams
from dsengine.engine.grammar import GrammarStore
from dsengine.engine.jump_forward import LONGEST
from dsengine.engine.messages import AddRequest, GrammarUse
from dsengine.server.grammar.shapes import answer_shape
from dsengine.server.grammar.vocabulary import vocabulary
from dsengine.server.protocol_messages import ToolOptions
from dsengine.server.tools.formats import detect_format
from dsengine.tokenizer.tokenizer import Tokenizer

V3_VOCABULARY = 129_280


def schema(**properties: Any) -> dict[str, Any]:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


NAME = {"type": "string", "maxLength": 12}
SCHEMAS = {
    "person": schema(name=NAME, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "order": schema(
        customer_name=NAME,
        delivery_method={"enum": ["standard", "express", "pickup"]},
        number_of_items={"type": "integer", "minimum": 1, "maximum": 99},
        is_gift={"type": "boolean"},
    ),
    "weather": schema(
        location=schema(city=NAME, country=NAME),
        temperature=schema(value={"type": "integer", "minimum": -60, "maximum": 60}, unit={"enum": ["C", "F"]}),
    ),
}
TOOL_TASK = "call"
QUESTIONS = {
    "person": "Extract JSON: Anna is 31 years old.",
    "order": "Extract JSON: Tom orders 4 lamps, express, as a gift.",
    "weather": "Extract JSON: it is 21 degrees Celsius in Rome, Italy.",
    TOOL_TASK: "What is the weather in Rome in celsius?",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather in a city",
            "parameters": schema(location=NAME, unit={"enum": ["celsius", "fahrenheit"]}),
        },
    }
]


def compile_schemas(tokens: Sequence[bytes], stop_token_ids: Sequence[int], vocab_size: int) -> dict[str, str]:
    info = xgrammar.TokenizerInfo(
        list(tokens), xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=list(stop_token_ids)
    )
    compiler = xgrammar.GrammarCompiler(info)
    return {
        name: compiler.compile_json_schema(json.dumps(value), any_whitespace=False).serialize_json()
        for name, value in SCHEMAS.items()
    }


def compile_calls(tokenizer: Tokenizer, vocab_size: int) -> str:
    """A call of the function that the prompt describes, as `tool_choice: required` asks for it."""
    words = vocabulary(tokenizer)
    info = xgrammar.TokenizerInfo(
        words.tokens, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=words.stop_token_ids
    )
    options = ToolOptions.model_validate({"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False})
    shape = answer_shape(options, None, detect_format(tokenizer), tokenizer)
    tag = json.dumps({"type": "structural_tag", "format": shape})
    return str(xgrammar.GrammarCompiler(info).compile_structural_tag(tag).serialize_json())


def made_up_vocabulary(size: int) -> list[bytes]:
    """All bytes, then words, numbers and punctuation as a tokenizer's vocabulary has them; the last one is the end."""
    rng = random.Random(0)
    tokens = {bytes([i]): None for i in range(256)}
    for mark in ('{"', '":', '", "', '"}', '": "', ', "', "},", '": {"', "}}"):
        tokens[mark.encode()] = None
    while len(tokens) < size - 1:
        word = "".join(rng.choices("etaoinshrdlucmfw", k=rng.randrange(2, 9)))
        tokens[
            (rng.choice((" ", "", "", '"')) + rng.choice((word, word.title(), str(rng.randrange(1000))))).encode()
        ] = None
        tokens[word.encode()] = None
    return [*list(tokens)[: size - 1], b""]


def microseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1e6 * (time.perf_counter() - started)


def following_cost(tokens: Sequence[bytes], stop_token_ids: Sequence[int], rounds: int) -> dict[str, float]:
    """Median microseconds of each part of following a grammar, over random texts of all schemas."""
    store = GrammarStore(len(tokens))
    store.load_vocabulary(tokens, stop_token_ids)
    times: dict[str, list[float]] = {"mask": [], "accept": [], "propose": []}
    mask = torch.full((1, -(-len(tokens) // 32)), -1, dtype=torch.int32)
    bits = torch.arange(32, dtype=torch.int32)
    rng = random.Random(1)
    for name, data in compile_schemas(tokens, stop_token_ids, len(tokens)).items():
        store.load(name, data)
        for _ in range(rounds):
            state, output = store.start(name, None), list[int]()
            while not output or output[-1] not in stop_token_ids:
                times["propose"].append(microseconds(partial(state.propose, output, LONGEST)))
                mask.fill_(-1)
                times["mask"].append(microseconds(partial(state.fill, mask, 0)))
                allowed = ((mask[0, :, None] >> bits) & 1).flatten().nonzero().flatten().tolist()
                output.append(rng.choice(allowed))
                times["accept"].append(microseconds(partial(state.catch_up, output)))
    return {name: statistics.median(values) for name, values in times.items()}


class Engine:
    """An LLM whose core follows the schemas."""

    def __init__(self, args: argparse.Namespace, *, jumps: bool) -> None:
        self.llm = LLM(
            progress=False,
            num_threads=args.num_threads,
            max_total_tokens=16_384,
            speculative_algorithm=args.speculative_algorithm,
            disable_jump_forward=not jumps,
        )
        words, core = vocabulary(self.llm.tokenizer), self.llm.core
        core.grammars.load_vocabulary(words.tokens, words.stop_token_ids)
        for name, data in compile_schemas(words.tokens, words.stop_token_ids, core.info.vocab_size).items():
            core.grammars.load(name, data)
        core.grammars.load(TOOL_TASK, compile_calls(self.llm.tokenizer, core.info.vocab_size))

    def answer(self, batch_size: int, name: str) -> tuple[float, int, list[list[int]]]:
        """Seconds, steps, and the tokens of every answer."""
        core, template = self.llm.core, self.llm.tokenizer.chat_template
        tools = TOOLS if name == TOOL_TASK else None
        text = template.render([{"role": "user", "content": QUESTIONS[name]}], tools=tools, thinking=False)
        prompt = self.llm.tokenizer.encode(text, add_special_tokens=False)
        outputs: dict[str, list[int]] = {str(i): [] for i in range(batch_size)}
        first_step, started = core.stats().num_steps, time.perf_counter()
        for request_id in outputs:
            params = SamplingParams(temperature=0.7, seed=int(request_id), max_tokens=200)
            core.add_request(AddRequest(request_id, prompt, params, grammar=GrammarUse(name)), 0.0)
        while core.has_work:
            for update in core.step(0.0).updates:
                outputs[update.request_id] += update.new_token_ids
        return time.perf_counter() - started, core.stats().num_steps - first_step, list(outputs.values())


def compare(plain: Engine, jumping: Engine, tasks: Sequence[str], batch_size: int, rounds: int) -> dict[str, Any]:
    """Both engines on some tasks, in turns; the first round warms up and is dropped."""
    ratios, steps, num_tokens = [], [0, 0], 0
    for number in range(rounds + 1):
        seconds = [0.0, 0.0]
        for name in tasks:
            order = [(0, plain), (1, jumping)]
            answers = {}
            for which, engine in order if number % 2 else reversed(order):
                elapsed, taken, answers[which] = engine.answer(batch_size, name)
                seconds[which] += elapsed
                steps[which] += taken if number else 0
            if answers[0] != answers[1]:
                raise AssertionError(f"jumps have changed an answer in the schema {name}")
            num_tokens += sum(map(len, answers[0])) if number else 0
        if number:
            ratios.append(seconds[0] / seconds[1])
    return {
        "tasks": list(tasks),
        "batch_size": batch_size,
        "tokens_per_answer": num_tokens / (rounds * len(tasks) * batch_size),
        "steps_plain": steps[0] / (rounds * len(tasks)),
        "steps_jumping": steps[1] / (rounds * len(tasks)),
        "speedup": statistics.median(ratios),
        "speedups": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], metavar="B", help="[1 8]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of both engines [3]")
    parser.add_argument("--num-threads", type=int, default=1, metavar="N", help="threads of the engines [1]")
    parser.add_argument("--speculative-algorithm", choices=("NEXTN", "NGRAM"), help="of both engines [none]")
    args = parser.parse_args()
    plain, jumping = Engine(args, jumps=False), Engine(args, jumps=True)
    words = vocabulary(plain.llm.tokenizer)
    costs = {
        str(len(words.tokens)): following_cost(words.tokens, words.stop_token_ids, args.rounds),
        str(V3_VOCABULARY): following_cost(made_up_vocabulary(V3_VOCABULARY), [V3_VOCABULARY - 1], args.rounds),
    }
    for size, parts in costs.items():
        print(f"vocabulary {size:>7}: " + ", ".join(f"{part} {value:.0f} µs" for part, value in parts.items()))
    rows = [
        compare(plain, jumping, tasks, batch_size, args.rounds)
        for tasks in ([TOOL_TASK], list(SCHEMAS))
        for batch_size in args.batch_size
    ]
    for row in rows:
        print(
            f"{'call of a function' if row['tasks'] == [TOOL_TASK] else 'unknown schemas':>18}, "
            f"batch {row['batch_size']:3d}: {row['tokens_per_answer']:.1f} tokens an answer, "
            f"{row['steps_plain']:.1f} steps without jumps, {row['steps_jumping']:.1f} with, "
            f"{row['speedup']:.2f} times as fast"
        )
    jumped = jumping.llm.core.stats().num_jumped_tokens
    version = {"python": platform.python_version(), "xgrammar": metadata.version("xgrammar")}
    options = {"speculative_algorithm": args.speculative_algorithm, "num_threads": args.num_threads}
    print(
        json.dumps(
            {"benchmark": "structured", **version, **options, "following_us": costs, "jumped": jumped, "rows": rows}
        )
    )


if __name__ == "__main__":
    main()
