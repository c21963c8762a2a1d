"""Splitting a batch into absorbed and expanded parts, and cutting contexts into pieces."""

from __future__ import annotations

import random

import pytest
import torch

from dsengine.model.attention_plan import plan_attention, runs_absorbed
from dsengine.model.forward_batch import ForwardBatch

BLOCK_SIZE = 4


def make_batch(query_lens: list[int], context_lens: list[int], num_decodes: int) -> ForwardBatch:
    totals = [q + c for q, c in zip(query_lens, context_lens, strict=True)]
    blocks = -(-max(totals) // BLOCK_SIZE)
    order = list(range(blocks * len(totals)))
    random.Random(3).shuffle(order)
    table = torch.tensor(order, dtype=torch.int32).view(len(totals), blocks)
    ends = torch.tensor([0, *query_lens]).cumsum(0)
    tokens = torch.arange(int(ends[-1]))
    return ForwardBatch(
        input_ids=tokens,
        positions=tokens,
        slot_mapping=tokens,
        block_table=table,
        cache_seqlens=torch.tensor(totals, dtype=torch.int32),
        cu_seqlens_q=ends.to(torch.int32),
        num_decodes=num_decodes,
        num_decode_tokens=int(ends[num_decodes]),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        logits_indices=tokens,
    )


@pytest.mark.parametrize("seed", range(30))
def test_pieces_cover_every_context_once_in_order(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 6)
    query_lens = [rng.randint(1, 5) for _ in range(count)]
    context_lens = [rng.choice([0, rng.randint(1, 40)]) for _ in range(count)]
    num_decodes = rng.randint(0, count)
    piece_tokens = rng.randint(1, 50)
    batch = make_batch(query_lens, context_lens, num_decodes)
    plan = plan_attention(batch, BLOCK_SIZE, piece_tokens)
    assert plan.num_absorbed_tokens == sum(query_lens[:num_decodes])
    assert (plan.absorbed is None) == (num_decodes == 0)
    assert (plan.expanded is None) == (num_decodes == count)
    if plan.expanded is None:
        return
    first_rows = torch.tensor([0, *query_lens[num_decodes:]]).cumsum(0).tolist()
    gathered: dict[int, list[int]] = {request: [] for request in range(num_decodes, count)}
    for piece in plan.expanded.pieces:
        assert 0 < len(piece.slots) <= piece_tokens
        assert piece.cu_seqlens_k.tolist()[-1] == len(piece.slots)
        first = num_decodes + first_rows.index(piece.queries.start)
        assert piece.seqlens_q == tuple(query_lens[first : first + len(piece.seqlens_q)])
        assert piece.queries.stop - piece.queries.start == sum(piece.seqlens_q)
        slots = piece.slots.tolist()
        for request, length in enumerate(piece.seqlens_k, start=first):
            gathered[request] += slots[:length]
            slots = slots[length:]
    for request, slots in gathered.items():
        table = batch.block_table[request].tolist()
        positions = range(context_lens[request])
        assert slots == [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
    full = [piece for piece in plan.expanded.pieces[:-1] if len(piece.slots) != piece_tokens]
    assert not full, "only the last piece may be smaller"


def test_absorbed_part() -> None:
    plan = plan_attention(make_batch([1, 3, 8], [20, 5, 0], num_decodes=2), BLOCK_SIZE)
    assert plan.absorbed is not None
    assert plan.absorbed.cu_seqlens_q.tolist() == [0, 1, 4]
    assert plan.absorbed.cache_seqlens.tolist() == [21, 8]
    assert (plan.absorbed.max_seqlen_q, plan.absorbed.max_seqlen_k) == (3, 21)
    assert plan.expanded is not None
    assert plan.expanded.seqlens_q == (8,)
    assert plan.expanded.pieces == ()


def test_policy() -> None:
    assert runs_absorbed(1, 0)
    assert runs_absorbed(1, 100_000)
    assert runs_absorbed(4, 1000)  # verification of drafts
    assert not runs_absorbed(64, 0)
    assert not runs_absorbed(2000, 2000)
    assert not runs_absorbed(2048, 100_000)


def test_policy_is_monotonous() -> None:
    """Once so many new tokens are too many for the absorbed form, more of them are; longer contexts only favour it."""
    for context in (0, 10, 100, 1000, 10_000, 100_000):
        choices = [runs_absorbed(query, context) for query in range(1, 600)]
        assert choices == sorted(choices, reverse=True)
    for query in (1, 2, 8, 64, 160, 512):
        choices = [runs_absorbed(query, context) for context in range(0, 3000, 7)]
        assert choices == sorted(choices)
