"""Drawn trees: their nodes are settled by their size alone, and their tokens are draws without replacement."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsengine.specdec.drawn_tree import DrawnGrower, DrawSource, draw_children, rank_tree
from dsengine.specdec.shape import TreeShape, largest_tree


@settings(max_examples=80, deadline=None)
@given(steps=st.integers(1, 6), topk=st.integers(1, 6), nodes=st.integers(2, 60))
def test_nodes_of_every_size(steps: int, topk: int, nodes: int) -> None:
    shape = TreeShape(steps, topk, min(nodes, largest_tree(steps, topk)))
    tree = rank_tree(shape)
    assert len(tree.parents) == shape.num_nodes and max(tree.depths) <= shape.max_depth
    assert tree.parents[0] == -1 and tree.depths[0] == 0
    children: dict[int, list[int]] = {}
    for node in range(1, shape.num_nodes):
        parent = tree.parents[node]
        assert parent < node and tree.depths[node] == tree.depths[parent] + 1
        children.setdefault(parent, []).append(tree.ranks[node])
    # Siblings stand in the order of their draws, and none is left out.
    assert all(ranks == list(range(len(ranks))) for ranks in children.values())
    assert sorted(tree.expanded) == sorted(children)
    for depth, generation in enumerate(tree.generations):
        assert 0 < len(generation) <= shape.topk and all(tree.depths[node] == depth for node in generation)


def test_likely_nodes_come_first() -> None:
    assert rank_tree(TreeShape(3, 1, 4)).parents == (-1, 0, 1, 2)
    tree = rank_tree(TreeShape(3, 4, 8))
    assert tree.parents == (-1, 0, 0, 0, 1, 1, 2, 4) and tree.ranks == (0, 0, 1, 2, 0, 1, 0, 0)


def test_draws_without_replacement() -> None:
    """The first two of four tokens have the chances p(a) · p(b) / (1 - p(a))."""
    count, probs = 200_000, torch.tensor([0.5, 0.3, 0.2, 0.0])
    uniforms = torch.rand(count, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = draw_children(probs.expand(count, 1, 4), uniforms)[:, 0]
    seen = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16).view(4, 4) / count
    expected = probs[:, None] * probs[None] / (1 - probs[:, None])
    torch.testing.assert_close(seen, expected.fill_diagonal_(0.0), atol=0.004, rtol=0)


def test_what_is_exhausted_matches_nothing() -> None:
    uniforms = torch.full((2, 3), 0.5, dtype=torch.float64)
    probs = torch.tensor([[[0.0, 1.0, 0.0, 0.0]], [[torch.nan] * 4]])
    assert draw_children(probs, uniforms)[:, 0].tolist() == [[1, -1, -1], [-1, -1, -1]]


def grown(temperature: list[float], seeds: list[int], positions: list[int], shape: TreeShape) -> DrawnGrower:
    source = DrawSource(torch.tensor(temperature), torch.tensor(seeds), torch.tensor(positions))
    grower = DrawnGrower(torch.zeros(len(seeds), dtype=torch.int64), shape, source)
    table = torch.randn(12, 12, generator=torch.Generator().manual_seed(4)).log_softmax(-1)
    while grower.frontier.shape[1]:
        grower.expand(table[grower.tree.tokens.gather(1, grower.frontier)])
    return grower


def test_a_tree_depends_on_its_own_seed_and_position() -> None:
    shape = TreeShape(3, 3, 9)
    together = grown([1.0, 0.7, 1.0], [5, 6, 5], [2, 2, 3], shape).tree
    for row, (heat, seed, position) in enumerate([(1.0, 5, 2), (0.7, 6, 2), (1.0, 5, 3)]):
        alone = grown([heat], [seed], [position], shape).tree
        assert alone.tokens[0].equal(together.tokens[row])
        assert alone.drawn is not None and together.drawn is not None
        assert alone.drawn.probs[0].equal(together.drawn.probs[row])
    assert not together.tokens[0].equal(together.tokens[2])


def test_greedy_rows_take_the_likeliest_tokens() -> None:
    shape = TreeShape(2, 3, 6)
    tree = grown([0.0, 1.0], [1, 1], [0, 0], shape).tree
    assert tree.drawn is not None
    for node in rank_tree(shape).expanded:
        children = tree.tokens[0, tree.parents[0] == node]
        likeliest = tree.drawn.probs[0, tree.drawn.rows[node]].topk(len(children)).indices
        assert children.equal(likeliest)
