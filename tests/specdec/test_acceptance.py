"""Acceptance of first drafts, against a slow computation that runs every prefix by itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import TINY_CONFIGS, Session, load_tiny

from dsengine.model.deepseek import DeepseekModel
from dsengine.model.random_checkpoint import write_random_checkpoint
from dsengine.specdec.acceptance import first_draft_acceptance

SMALL = TINY_CONFIGS["v3"] | {
    "vocab_size": 4,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "n_routed_experts": 8,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DeepseekModel:
    """Four tokens only: two untrained layers agree on some, and disagree on others."""
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, SMALL, seed=2)
    return load_tiny(folder)


def sequences(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 4, (length,), generator=generator).tolist() for length in lengths]


def slow_agreements(model: DeepseekModel, tokens: list[int]) -> list[bool]:
    """Entry i: from tokens[: i + 2], the draft of token i + 2 equals the main model's choice of it."""
    assert model.nextn is not None
    found = []
    for length in range(2, len(tokens)):
        session = Session(model, max_tokens=length, num_requests=1)
        choice = session.run([(0, tokens[:length])])[0][-1].argmax()
        session.lengths[0] = 0
        batch = session.batch([(0, tokens[: length - 1])], num_decodes=0)
        hidden = model.forward(batch, session.kv_caches)
        draft = model.nextn.forward(hidden, torch.tensor(tokens[1:length]), batch, session.kv_caches[-1])
        found.append(bool(model.compute_logits(draft[-1:]).argmax() == choice))
    return found


def test_counts_what_decoding_would_accept(model: DeepseekModel) -> None:
    texts = sequences([17, 2, 30, 3, 0])
    expected = [slow_agreements(model, tokens) for tokens in texts]
    flat = [agrees for found in expected for agrees in found]
    assert {True, False} == set(flat)
    for max_batch_tokens in (10_000, 40, 1):
        result = first_draft_acceptance(model, texts, max_batch_tokens=max_batch_tokens)
        assert (result.accepted, result.drafted) == (sum(flat), len(flat))
        assert result.rate == sum(flat) / len(flat)


def test_mask_selects_drafted_tokens(model: DeepseekModel) -> None:
    (tokens,) = sequences([25])
    found = slow_agreements(model, tokens)
    mask = [position % 3 == 0 for position in range(25)]
    wanted = [agrees for position, agrees in enumerate(found, start=2) if mask[position]]
    result = first_draft_acceptance(model, [tokens], [mask])
    assert (result.accepted, result.drafted) == (sum(wanted), len(wanted))


def test_nothing_to_draft(model: DeepseekModel) -> None:
    result = first_draft_acceptance(model, [[1, 2], []])
    assert (result.accepted, result.drafted) == (0, 0)
    assert math.isnan(result.rate)


def test_wrong_mask(model: DeepseekModel) -> None:
    with pytest.raises(ValueError, match="a mask has 2 entries; its sequence has 3 tokens"):
        first_draft_acceptance(model, [[1, 2, 3]], [[True, True]])


def test_model_without_nextn(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL | {"num_nextn_predict_layers": 0})
    with pytest.raises(ValueError, match="no NextN layer"):
        first_draft_acceptance(load_tiny(tmp_path), [[1, 2, 3]])
