"""Drafting and verifying with trees computes what running each path by itself computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import TINY_CONFIGS, Session, load_tiny
from torch import Tensor

from dsengine.engine.request import Request
from dsengine.engine.sampling_params import SamplingParams
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.forward_batch import ForwardBatch
from dsengine.model.random_checkpoint import write_random_checkpoint
from dsengine.specdec.drafter import DraftTargets, NextNDrafter
from dsengine.specdec.ngram import NGramDrafter
from dsengine.specdec.shape import TreeShape, largest_tree
from dsengine.specdec.tree import TokenTree

VALID = 300
TEXTS = [torch.randint(0, VALID, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (21, 8, 34)]
SHAPES = [TreeShape(1, 1, 2), TreeShape(4, 1, 5), TreeShape(1, 5, 6), TreeShape(3, 2, 7), TreeShape(3, 4, 8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DeepseekModel:
    folder = tmp_path_factory.mktemp("v3")
    write_random_checkpoint(folder, TINY_CONFIGS["v3"], seed=5)
    return load_tiny(folder)


def extended(model: DeepseekModel, texts: list[list[int]]) -> tuple[Session, NextNDrafter]:
    """All tokens of the texts but the newest computed, by the main model and by the drafter."""
    session = Session(model, max_tokens=80, num_requests=len(texts))
    drafter = NextNDrafter(model, session.kv_caches[-1], len(texts), VALID)
    for row, text in enumerate(texts):
        batch = session.batch([(row, text[:-1])], num_decodes=0)
        hidden = model.forward(batch, session.kv_caches)
        last = torch.tensor([len(text) - 2])
        ids = torch.tensor(text[1:])
        drafter.extend(hidden, ids, batch.positions, batch.slot_mapping, last, torch.tensor([row]))
        session.lengths[row] = len(text) - 1
    return session, drafter


def targets_of(session: Session, texts: list[list[int]]) -> DraftTargets:
    requests = [Request(str(i), text, SamplingParams()) for i, text in enumerate(texts)]
    return DraftTargets(
        texts=requests,
        roots=torch.tensor([text[-1] for text in texts]),
        contexts=torch.tensor(session.lengths),
        context_lens=tuple(session.lengths),
        block_table=session.block_table,
        rows=torch.arange(len(texts)),
    )


def path_to(tree: TokenTree, row: int, node: int) -> list[int]:
    """Drafted tokens from below the root to `node`."""
    path: list[int] = []
    while node > 0:
        path.insert(0, int(tree.tokens[row, node]))
        node = int(tree.parents[row, node])
    return path


def slow_score(model: DeepseekModel, text: list[int], path: list[int]) -> float:
    """Draft log-probability of a path, drafted token by token in a cache of its own."""
    session, drafter = extended(model, [text])
    assert model.nextn is not None
    hidden, score = drafter._hidden[0:1], 0.0
    session.lengths[0] -= 1
    for depth, token in enumerate((text[-1], *path)):
        if depth:
            logits = model.compute_logits(hidden)
            logits[:, VALID:] = -torch.inf
            score += float(logits.log_softmax(-1)[0, token])
        batch = session.batch([(0, [token])], num_decodes=1)
        hidden = model.nextn.forward(hidden, torch.tensor([token]), batch, session.kv_caches[-1])
        session.lengths[0] += 1
    return score


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_are_those_of_drafting_each_path_alone(model: DeepseekModel, shape: TreeShape) -> None:
    with torch.inference_mode():
        session, drafter = extended(model, TEXTS)
        tree = drafter.draft(targets_of(session, TEXTS), shape)
        assert tree.num_nodes == shape.num_nodes and int(tree.tokens.max()) < VALID
        for row, text in enumerate(TEXTS):
            for node in range(1, tree.num_nodes):
                expected = slow_score(model, text, path_to(tree, row, node))
                assert float(tree.scores[row, node]) == pytest.approx(expected, abs=1e-4)


def verify_batch(session: Session, tree: TokenTree) -> ForwardBatch:
    """The main model's pass over all nodes of all trees."""
    rows = [(row, tokens) for row, tokens in enumerate(tree.tokens.tolist())]
    plain = session.batch(rows, num_decodes=len(rows))
    context = torch.tensor(session.lengths)[:, None]
    fields = {**vars(plain), "positions": (context + tree.depths).flatten()}
    return ForwardBatch(**{**fields, "tree_mask": tree.ancestor_mask().flatten(0, 1)})


@settings(max_examples=12, deadline=None)
@given(steps=st.integers(1, 5), topk=st.integers(1, 8), nodes=st.integers(2, 24))
def test_verifying_a_tree_equals_running_its_paths(model: DeepseekModel, steps: int, topk: int, nodes: int) -> None:
    shape = TreeShape(steps, topk, min(nodes, largest_tree(steps, topk)))
    with torch.inference_mode():
        session, drafter = extended(model, TEXTS)
        tree = drafter.draft(targets_of(session, TEXTS), shape)
        hidden = model.forward(verify_batch(session, tree), session.kv_caches).view(len(TEXTS), shape.num_nodes, -1)
        for row, text in enumerate(TEXTS):
            for node in range(shape.num_nodes):
                alone = Session(model, max_tokens=80, num_requests=1)
                path = text + path_to(tree, row, node)
                expected = alone.run([(0, path)], num_decodes=0)[0][-1]
                got = model.compute_logits(hidden[row, node][None])[0]
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_drafting_leaves_contexts_as_they_are(model: DeepseekModel) -> None:
    def contexts(session: Session) -> list[Tensor]:
        rows = [cache.flatten(0, 1) for cache in session.kv_caches]
        batch = session.batch([(row, [0] * length) for row, length in enumerate(session.lengths)], num_decodes=0)
        starts = torch.cat([torch.arange(length) for length in session.lengths])
        owners = torch.repeat_interleave(torch.arange(len(session.lengths)), torch.tensor(batch.query_lens))
        size = session.block_size
        slots = session.block_table[owners, starts // size].long() * size + starts % size
        return [cache[slots].clone() for cache in rows]

    with torch.inference_mode():
        session, drafter = extended(model, TEXTS)
        before = contexts(session)
        for shape in SHAPES:
            drafter.draft(targets_of(session, TEXTS), shape)
        for old, new in zip(before, contexts(session), strict=True):
            assert torch.equal(old, new)


def test_without_a_nextn_layer(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, TINY_CONFIGS["v3"] | {"num_nextn_predict_layers": 0})
    with pytest.raises(ValueError, match="no NextN layer to draft with"):
        NextNDrafter(load_tiny(tmp_path), torch.empty(0), 1, VALID)


def test_ngrams_propose_what_followed_before() -> None:
    text = [7, 1, 2, 3, 9, 9, 1, 2, 3, 4, 5, 1, 2, 3]
    session_free = DraftTargets(
        texts=[Request("a", text, SamplingParams()), Request("b", [5, 6], SamplingParams())],
        roots=torch.tensor([3, 6]),
        contexts=torch.tensor([13, 1]),
        context_lens=(13, 1),
        block_table=torch.zeros(2, 1, dtype=torch.int32),
        rows=torch.arange(2),
    )
    drafter = NGramDrafter(torch.device("cpu"))
    chain = drafter.draft(session_free, TreeShape(3, 1, 4))
    assert chain.tokens[0].tolist() == [3, 4, 5, 1] and chain.parents[0].tolist() == [-1, 0, 1, 2]
    assert chain.parents[1].tolist() == [-1] * 4  # nothing is known: padding that no path reaches
    tree = drafter.draft(session_free, TreeShape(2, 2, 5))
    assert tree.tokens[0].tolist() == [3, 4, 5, 9, 9] and tree.parents[0].tolist() == [-1, 0, 1, 0, 3]
    assert tree.depths[0].tolist() == [0, 1, 2, 1, 2]


def test_ngrams_follow_a_growing_text() -> None:
    request = Request("a", [1, 2, 3], SamplingParams())
    drafter = NGramDrafter(torch.device("cpu"))

    def proposal() -> list[int]:
        targets = DraftTargets(
            [request], torch.tensor([0]), torch.tensor([0]), (0,), torch.zeros(1, 1), torch.arange(1)
        )
        tree = drafter.draft(targets, TreeShape(2, 1, 3))
        return tree.tokens[0, tree.parents[0] >= 0].tolist()

    assert proposal() == []
    request.output_token_ids += [1]
    assert proposal() == [2, 3]
    request.output_token_ids += [2, 8, 1, 2]
    assert proposal() == [8, 1]


@pytest.mark.parametrize(
    ("steps", "topk", "nodes", "message"),
    [(0, 1, 2, "steps is 0"), (1, 0, 2, "topk is 0"), (3, 1, 5, "num_nodes is 5"), (2, 2, 1, r"in \[2, 7\]")],
)
def test_impossible_shapes(steps: int, topk: int, nodes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeShape(steps, topk, nodes)
