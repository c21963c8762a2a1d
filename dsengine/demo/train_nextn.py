"""Teaches the demo model's NextN layer to draft several tokens in a row: `python -m dsengine.demo.train_nextn DIR`.

The main training shows the layer nothing but the trunk's hidden states. A drafter feeds it its own outputs from the
second token on, which it has then never seen. Here the trunk of an exported checkpoint stands still and the layer is
unrolled as the drafter does it, its targets the trunk's own distributions (EAGLE-3's training-time test, Li et al.
2025, on an MTP layer). All other tensors are written as they were read.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dsengine.demo.batches import Batch, batches
from dsengine.demo.corpus import COPYING_SHARE, TRAINING_MIXTURE, conversations
from dsengine.demo.export import hub_tensors, load_export, nextn_parameters, save_tensors
from dsengine.demo.model import DemoModel, GroupedCausal, WeightForm, identity_form
from dsengine.demo.quantise import stored_form
from dsengine.demo.train import optimisers
from dsengine.demo.unrolled import acceptance, loss_weights, unroll
from dsengine.model.manifest import write_manifest


@dataclass(frozen=True)
class NextnRecipe:
    """Rates are of Muon's matrices and of AdamW's norms and router, at their highest."""

    steps: int = 360
    depth: int = 4
    tokens: int = 3072
    hidden_rate: float = 0.004
    norm_rate: float = 7e-4
    router_rate: float = 1e-4
    warmup_steps: int = 30
    seed: int = 77
    threads: int = 1

    def share(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup_steps) * (1 - step / self.steps)


def draft_loss(model: DemoModel, batch: Batch, form: WeightForm, depth: int) -> list[Tensor]:
    """Cross-entropy of each pass with the trunk's distribution."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            causal = GroupedCausal(model.config, batch.shapes, batch.source, batch.places)
            hidden = model.trunk(batch.ids, batch.positions, causal, identity_form)
            wanted = model.logits(hidden, identity_form).float().softmax(-1)
        passes = unroll(model, hidden, batch, form, depth)
    losses = []
    for step, logits in enumerate(passes):
        weights = loss_weights(batch, step)
        kept = weights.nonzero().squeeze(1)
        target = wanted.roll(-1 - step, 0)[kept]
        each = F.cross_entropy(logits[kept].float(), target, reduction="none")
        losses.append((each * weights[kept]).sum() / weights.sum())
    return losses


def train(recipe: NextnRecipe, source: Path, out: Path, evaluate_every: int) -> None:
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    model, tokenizer = load_export(source)
    norms_of_layer = (model.enorm, model.hnorm, model.nextn_norm)
    layer = {*model.nextn.parameters(), model.eh_proj, *(norm.weight for norm in norms_of_layer)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in layer)
    muon, norms, _, routers = makers = optimisers(model)
    rates = {muon: recipe.hidden_rate, norms: recipe.norm_rate, routers: recipe.router_rate}
    stream = batches(
        conversations(recipe.seed, mixture=TRAINING_MIXTURE, copying=COPYING_SHARE), tokenizer, recipe.tokens
    )
    print(
        json.dumps({"step": 0, "acceptance": acceptance(model, tokenizer, identity_form, stored_form, recipe.depth)}),
        flush=True,
    )
    started = time.monotonic()
    for step in range(recipe.steps):
        for optimiser, rate in rates.items():
            for group in optimiser.param_groups:
                group["lr"] = rate * recipe.share(step)
        losses = draft_loss(model, next(stream), stored_form, recipe.depth)
        torch.stack(losses).sum().backward()
        for optimiser in makers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if step % 10 == 9:
            seconds = (time.monotonic() - started) / (step + 1)
            print(
                f"step {step + 1} losses {[round(float(x.detach()), 4) for x in losses]} s/step {seconds:.2f}",
                flush=True,
            )
        if (step + 1) % evaluate_every == 0 or step + 1 == recipe.steps:
            rates_now = acceptance(model, tokenizer, identity_form, stored_form, recipe.depth)
            print(json.dumps({"step": step + 1, "acceptance": rates_now}), flush=True)
            write(model, source, out)


def write(model: DemoModel, source: Path, out: Path) -> None:
    """The source's checkpoint with this model's NextN layer."""
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix == ".json" and path.resolve() != (out / path.name).resolve():
            (out / path.name).write_bytes(path.read_bytes())
    save_tensors(load_file(source / "model.safetensors") | hub_tensors(nextn_parameters(model)), out)
    write_manifest(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder of an exported checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the result to")
    parser.add_argument("--steps", type=int, default=NextnRecipe.steps)
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=NextnRecipe.threads, help="CPU threads of torch")
    arguments = parser.parse_args()
    recipe = NextnRecipe(steps=arguments.steps, threads=arguments.threads)
    train(recipe, arguments.source, arguments.out, arguments.evaluate_every)


if __name__ == "__main__":
    main()
