"""Trains the demo model: `python -m dsengine.demo.train --out DIR`. The recipe is the defaults below.

AdamW for embeddings, head, router and norms, Muon for the hidden matrices; a warm-up, a plateau and a linear decay over
a fixed number of steps; in the last part the weights are seen as the exported checkpoint stores them (block FP8, bf16),
so that what is exported is what was trained. Checkpoints resume to the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim import AdamW

from dsengine.demo.batches import PAD_ID, Batch, batches
from dsengine.demo.corpus import COPYING_SHARE, TRAINING_MIXTURE, conversations
from dsengine.demo.generate import greedy
from dsengine.demo.model import DemoConfig, DemoModel, GroupedCausal, WeightForm, identity_form
from dsengine.demo.optim import Muon
from dsengine.demo.problems import Problem, other_problems, three_digit_problems, tool_problems
from dsengine.demo.quantise import stored, stored_form
from dsengine.demo.tokenizer import build_tokenizer, save_tokenizer
from dsengine.demo.unrolled import acceptance


@dataclass(frozen=True)
class Phase:
    """Up to a step: tokens per step and learning rates, of Muon's matrices and AdamW's three groups."""

    until: float
    tokens: int
    hidden: float
    head: float
    embedding: float
    router: float

    @property
    def rates(self) -> tuple[float, ...]:
        return self.hidden, self.head, self.embedding, self.router


@dataclass(frozen=True)
class Recipe:
    steps: int = 5000
    phases: tuple[Phase, ...] = (Phase(math.inf, 3072, 0.008, 1.5e-3, 1e-2, 3e-4),)
    warmup_steps: int = 60
    decay_share: float = 0.3
    final_lr_share: float = 0.03
    quantised_share: float = 0.1
    nextn_weight: float = 0.3
    nextn_start_share: float = 0.65
    nextn_every: int = 3
    copying_share: float = COPYING_SHARE
    bias_rate: float = 1e-3
    seed: int = 1
    threads: int = 2

    def phase(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.until)

    def lr_share(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup_steps)
        left = (self.steps - step) / (self.steps * self.decay_share)
        return warm * (self.final_lr_share + (1 - self.final_lr_share) * min(1.0, left))

    def quantised(self, step: int) -> bool:
        return step >= self.steps * (1 - self.quantised_share)


def optimisers(model: DemoModel) -> list[torch.optim.Optimizer]:
    single, doubled, rest, routers, embeddings = [], [], [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate"):
            routers.append(parameter)
        elif name == "embed_tokens":
            embeddings.append(parameter)
        elif parameter.ndim < 2 or name == "lm_head":
            rest.append(parameter)
        elif "gate_up" in name:
            doubled.append(parameter)
        else:
            single.append(parameter)
    muon = Muon([{"params": single}, {"params": doubled, "halves": 2}], lr=0.0)
    others = [
        AdamW(group, lr=0.0, betas=(0.9, 0.97), weight_decay=0.0, fused=True) for group in (rest, embeddings, routers)
    ]
    return [muon, *others]


def token_losses(model: DemoModel, batch: Batch, form: WeightForm, nextn: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted losses of the main model and of NextN, and the main model's on what the assistant wrote."""
    attend = GroupedCausal(model.config, batch.shapes, batch.source, batch.places)
    later = torch.zeros(())
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.trunk(batch.ids, batch.positions, attend, form)
        losses = F.cross_entropy(model.logits(hidden, form).float(), batch.targets, reduction="none")
        if nextn:
            drafted = model.draft(hidden, batch.targets, batch.positions, attend, form)
            draft_losses = F.cross_entropy(model.logits(drafted, form).float(), batch.later_targets, reduction="none")
            later = (draft_losses * batch.later_weights).sum() / batch.later_weights.sum()
    main = (losses * batch.weights).sum() / batch.weights.sum()
    return main, later, losses.detach()[batch.weights == 1].mean()


@contextmanager
def load_counted(model: DemoModel, tokens: Tensor) -> Iterator[None]:
    """Within, the routers count the load that the marked tokens put on their experts."""
    for moe in model.moe_layers():
        moe.counted = tokens
    yield
    for moe in model.moe_layers():
        moe.counted = None


def balance(model: DemoModel, rate: float) -> float:
    """Nudge each router bias against its load; returns the largest load over the mean."""
    worst = 0.0
    for moe in model.moe_layers():
        mean = moe.load.mean()
        if mean > 0:
            worst = max(worst, float(moe.load.max() / mean))
            moe.bias += rate * torch.sign(mean - moe.load)
            moe.load.zero_()
    return worst


def solve(model: DemoModel, tokenizer: Tokenizer, problems: list[Problem], form: WeightForm) -> dict[str, float]:
    """Share of problems solved, per task, by batched greedy decoding."""
    right: dict[str, list[bool]] = defaultdict(list)
    ordered = sorted(problems, key=lambda problem: len(problem.prompt))
    for start in range(0, len(ordered), 64):
        part = ordered[start : start + 64]
        prompts = [item.ids for item in tokenizer.encode_batch([p.prompt for p in part], add_special_tokens=False)]
        outputs = greedy(model, prompts, 160, form)
        texts = tokenizer.decode_batch(outputs, skip_special_tokens=True)
        for problem, text in zip(part, texts, strict=True):
            right[problem.task].append(problem.grade(text))
    return {task: round(sum(marks) / len(marks), 3) for task, marks in right.items()}


def evaluate(model: DemoModel, tokenizer: Tokenizer, form: WeightForm, size: int) -> dict[str, Any]:
    model.eval()
    frozen = frozen_form(model, form)
    problems = three_digit_problems(2 * size) + tool_problems(size) + other_problems(max(4, size // 4), thinking=True)
    result: dict[str, Any] = solve(model, tokenizer, problems, frozen)
    plain = solve(model, tokenizer, other_problems(max(4, size // 4), thinking=False), frozen)
    result["without thinking"] = plain
    with torch.autocast("cpu", torch.bfloat16):
        [result["acceptance"]] = acceptance(model, tokenizer, frozen, frozen, depth=1)
    model.train()
    return result


def frozen_form(model: DemoModel, form: WeightForm) -> WeightForm:
    """The same weights, converted once instead of at each step of a decoding."""
    if form is identity_form:
        return form
    cache: dict[int, Tensor] = {}

    def cached(weight: Tensor, fp8: bool) -> Tensor:
        if id(weight) not in cache:
            cache[id(weight)] = stored(weight.detach(), fp8)
        return cache[id(weight)]

    return cached


class Run:
    """A training run in a directory: model, optimisers, step and their checkpoint."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe, self.directory, self.step = recipe, directory, 0
        directory.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        self.model = DemoModel(DemoConfig())
        self.optimisers = optimisers(self.model)
        self.tokenizer = self.load_tokenizer()
        self.seen = 0

    def load_tokenizer(self) -> Tokenizer:
        path = self.directory / "tokenizer.json"
        if not path.exists():
            save_tokenizer(build_tokenizer(), self.directory)
        return Tokenizer.from_file(str(path))

    def resume(self) -> None:
        path = self.directory / "state.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            self.step, self.seen = state["step"], state["seen"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(), "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step, "seen": self.seen,
        }  # fmt: skip
        torch.save(state, self.directory / "state.tmp")
        (self.directory / "state.tmp").rename(self.directory / "state.pt")

    def stream(self) -> Iterator[Batch]:
        """Batches from the current step on: a hundred steps share a seed, so that a resumed run sees the same data."""
        step = self.step
        while True:
            block = step // 100
            seed, copying = 1000 * self.recipe.seed + block, self.recipe.copying_share
            conversation_stream = conversations(seed, mixture=TRAINING_MIXTURE, copying=copying)
            source = batches(conversation_stream, self.tokenizer, self.recipe.phase(step).tokens)
            for index in range(100):
                batch = next(source)
                if block * 100 + index >= step:
                    yield batch
            step = (block + 1) * 100

    def train_step(self, batch: Batch) -> dict[str, float]:
        recipe = self.recipe
        form = stored_form if recipe.quantised(self.step) else identity_form
        share, phase = recipe.lr_share(self.step), recipe.phase(self.step)
        for optimiser, base in zip(self.optimisers, phase.rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = base * share
        drafting = self.step >= recipe.steps * recipe.nextn_start_share and self.step % recipe.nextn_every == 0
        nextn_weight = recipe.nextn_weight if drafting else 0.0
        with load_counted(self.model, batch.ids != PAD_ID):
            main, later, written = token_losses(self.model, batch, form, nextn_weight > 0)
        (main + nextn_weight * later).backward()
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        load = balance(self.model, recipe.bias_rate)
        self.step += 1
        self.seen += int((batch.ids != PAD_ID).sum())
        figures = {"loss": main, "written": written, "nextn": later}
        return {key: float(value.detach()) for key, value in figures.items()} | {"load": load, "lr": share}


def train(recipe: Recipe, directory: Path, evaluate_every: int, save_seconds: float = 180.0) -> None:
    torch.set_num_threads(recipe.threads)
    run = Run(recipe, directory)
    run.resume()
    started = saved = time.monotonic()
    first = run.step
    for batch in run.stream():
        figures = run.train_step(batch)
        now = time.monotonic()
        if run.step % 10 == 0:
            speed = (now - started) / (run.step - first)
            text = " ".join(f"{key} {value:.4f}" for key, value in figures.items())
            print(f"step {run.step} {text} tokens {run.seen} s/step {speed:.3f}", flush=True)
        done = run.step >= recipe.steps
        if done or now - saved > save_seconds:
            run.save()
            saved = time.monotonic()
        if done or run.step % evaluate_every == 0:
            form = stored_form if recipe.quantised(run.step) else identity_form
            result = evaluate(run.model, run.tokenizer, form, 64 if done else 16)
            print(json.dumps({"step": run.step, "eval_s": round(time.monotonic() - now, 1), **result}), flush=True)
        if done:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run; resumes what it finds there")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--evaluate-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=Recipe.threads, help="CPU threads of torch")
    arguments = parser.parse_args()
    train(Recipe(steps=arguments.steps, threads=arguments.threads), arguments.out, arguments.evaluate_every)


if __name__ == "__main__":
    main()
