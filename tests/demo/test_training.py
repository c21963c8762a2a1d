"""The training form: batches, routing, quantised weights, decoding and resuming agree with plain computations."""

from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer

from dsengine.demo import CHECKPOINT_DIR
from dsengine.demo.batches import TOKENS_MULTIPLE, collate, encode
from dsengine.demo.corpus import conversations
from dsengine.demo.generate import greedy
from dsengine.demo.model import DemoConfig, DemoModel, GroupedCausal, identity_form, yarn_frequencies
from dsengine.demo.optim import orthogonalise
from dsengine.demo.quantise import stored, stored_form
from dsengine.demo.train import Recipe
from dsengine.quant.block_fp8 import dequantize_block_fp8, quantize_block_fp8

TOKENIZER = Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))
CONFIG = DemoConfig(
    hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, q_lora_rank=48,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DemoModel(CONFIG).eval()


def alone(model, tokens):
    """Hidden states of one sequence without any padding."""
    count = torch.arange(len(tokens))
    attend = GroupedCausal(CONFIG, [(1, len(tokens))], count, count)
    return model.trunk(torch.tensor(tokens), count, attend, identity_form)


@torch.no_grad()
def test_a_batch_computes_each_sequence_by_itself(model):
    samples = sorted((encode(TOKENIZER, c) for c in islice(conversations(4), 9)), key=lambda sample: len(sample[0]))
    batch = collate(samples, 0.1)
    assert batch.ids.numel() % TOKENS_MULTIPLE == 0
    attend = GroupedCausal(CONFIG, batch.shapes, batch.source, batch.places)
    hidden = model.trunk(batch.ids, batch.positions, attend, identity_form)
    start = 0
    for tokens, written in samples:
        end = start + len(tokens)
        torch.testing.assert_close(hidden[start:end], alone(model, tokens), atol=1e-4, rtol=1e-4)
        assert batch.targets[start : end - 1].tolist() == tokens[1:]
        assert batch.later_targets[start : end - 2].tolist() == tokens[2:]
        assert batch.weights[start : end - 1].tolist() == pytest.approx([1.0 if w else 0.1 for w in written[1:]])
        assert batch.weights[end - 1] == 0 and batch.later_weights[end - 2 : end].tolist() == [0, 0]
        start = end
    assert not batch.weights[start:].any()


@torch.no_grad()
def test_decoding_with_a_cache_is_decoding_without(model):
    prompts = [[0, 40, 41], [0, 50, 51, 52, 53, 54, 55], [0, 99]]
    for prompt, produced in zip(prompts, greedy(model, prompts, 6, identity_form), strict=True):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(model.logits(alone(model, tokens)[-1], identity_form).argmax()))
        expected = tokens[len(prompt) :]
        assert produced == (expected[: expected.index(1)] if 1 in expected else expected)


def test_simulated_storage_is_the_export():
    weight = torch.randn(3, 200, 150)
    codes, scales = quantize_block_fp8(weight)
    torch.testing.assert_close(stored(weight, True), dequantize_block_fp8(codes, scales, dtype=torch.float32))


def test_gradients_pass_straight_through():
    weight = torch.randn(130, 20, requires_grad=True)
    stored_form(weight, True).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones_like(weight))


def test_orthogonalised_updates_have_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(4, 32, 64)))
    assert values.min() > 0.5 and values.max() < 1.4


def test_yarn_frequencies():
    config = DemoConfig(yarn_factor=40.0, yarn_original=4096)
    frequencies = yarn_frequencies(config)
    expected = torch.tensor([1.0, 0.74989421, 0.056234133, 0.0055, 3.3338036e-6])
    torch.testing.assert_close(frequencies[[0, 1, 10, 16, 31]], expected, rtol=1e-5, atol=0)


def test_the_recipe_warms_up_and_decays():
    recipe = Recipe(steps=1000)
    shares = [recipe.lr_share(step) for step in range(1000)]
    assert shares[0] < 0.05 and shares[400] == 1.0 and shares[-1] < 0.05
    assert not recipe.quantised(0) and recipe.quantised(999)
