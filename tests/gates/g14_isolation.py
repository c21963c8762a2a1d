"""G14: in batches of sixteen one request goes wrong; the fifteen others must not notice."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import xgrammar
from gate_frame import Findings, Outcome, Scale
from tiny_engine import TOKENIZER_SIZE, random_prompts, write_tiny_checkpoint

from dsengine import LLM, SamplingParams
from dsengine.engine.core import EngineCore
from dsengine.engine.messages import AddRequest, GrammarUse, RequestUpdate
from dsengine.server.grammar.vocabulary import vocabulary

TITLE = "one bad request in a batch of sixteen"
TARGET = "200 batches (NaN, poisoned grammar, abort in the middle of a step): 15 mates equal every time, 0 blocks lost"
POISON = TOKENIZER_SIZE + 3  # the model has it, the tokenizer does not: nobody draws or drafts it
MATES = 15
PARAMS = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
BOMB = 'root ::= s "b"\ns ::= s s s | s s | "a" | "aa"'
FAULTS = ("NaN", "poisoned grammar", "abort in a step", "two aborts in a step")
# What the bad request must end with; one that was aborted gets no update.
ENDS: dict[str, str | None] = {
    "NaN": "error",
    "poisoned grammar": "error",
    "abort in a step": None,
    "two aborts in a step": None,
}
# Under speculation an abort falls between drafting, verifying and accepting.
ENGINES: tuple[dict[str, Any], ...] = (
    {},
    {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3, "speculative_eagle_topk": 2},
    {"speculative_algorithm": "NGRAM", "speculative_num_steps": 4},
    {"max_total_tokens": 1_000, "chunked_prefill_size": 40},
)


def run(scale: Scale, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return _Batches(write_tiny_checkpoint(Path(folder)), random.Random(seed), scale.of(60, 16)).run(scale)


class _Batches:
    def __init__(self, checkpoint: Path, rng: random.Random, num_prompts: int) -> None:
        self._checkpoint = checkpoint
        self._rng = rng
        self._found = Findings("G14")
        self._counts = Counter[str]()
        self._prompts = random_prompts(num_prompts, seed=rng.randrange(1000))

    def run(self, scale: Scale) -> Outcome:
        for options in ENGINES[:2] if scale.quick else ENGINES:
            with self._engine(options) as llm:
                core = llm.core
                assert isinstance(core, EngineCore)
                golden = [
                    llm.generate(prompt_token_ids=p, sampling_params=PARAMS)[0].outputs[0].token_ids
                    for p in self._prompts
                ]
                core.model.embed_tokens[POISON] = torch.nan
                self._load_grammars(llm, core)
                for number in range(scale.of(52, 4)):
                    self._batch(core, golden, FAULTS[number % len(FAULTS)])
        counts = ", ".join(f"{count} x {name}" for name, count in self._counts.items() if name != "mates")
        return self._found.outcome(
            f"{self._found.num_cases} batches ({counts}): {self._counts['mates']:,} mates equal, "
            f"{len(self._found.failures)} complaints"
        )

    def _engine(self, options: dict[str, Any]) -> LLM:
        common: dict[str, Any] = {"max_total_tokens": 4_096, "block_size": 8, "num_threads": 1, "device": "cpu"}
        return LLM(str(self._checkpoint), progress=False, **(common | options))

    def _load_grammars(self, llm: LLM, core: EngineCore) -> None:
        words = vocabulary(llm.tokenizer)
        self._letters = {letter: words.tokens.index(letter.encode()) for letter in "ab"}
        core.grammars.load_vocabulary(words.tokens, words.stop_token_ids)
        info = xgrammar.TokenizerInfo(
            words.tokens,
            xgrammar.VocabType.RAW,
            vocab_size=core.info.vocab_size,
            stop_token_ids=words.stop_token_ids,
        )
        core.grammars.load("bomb", xgrammar.GrammarCompiler(info).compile_grammar(BOMB).serialize_json())

    def _batch(self, core: EngineCore, golden: list[list[int]], fault: str) -> None:
        self._found.num_cases += 1
        numbers = [self._rng.randrange(len(self._prompts)) for _ in range(MATES)]
        messages = [AddRequest(str(place), self._prompts[n], PARAMS) for place, n in enumerate(numbers)]
        messages.insert(self._rng.randrange(MATES + 1), self._bad_request(fault))
        for message in messages:
            core.add_request(message, 0.0)
        updates = self._drive(core, fault)
        outputs: dict[str, list[int]] = {name: [] for name in ("bad", *map(str, range(MATES)))}
        ends: dict[str, RequestUpdate] = {}
        for update in updates:
            outputs[update.request_id].extend(update.new_token_ids)
            if update.finish_reason is not None:
                ends[update.request_id] = update
        for place, number in enumerate(numbers):
            if outputs[str(place)] == golden[number] and ends[str(place)].finish_reason == "length":
                self._counts["mates"] += 1
            else:
                self._found.fail(f"{fault}: a mate got {outputs[str(place)]}, alone {golden[number]}")
        reason = ends["bad"].finish_reason if "bad" in ends else None
        self._counts[f"{fault} ended with {reason}"] += 1
        if reason != ENDS[fault]:
            self._found.fail(f"{fault}: the bad request ended with {reason}, expected {ENDS[fault]}")
        core.check_integrity()
        if core.stats().num_blocks_in_use or core.has_work:
            self._found.fail(f"{fault}: something is left: {core.stats()}")

    def _bad_request(self, fault: str) -> AddRequest:
        prompt = list(self._rng.choice(self._prompts))
        if fault == "NaN":
            prompt.insert(self._rng.randrange(len(prompt) + 1), POISON)
        grammar = GrammarUse("bomb") if fault == "poisoned grammar" else None
        # With this bias the ambiguous part of the grammar goes on and on.
        bias = {self._letters["a"]: 100.0, self._letters["b"]: -100.0} if grammar is not None else None
        params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True, logit_bias=bias)
        return AddRequest("bad", prompt, params, grammar=grammar)

    def _drive(self, core: EngineCore, fault: str) -> list[RequestUpdate]:
        """Steps to the end; an abort falls between the computation of some step and its commit."""
        updates: list[RequestUpdate] = []
        due = self._rng.randrange(1, 9)
        number = 0
        while core.has_work:
            with torch.inference_mode():
                launched = core._launch(0.0)
                if number == due and "abort" in fault:
                    core.abort(["bad"] * (1 + fault.startswith("two")))
                updates += core._settle(launched)
            number += 1
        return updates
