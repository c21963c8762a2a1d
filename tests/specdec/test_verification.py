"""Both acceptance rules are lossless: the text has the model's distribution whatever the drafter proposes.

The "model" and the "drafter" are tables over a vocabulary of a few tokens, so that the distribution of the first
three tokens is known exactly and many thousand texts are written at once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsengine.specdec.drawn_tree import draw_children
from dsengine.specdec.tree import DrawnFrom, TokenTree, TreeGrower
from dsengine.specdec.verification import AcceptedPaths, follow, reject

VOCAB = 5
TEXTS = 200_000
Step = Callable[[Tensor, torch.Generator], Tensor]


def tables(seed: int, sharpness: float = 1.5) -> tuple[Tensor, Tensor]:
    """(model's, drafter's) distribution of the next token given the last, [V, V] each; alike, but not the same."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(VOCAB, VOCAB, generator=generator)
    drafted = logits + 0.8 * torch.randn(VOCAB, VOCAB, generator=generator)
    return logits.softmax(-1).double(), drafted.softmax(-1).double()


def filtered(model: Tensor) -> Tensor:
    """The model with its unlikeliest continuations cut, as top-p would."""
    cut = torch.where(model < 0.08, 0.0, model)
    return cut / cut.sum(-1, keepdim=True)


def follow_step(model: Tensor, drafter: Tensor, topk: int, steps: int, num_nodes: int) -> Step:
    def step(last: Tensor, generator: torch.Generator) -> Tensor:
        grower = TreeGrower(last, topk)
        for _ in range(steps):
            frontier = grower.tree.tokens.gather(1, grower.frontier)
            grower.expand(drafter[frontier].log().float())
        tree = grower.select(num_nodes)
        # The number that decides a draw belongs to its position: nodes of one depth share it.
        by_depth = torch.rand(len(last), steps + 1, generator=generator, dtype=torch.float64)
        draws = by_depth.gather(1, tree.depths)
        choices = torch.searchsorted(model[tree.tokens].cumsum(-1), draws[:, :, None], right=True).squeeze(-1)
        return follow(tree, choices.clamp(max=VOCAB - 1), steps).new_tokens(tree)

    return step


def reject_step(
    model: Tensor, drafter: Tensor, topk: int, steps: int, rule: Callable[..., AcceptedPaths] = reject
) -> Step:
    """Full trees: every node of every generation has `topk` drawn children."""

    def step(last: Tensor, generator: torch.Generator) -> Tensor:
        tokens, parents, depths = [last[:, None]], [torch.full((1,), -1)], [torch.zeros(1, dtype=torch.int64)]
        first, generation = 0, last[:, None]
        for depth in range(1, steps + 1):
            width = generation.shape[1]
            draws = torch.rand(len(last), topk, generator=generator, dtype=torch.float64)
            children = draw_children(drafter[generation], draws)
            parents.append(torch.arange(first, first + width).repeat_interleave(topk))
            depths.append(torch.full((width * topk,), depth))
            first, generation = first + width, children.flatten(1)
            tokens.append(generation)
        nodes = torch.cat(tokens, dim=1)
        shape, rows = nodes.shape, torch.arange(len(last))
        tree = TokenTree(nodes, torch.cat(parents).expand(shape), torch.cat(depths).expand(shape), torch.zeros(shape))
        drawn = DrawnFrom(drafter[nodes], torch.arange(shape[1]))
        uniforms = torch.rand(len(last), steps + 1, topk + 1, generator=generator, dtype=torch.float64)
        paths = rule(tree, drawn, lambda at: model[nodes[rows, at]], uniforms, steps, topk)
        return paths.new_tokens(tree)

    return step


def first_three(step: Step, count: int, seed: int) -> Tensor:
    """[count, 3] tokens of texts that start at token 0, written step by step."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.full((count, 3), -1)
    lengths, last = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    while (short := (lengths < 3).nonzero().flatten()).numel():
        for tokens in step(last[short], generator).T:
            written = tokens >= 0
            rows = short[written]
            open_rows = rows[lengths[rows] < 3]
            texts[open_rows, lengths[open_rows]] = tokens[written][lengths[rows] < 3]
            last[rows] = tokens[written]
            lengths[rows] += 1
    return texts


def p_value(texts: Tensor, model: Tensor) -> float:
    """Chi-square test of the texts against the exact distribution; nothing impossible may occur."""
    exact = (model[0][:, None, None] * model[:, :, None] * model[None, :, :]).flatten()
    counts = torch.bincount((texts * torch.tensor([VOCAB**2, VOCAB, 1])).sum(1), minlength=VOCAB**3)
    assert counts[exact == 0].sum() == 0
    expected = exact * len(texts)
    common = expected >= 5
    observed = torch.cat((counts[common], counts[~common].sum()[None])).double()
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    kept = wanted > 0
    statistic = ((observed - wanted)[kept] ** 2 / wanted[kept]).sum()
    degrees = torch.tensor((int(kept.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("topk", "steps", "num_nodes"), [(1, 1, 2), (1, 3, 4), (2, 2, 5), (3, 2, 8)])
@pytest.mark.parametrize("cut", [False, True])
def test_following_is_lossless(topk: int, steps: int, num_nodes: int, cut: bool, seed: int) -> None:
    model, drafter = tables(seed)
    model = filtered(model) if cut else model
    texts = first_three(follow_step(model, drafter, topk, steps, num_nodes), TEXTS, seed)
    assert p_value(texts, model) > 0.001


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("topk", "steps"), [(1, 1), (1, 3), (2, 2), (4, 1), (5, 1)])
@pytest.mark.parametrize("cut", [False, True])
def test_rejection_is_lossless(topk: int, steps: int, cut: bool, seed: int) -> None:
    model, drafter = tables(seed)
    model = filtered(model) if cut else model
    texts = first_three(reject_step(model, drafter, topk, steps), TEXTS, seed)
    assert p_value(texts, model) > 0.001


def test_broken_rules_are_caught() -> None:
    model, drafter = tables(0)

    def accept_too_much(tree, drawn, target, uniforms, steps, topk):
        return reject(tree, drawn, target, uniforms * 0.9, steps, topk)

    def keep_the_residual(tree, drawn, target, uniforms, steps, topk):
        paths = reject(tree, drawn, target, uniforms, steps, topk)
        redrawn = torch.multinomial(target(torch.zeros(len(tree.tokens), dtype=torch.int64)), 1).squeeze(1)
        return AcceptedPaths(paths.nodes, paths.lengths, torch.where(paths.lengths == 1, redrawn, paths.bonus))

    for rule in (accept_too_much, keep_the_residual):
        assert p_value(first_three(reject_step(model, drafter, 2, 1, rule), TEXTS, 0), model) < 1e-6

    def always_first_child(last: Tensor, generator: torch.Generator) -> Tensor:
        return drafter[last].argmax(-1)[:, None]

    assert p_value(first_three(always_first_child, TEXTS, 0), model) < 1e-6


def test_following_writes_what_plain_sampling_writes() -> None:
    """The same numbers at the same positions give the same text, with any tree."""
    model, drafter = tables(7)
    positions = torch.rand(64, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def chosen(last: Tensor, draws: Tensor) -> Tensor:
        return torch.searchsorted(model[last].cumsum(-1), draws[..., None], right=True).squeeze(-1).clamp(max=VOCAB - 1)

    plain, last = [], torch.zeros(64, dtype=torch.int64)
    for position in range(12):
        last = chosen(last, positions[:, position])
        plain.append(last)
    for topk, steps, num_nodes in ((1, 2, 3), (2, 3, 6), (3, 2, 9)):
        texts = [[0] for _ in range(64)]
        while min(len(text) for text in texts) < 13:
            grower = TreeGrower(torch.tensor([text[-1] for text in texts]), topk)
            for _ in range(steps):
                grower.expand(drafter[grower.tree.tokens.gather(1, grower.frontier)].log().float())
            tree = grower.select(num_nodes)
            starts = torch.tensor([len(text) - 1 for text in texts])
            choices = chosen(tree.tokens, positions.gather(1, (starts[:, None] + tree.depths).clamp(max=39)))
            for text, tokens in zip(texts, follow(tree, choices, steps).new_tokens(tree).tolist(), strict=True):
                text.extend(token for token in tokens if token >= 0)
        assert torch.equal(torch.tensor([text[1:13] for text in texts]).T, torch.stack(plain))


def test_a_row_without_choices_keeps_nothing() -> None:
    tree = TreeGrower(torch.tensor([3, 3]), 2)
    tree.expand((-torch.arange(float(VOCAB))).expand(2, 1, VOCAB).log_softmax(-1))
    paths = follow(tree.tree, torch.tensor([[-1, -1, -1], [1, 4, 2]]), 1)
    assert paths.lengths.tolist() == [1, 2]
    assert paths.bonus.tolist() == [-1, 2]
    assert paths.new_tokens(tree.tree).tolist() == [[-1, -1], [1, 2]]
