"""The unrolled NextN layer is what the drafter computes, and its training leaves the trunk alone."""

from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from dsengine.demo import CHECKPOINT_DIR
from dsengine.demo.batches import collate, encode
from dsengine.demo.corpus import conversations
from dsengine.demo.export import load_export
from dsengine.demo.model import GroupedCausal, identity_form
from dsengine.demo.quantise import stored_form
from dsengine.demo.train_nextn import NextnRecipe, train
from dsengine.demo.unrolled import acceptance, loss_weights, unroll

TOKENIZER = Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    return load_export(CHECKPOINT_DIR)[0].eval()


class Chain:
    """Attention of one sequence by itself, as a drafter has it: the text's entries, then those of a chain of drafts."""

    def __init__(self, scale):
        self.scale, self.keys, self.values = scale, [], []

    def __call__(self, layer, q, k, v):
        self.keys.append(k)
        self.values.append(v)
        keys, values = torch.cat(self.keys), torch.cat(self.values)
        scores = torch.einsum("qhd,khd->hqk", q, keys) * self.scale
        if len(self.keys) == 1:
            scores += torch.full(scores.shape[1:], -torch.inf).triu(1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


@torch.no_grad()
def test_every_pass_sees_the_text_so_far_and_its_own_chain(model):
    samples = sorted((encode(TOKENIZER, c) for c in islice(conversations(4), 3)), key=lambda sample: len(sample[0]))
    batch = collate(samples, 0.1)
    causal = GroupedCausal(model.config, batch.shapes, batch.source, batch.places)
    hidden = model.trunk(batch.ids, batch.positions, causal, identity_form)
    passes = unroll(model, hidden, batch, identity_form, 3)
    first = len(samples[0][0])
    tokens = torch.tensor(samples[1][0])
    for at in (5, len(tokens) - 5):
        # The text up to `at`, then drafts: each pass is given its own output and the token after.
        attend, own = Chain(model.config.softmax_scale), hidden[first : first + at + 1]
        ids, positions = tokens[1 : at + 2], torch.arange(at + 1)
        for step in range(3):
            own = model.draft(own, ids, positions, attend, identity_form)[-1:]
            logits = model.logits(own, identity_form)[0]
            torch.testing.assert_close(passes[step][first + at], logits, atol=2e-4, rtol=1e-3)
            ids, positions = tokens[at + 2 + step][None], torch.tensor([at + 1 + step])


def test_losses_end_with_the_text():
    written = [False] * 3 + [True] * 4
    batch = collate([(list(range(10, 17)), written)], 0.25)
    assert loss_weights(batch, 0)[:7].tolist() == [0.25, 1, 1, 1, 1, 0, 0]
    assert loss_weights(batch, 2)[:7].tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert not loss_weights(batch, 1)[7:].any()


def test_the_shipped_layer_drafts_several_tokens_in_a_row(model):
    rates = acceptance(model, TOKENIZER, identity_form, stored_form, 3, count=16)
    assert min(rates) > 0.9


def test_training_changes_the_layer_and_nothing_else(tmp_path, capsys):
    with torch.compiler.set_stance("force_eager"):
        train(NextnRecipe(steps=2, depth=2, tokens=256), CHECKPOINT_DIR, tmp_path, evaluate_every=10)
    before, after = (load_file(folder / "model.safetensors") for folder in (CHECKPOINT_DIR, tmp_path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].view(torch.uint8).equal(after[name].view(torch.uint8))}
    assert changed and all(name.startswith("model.layers.4.") for name in changed)
    assert (tmp_path / "config.json").read_bytes() == (CHECKPOINT_DIR / "config.json").read_bytes()
    assert '"step": 2' in capsys.readouterr().out
