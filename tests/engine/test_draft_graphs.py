"""Captured drafting computes what eager drafting does, and touches nothing but what is its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_waits import HostWaits
from replayed_graphs import ReplayedGraphs
from test_speculation import PARAMS, engine
from tiny_checkpoints import TINY_CONFIGS, Session, cpu_kernels, load_tiny
from tiny_engine import core_of, random_prompts
from torch import Tensor

from dsengine import SamplingParams
from dsengine.engine import build
from dsengine.engine.batch import ScheduledRequest
from dsengine.engine.draft_graphs import DraftGraphs
from dsengine.engine.draft_inputs import DraftInputs
from dsengine.engine.messages import AddRequest
from dsengine.engine.request import Request
from dsengine.kernels.registry import select_kernels
from dsengine.model.random_checkpoint import write_random_checkpoint
from dsengine.specdec.drafter import NextNDrafter
from dsengine.specdec.shape import TreeShape
from dsengine.specdec.tree import TokenTree

CPU = torch.device("cpu")
VALID = 300
CONTEXT = 80
SHAPES = [TreeShape(1, 1, 2), TreeShape(3, 1, 4), TreeShape(1, 5, 6), TreeShape(3, 2, 7), TreeShape(3, 4, 8)]
LENGTHS = (21, 8, 34)


class Bench:
    """A model with some texts in its cache and in the drafter's, whose drafts can be captured."""

    def __init__(self, folder: Path, waits: HostWaits) -> None:
        write_random_checkpoint(folder, TINY_CONFIGS["v3"], seed=5)
        self.model = load_tiny(folder, kernels=waits.watched(cpu_kernels()))
        self.session = Session(self.model, max_tokens=CONTEXT, num_requests=len(LENGTHS))
        self.drafter = NextNDrafter(self.model, self.session.kv_caches[-1], len(LENGTHS), VALID)
        self.backend = ReplayedGraphs()
        self.texts = [torch.randint(0, VALID, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
        with torch.inference_mode():
            for row, text in enumerate(self.texts):
                batch = self.session.batch([(row, text[:-1].tolist())], num_decodes=0)
                hidden = self.model.forward(batch, self.session.kv_caches)
                last = torch.tensor([len(text) - 2])
                rows = torch.tensor([row])
                self.drafter.extend(hidden, text[1:], batch.positions, batch.slot_mapping, last, rows)
            for cache in self.session.kv_caches:
                cache.nan_to_num_(nan=7.0)  # what lies behind the texts
            self.graphs = DraftGraphs(
                self.drafter,
                self.backend,
                SHAPES,
                draws=True,
                device=CPU,
                block_size=self.session.block_size,
                context_length=CONTEXT,
                dp_size=1,
                vocab_size=self.model.config.vocab_size,
            )
            self.graphs.capture([1, 3])

    def inputs(self, rows: list[int]) -> DraftInputs:
        params = [SamplingParams(temperature=t, seed=5) for t in (0.8, 0.0, 1.3)]
        requests = [Request(str(row), self.texts[row].tolist(), params[row], seed=row) for row in rows]
        return DraftInputs(
            trees=tuple(ScheduledRequest(request, 0, 1, samples=True) for request in requests),
            roots=np.array([int(self.texts[row][-1]) for row in rows], dtype=np.int64),
            contexts=np.array([LENGTHS[row] - 1 for row in rows], dtype=np.int64),
            rows=np.array(rows, dtype=np.int64),
            block_table=self.session.block_table[rows].numpy(),
            temperature=np.array([params[row].temperature for row in rows], dtype=np.float32),
            seeds=np.array(rows, dtype=np.int64),
            draw_positions=np.array(rows, dtype=np.int64),
        )

    def poison(self) -> None:
        """Whatever a run may have left in the static tensors."""
        self.graphs._integers.fill_(10**9)
        self.graphs._temperature.fill_(torch.nan)
        self.graphs._block_table.fill_(10**6)

    def everything_else(self) -> list[Tensor]:
        return [tensor.clone() for tensor in (*self.session.kv_caches, self.drafter._hidden)]


@pytest.fixture(scope="module")
def waits() -> HostWaits:
    return HostWaits()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, waits: HostWaits) -> Iterator[Bench]:
    yield Bench(tmp_path_factory.mktemp("v3"), waits)


def assert_same(tree: TokenTree, expected: TokenTree) -> None:
    for name in ("tokens", "parents", "depths"):
        assert torch.equal(getattr(tree, name), getattr(expected, name))
    torch.testing.assert_close(tree.scores, expected.scores, atol=1e-4, rtol=0)
    assert (tree.drawn is None) == (expected.drawn is None)
    if tree.drawn is not None and expected.drawn is not None:
        torch.testing.assert_close(tree.drawn.probs, expected.drawn.probs, atol=1e-5, rtol=0)
        assert torch.equal(tree.drawn.rows, expected.drawn.rows)


@pytest.mark.parametrize("drawn", [False, True], ids=["likeliest", "drawn"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_replayed_draft_is_the_eager_one(bench: Bench, shape: TreeShape, drawn: bool) -> None:
    before = bench.everything_else()
    for rows in ([0], [1], [2, 0], [1, 2, 0]):
        inputs = bench.inputs(rows)
        with torch.inference_mode():
            for tensor, contents in zip(bench.everything_else(), before, strict=True):
                tensor.copy_(contents)
            expected = bench.drafter.draft(inputs.to_device(CPU, draws=drawn), shape)
            after = bench.everything_else()
            bench.poison()
            assert bench.graphs.holds(shape, len(rows))
            assert_same(bench.graphs.run(inputs, shape, drawn=drawn), expected)
            # Padding stores nothing: the caches are what the eager draft made of them, in every slot.
            for tensor, contents in zip(bench.everything_else(), after, strict=True):
                torch.testing.assert_close(tensor, contents, atol=1e-5, rtol=0)


def test_a_group_without_requests_pads_to_the_size_of_the_others(bench: Bench) -> None:
    before, counts = bench.everything_else(), bench.backend.counts()
    with torch.inference_mode():
        bench.poison()
        tree = bench.graphs.run(bench.inputs([]), SHAPES[-1], drawn=True, at_least=2)
        assert len(tree.tokens) == 0
    for tensor, contents in zip(bench.everything_else(), before, strict=True):
        assert torch.equal(tensor, contents)
    places = bench.graphs._trees[SHAPES[-1], True]
    assert places.drawn is not None
    assert bool(places.scores.isfinite().all()) and bool(places.drawn.probs[:3].isfinite().all())
    assert sum(bench.backend.counts()) == sum(counts) + 1


def test_what_has_no_graph(bench: Bench) -> None:
    assert not bench.graphs.holds(TreeShape(2, 1, 3), 1)
    assert not bench.graphs.holds(SHAPES[0], 4) and not bench.graphs.holds(SHAPES[0], 0)


def test_what_waits_is_found() -> None:
    waits, numbers = HostWaits(), torch.arange(4)
    with waits:
        _ = numbers[numbers > 1], int(numbers.sum()), numbers.repeat_interleave(numbers), torch.tensor([1])
        _ = numbers.tolist(), numbers.numpy()
    assert {"index", "_local_scalar_dense", "repeat_interleave", "torch.tensor", "tolist", "numpy"} <= set(waits.found)
    assert numbers.tolist() == [0, 1, 2, 3] and "tolist" not in waits.found[waits.found.index("numpy") :]


@pytest.mark.parametrize("drawn", [False, True], ids=["likeliest", "drawn"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_drafting_waits_for_nothing(bench: Bench, waits: HostWaits, shape: TreeShape, drawn: bool) -> None:
    waits.found.clear()
    inputs = bench.inputs([2, 0])
    with torch.inference_mode(), waits:
        bench.drafter.draft(inputs.to_device(CPU, draws=drawn), shape)
    assert waits.found == []


@pytest.mark.parametrize(
    ("tree", "rule", "penalties"),
    [((3, 1, 4), "coupled", False), ((3, 4, 8), "coupled", True), ((3, 4, 8), "rejection", False)],
)
def test_a_step_with_drafts_waits_for_nothing(
    checkpoint: Path, tree: Any, rule: Any, penalties: bool, waits: HostWaits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From drafting to the tokens on their way to the host; penalties must know the drafts, and wait for them once."""
    limits = [p for p in PARAMS if p.max_tokens is None or p.max_tokens > 5]
    params = [p for p in limits if not (p.has_penalties or p.min_tokens)]
    params.append(SamplingParams(temperature=0.5, seed=3, max_tokens=20, logit_bias={50: 2.0}))
    if penalties:
        params.append(SamplingParams(temperature=0.5, seed=3, max_tokens=20, frequency_penalty=0.5))
    monkeypatch.setattr(build, "select_kernels", lambda *args: waits.watched(select_kernels(*args)))
    with engine(checkpoint, tree, speculative_acceptance=rule) as llm:
        core = core_of(llm)
        for number, prompt in enumerate(random_prompts(len(params), seed=2)):
            core.add_request(AddRequest(str(number), prompt, params[number]), 0.0)
        core.step(0.0)
        launcher, compute = core._launcher, core._launcher.compute
        steps = []

        def watched(*args: Any) -> Any:
            steps.append(args[0])
            with waits:
                return compute(*args)

        waits.found.clear()
        monkeypatch.setattr(launcher, "compute", watched)
        core.step(0.0)
        assert len(steps) == 1 and len(steps[0].drafts.trees) == len(params)
        assert waits.found == (["tolist"] if penalties else [])
