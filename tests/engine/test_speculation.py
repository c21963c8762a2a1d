"""Speculation changes when tokens come, never which: with every tree, any load, and whatever happens meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replayed_graphs import ReplayedGraphs
from tiny_engine import GREEDY, core_of, random_prompts, tokens

from dsengine import LLM, SamplingParams
from dsengine.engine.messages import AddRequest, RequestUpdate
from dsengine.engine.model_runner import ModelRunner
from dsengine.engine.request import Request
from dsengine.engine.speculation_book import SpeculationBook
from dsengine.engine.step_graphs import StepGraphs, make_step_graphs
from dsengine.model.random_checkpoint import write_random_checkpoint
from dsengine.model.teacher_forcing import forced_batch, num_blocks
from dsengine.specdec.controller import TreeController, ladder
from dsengine.specdec.shape import TreeShape

TREES = [(1, 1, 2), (2, 1, 3), (5, 1, 6), (1, 8, 9), (2, 2, 4), (3, 4, 8), (5, 8, 24)]
PARAMS = [
    GREEDY,
    SamplingParams(temperature=1.0, seed=5, max_tokens=14),
    SamplingParams(temperature=0.7, top_p=0.8, top_k=40, min_p=0.02, seed=6, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.3, seed=7, max_tokens=12, repetition_penalty=1.3, frequency_penalty=0.7),
    SamplingParams(temperature=0.0, max_tokens=12, presence_penalty=1.5, repetition_penalty=0.7, ignore_eos=True),
    SamplingParams(temperature=0.5, seed=8, max_tokens=20, min_tokens=6, logit_bias={1: 12.0, 50: 9.0, 51: 9.0}),
    SamplingParams(temperature=0.0, max_tokens=10, logprobs=3, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=9, max_tokens=1),
    SamplingParams(temperature=0.4, seed=10, max_tokens=2, logprobs=0),
]


def engine(checkpoint: Path, tree: tuple[int, int, int] | None = None, **options: Any) -> LLM:
    if tree is not None:
        options.setdefault("speculative_algorithm", "NEXTN")
        options.setdefault("speculative_adaptive", False)
        names = ("speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens")
        options |= dict(zip(names, tree, strict=True))
    options.setdefault("max_total_tokens", 2048)
    return LLM(str(checkpoint), progress=False, device="cpu", num_threads=1, **options)


def answers(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    """What the caller sees of every answer, but for times and draft counts."""
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params)
    assert llm.core.stats().num_blocks_in_use == 0
    llm.core.check_integrity()
    return [(o.outputs[0].token_ids, o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in outputs]


@pytest.fixture(scope="module")
def workload() -> tuple[list[list[int]], list[SamplingParams]]:
    prompts = random_prompts(2 * len(PARAMS), seed=3)
    return prompts, [PARAMS[i % len(PARAMS)] for i in range(len(prompts))]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, workload: tuple[list[list[int]], list[SamplingParams]]) -> list[Any]:
    with engine(checkpoint) as llm:
        return answers(llm, *workload)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_every_tree_writes_the_same_answers(
    checkpoint: Path, workload: tuple[list[list[int]], list[SamplingParams]], expected: list[Any], tree: Any
) -> None:
    with engine(checkpoint, tree) as llm:
        assert answers(llm, *workload) == expected
        assert answers(llm, *workload) == expected  # again, now with prefixes from the cache
        stats = llm.core.stats().speculation
        assert stats is not None and sum(stats.lengths) > 0 and stats.num_drafts == sum(stats.lengths) * (tree[2] - 1)


@pytest.mark.parametrize(
    "options",
    [
        {"speculative_algorithm": "NGRAM"},
        {"speculative_adaptive": True},
        {"disable_radix_cache": True},
        {"block_size": 1},
        {"chunked_prefill_size": 24, "max_running_requests": 5},  # chunks of prompts beside drafts
        {"max_total_tokens": 320, "block_size": 4},  # preemption
        {"context_length": 96},  # texts that end at the end of the context
    ],
    ids=str,
)
def test_under_every_load(
    checkpoint: Path, workload: tuple[list[list[int]], list[SamplingParams]], options: dict[str, Any]
) -> None:
    plain = {key: value for key, value in options.items() if not key.startswith("speculative")}
    prompts, params = workload
    if "context_length" in options:
        params = [SamplingParams(temperature=0.8, seed=i, ignore_eos=True) for i in range(len(prompts))]
    if "max_total_tokens" in options:
        prompts = prompts[:8]
        params = [SamplingParams(temperature=0.8, seed=i, ignore_eos=True, max_tokens=100) for i in range(8)]
    with engine(checkpoint, **plain) as llm:
        wanted = answers(llm, prompts, params)
    with engine(checkpoint, (3, 2, 6), **options) as llm:
        assert answers(llm, prompts, params) == wanted
        if "max_total_tokens" in options:
            assert llm.core.stats().num_preemptions > 0


def test_logprobs_are_those_without_speculation(checkpoint: Path) -> None:
    prompts = random_prompts(4, seed=8)
    params = [SamplingParams(temperature=t, seed=3, max_tokens=12, logprobs=4, ignore_eos=True) for t in (0, 0, 0.8, 1)]
    seen = []
    for tree in (None, (3, 3, 9)):
        with engine(checkpoint, tree) as llm:
            seen.append([o.outputs[0].logprobs for o in llm.generate(prompt_token_ids=prompts, sampling_params=params)])
    for plain, drafted in zip(*seen, strict=True):
        assert len(plain) == len(drafted) == 12
        for a, b in zip(plain, drafted, strict=True):
            assert (a.token_id, a.rank) == (b.token_id, b.rank) and a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [i for i, _ in a.top] == [i for i, _ in b.top]
            assert [v for _, v in a.top] == pytest.approx([v for _, v in b.top], abs=1e-4)


def drive(llm: LLM, prompts: list[list[int]], params: list[SamplingParams], rng: random.Random) -> dict[str, list[int]]:
    """Requests that arrive and leave at random, by the core's own steps; what each had written at its end."""
    core, waiting = llm.core, list(enumerate(prompts))
    written: dict[str, list[int]] = {}
    doomed = {str(i): rng.randrange(1, 6) for i in range(len(prompts)) if rng.random() < 0.25}
    while waiting or core.has_work:
        while waiting and rng.random() < 0.5:
            number, prompt = waiting.pop(0)
            core.add_request(AddRequest(str(number), prompt, params[number], priority=rng.randrange(2)), 0.0)
            written[str(number)] = []
        for update in core.step(0.0).updates:
            written[update.request_id] += update.new_token_ids
        core.check_integrity()
        gone = [key for key, limit in doomed.items() if len(written.get(key, ())) >= limit]
        core.abort(gone)
        core.check_integrity()
        for key in gone:
            del doomed[key]
    assert core.stats().num_blocks_in_use == 0
    return written


@pytest.fixture(scope="module")
def plain_texts(checkpoint: Path) -> Iterator[Any]:
    with engine(checkpoint) as llm:
        known: dict[str, list[int]] = {}

        def text(prompt: list[int], params: SamplingParams) -> list[int]:
            key = repr((prompt, params))
            if key not in known:
                known[key] = tokens(llm.generate(prompt_token_ids=[prompt], sampling_params=params))[0]
            return known[key]

        yield text


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tree=st.sampled_from(TREES),
    adaptive=st.booleans(),
    budget=st.sampled_from([16, 40, 2048]),
    cache=st.sampled_from([224, 2048]),
)
def test_arrivals_and_departures(
    checkpoint: Path, plain_texts: Any, seed: int, tree: Any, adaptive: bool, budget: int, cache: int
) -> None:
    rng = random.Random(seed)
    prompts = random_prompts(7, seed=seed % 5, longest=40)
    params = [rng.choice(PARAMS) for _ in prompts]
    with engine(
        checkpoint,
        tree,
        speculative_adaptive=adaptive,
        chunked_prefill_size=budget,
        max_running_requests=6,
        max_total_tokens=cache,
    ) as llm:
        for key, text in drive(llm, prompts, params, rng).items():
            whole = plain_texts(prompts[int(key)], params[int(key)])
            assert text == whole[: len(text)]


def test_stops_inside_an_accepted_path(checkpoint: Path) -> None:
    """Stop ids and the limit of tokens end a request in the middle of what a step accepted."""
    [prompt] = random_prompts(1, seed=11)
    with engine(checkpoint) as llm:
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        [whole] = tokens(llm.generate(prompt_token_ids=[prompt], sampling_params=params))
    with engine(checkpoint, (5, 8, 24)) as llm:
        for length in range(1, 24, 3):
            stop = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=(whole[length],))
            [output] = llm.generate(prompt_token_ids=[prompt], sampling_params=stop)
            end = whole.index(whole[length]) + 1
            assert output.outputs[0].token_ids == whole[:end] and output.outputs[0].stop_reason == whole[length]
            limit = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            assert tokens(llm.generate(prompt_token_ids=[prompt], sampling_params=limit)) == [whole[:length]]
        llm.core.check_integrity()


def test_several_tokens_arrive_in_one_update(checkpoint: Path) -> None:
    """N-grams of a text that repeats itself are accepted, and reported as accepted."""
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logit_bias={50: 100.0}, logprobs=1)
    with engine(checkpoint, (3, 1, 4), speculative_algorithm="NGRAM") as llm:
        llm.core.add_request(AddRequest("a", [5, 50, 50, 50, 50], params), 0.0)
        updates: list[RequestUpdate] = []
        while llm.core.has_work:
            updates += llm.core.step(0.0).updates
        assert [token for update in updates for token in update.new_token_ids] == [50] * 30
        assert all(len(update.logprobs) == len(update.new_token_ids) for update in updates)
        assert [len(update.new_token_ids) for update in updates] == [1, 4, 4, 4, 4, 4, 4, 4, 1]
        # The last token of all was a draft too, with others behind it that came too late.
        assert sum(update.num_accepted for update in updates) == 22 and updates[1].num_drafts == 3
        stats = llm.core.stats().speculation
        assert stats is not None and stats.lengths == [0, 0, 0, 8] and stats.acceptance(3) == 1.0
        assert stats.num_accepted == 22


@pytest.mark.parametrize("tree", [(3, 1, 4), (3, 4, 8)], ids=str)
@pytest.mark.parametrize(("budget", "captured"), [(20, False), (2048, False), (2048, True)])
def test_cache_of_nextn_equals_a_computation_from_scratch(
    checkpoint: Path, tree: Any, budget: int, captured: bool
) -> None:
    """For all computed tokens of running requests, shared prefixes with different continuations included."""
    [base] = random_prompts(1, seed=4, longest=60)
    base = (base * 3)[:45]
    # The first two share two blocks; what the second block holds for NextN does not fit the third.
    prompts = [[*base, 7], [*base[:40], 8], [*base[:32], 9, *base[33:]]]
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=60, ignore_eos=True)
    with engine(checkpoint, tree, chunked_prefill_size=budget, max_running_requests=8) as llm, torch.inference_mode():
        core, model = core_of(llm), core_of(llm).model
        assert model.nextn is not None
        if captured:
            capture(llm, [2, 8], [TreeShape(*tree)])
        for number, prompt in enumerate(prompts):
            core.add_request(AddRequest(str(number), prompt, params), 0.0)
        compared = 0
        for _ in range(14):
            core.step(0.0)
            pool = core._launcher.runner.pool
            for state in core._scheduler._running:
                request = state.request
                length = request.num_computed_tokens
                if length == 0:
                    continue
                main, nextn = from_scratch(model, request, length)
                slots = [request.block_table[i // 16] * 16 + i % 16 for i in range(length)]
                for layer, wanted in zip(pool.layers, (*main, nextn), strict=True):
                    torch.testing.assert_close(layer.view(-1, layer.shape[2])[slots], wanted, atol=2e-4, rtol=0)
                compared += length
        assert compared > 500 and core.stats().prefix_hit_tokens == 32 + 16


def from_scratch(model: Any, request: Request, length: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Cache entries of every layer, and of the NextN layer, for a request's first `length` tokens."""
    text = request.token_ids(0, length)
    batch = forced_batch([text], model.device)
    shape = (num_blocks([text]), 16, model.config.latent_dim)
    caches = [torch.zeros(shape) for _ in range(len(model.layers) + 1)]
    hidden = model.forward(batch, caches)
    model.nextn.forward(hidden, torch.tensor(request.token_ids(1, length + 1)), batch, caches[-1])
    rows = [cache.view(-1, shape[2])[:length] for cache in caches]
    return rows[:-1], rows[-1]


def test_a_checkpoint_without_a_nextn_layer_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    import json
    import shutil

    hub = json.loads((checkpoint / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    write_random_checkpoint(tmp_path, hub, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    with pytest.raises(ValueError, match="speculative_algorithm is NEXTN, but the checkpoint has no NextN layer"):
        engine(tmp_path, (3, 1, 4))
    prompts = random_prompts(3)
    with engine(tmp_path) as llm:
        wanted = answers(llm, prompts, [GREEDY] * 3)
    with engine(tmp_path, (3, 1, 4), speculative_algorithm="NGRAM") as llm:
        assert answers(llm, prompts, [GREEDY] * 3) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative_num_steps": 0}, "speculative_num_steps is 0"),
        ({"speculative_num_draft_tokens": 9}, r"speculative_num_draft_tokens is 9; .* \[2, 4\]"),
        ({"speculative_eagle_topk": 4}, "speculative_eagle_topk is 4, which needs speculative_algorithm"),
        ({"speculative_adaptive": False}, "speculative_adaptive is False, which needs speculative_algorithm"),
        ({"speculative_algorithm": "EAGLE"}, "speculative_algorithm is 'EAGLE'; it must be one of NEXTN, NGRAM"),
    ],
    ids=str,
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(progress=False, **options)


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
@pytest.mark.parametrize("tree", [(3, 1, 4), (2, 3, 6)], ids=str)
def test_captured_steps_write_the_same_answers(
    checkpoint: Path, workload: tuple[list[list[int]], list[SamplingParams]], expected: list[Any], tree: Any, rule: Any
) -> None:
    """Drafted, verified and kept in graphs, padded to their sizes, wherever nothing but trees is computed."""
    prompts, params = workload
    shapes = ladder(TreeShape(*tree))
    with engine(checkpoint, tree, speculative_acceptance=rule) as llm:
        speculator = core_of(llm)._launcher.runner.speculator
        assert speculator is not None

        def answers_with(shape: TreeShape | None) -> list[Any]:
            controller = None if shape is None else TreeController(shape, None)
            core_of(llm)._book = None if controller is None else SpeculationBook(controller, speculator.times)
            return answers(llm, prompts, params)

        # By rejection tokens depend on the size of the trees.
        wanted = [expected if rule == "coupled" else answers_with(shape) for shape in (None, *shapes)]
        backend, graphs = capture(llm, [1, 4, 16], shapes, tree_sizes=[2, 5, 12], draws=rule == "rejection")
        for shape, answer in zip((None, *shapes), wanted, strict=True):
            before = backend.counts()
            assert answers_with(shape) == answer
            plain, trees, drafts, caught_up = replays(backend, before, graphs)
            # Without trees the drafter still catches up.
            assert plain + trees == caught_up and (shape is None) == (drafts == 0)
            assert min(trees, drafts) > 2 if shape is not None else plain > 2
            # Beside prompts trees are verified kernel by kernel, but drafted in graphs.
            assert drafts >= trees


def capture(
    llm: LLM, sizes: list[int], shapes: Sequence[TreeShape], tree_sizes: Sequence[int] = (), draws: bool = False
) -> tuple[ReplayedGraphs, StepGraphs]:
    """From now on an engine replays what it can."""
    launcher, backend = core_of(llm)._launcher, ReplayedGraphs()
    runner, speculator = launcher.runner, launcher.runner.speculator
    assert speculator is not None
    graphs = make_step_graphs(
        runner.model,
        runner.pool,
        backend,
        context_length=512,
        sizes=sizes,
        tree_sizes=tree_sizes or sizes,
        shapes=shapes,
        drafter=speculator.nextn,
        draws=draws,
    )
    with torch.inference_mode():
        graphs.capture()
    launcher.runner = ModelRunner(runner.model, runner.pool, graphs.plain, speculator, graphs.trees)
    speculator.graphs = graphs.drafter
    return backend, graphs


def replays(backend: ReplayedGraphs, before: list[int], graphs: StepGraphs) -> list[int]:
    """How often plain steps, verifications, drafts and what follows have been replayed since."""
    assert graphs.trees is not None and graphs.drafter is not None
    after, ends = backend.counts(), [len(graphs.sizes)]
    ends.append(ends[-1] + len(graphs.trees.kinds) * len(graphs.tree_sizes))
    ends.append(len(after) - len(graphs.sizes) - len(graphs.trees.kinds) * len(graphs.tree_sizes))
    counts = [b - a for a, b in zip(before, after, strict=True)]
    return [sum(counts[a:b]) for a, b in pairwise([0, *ends, len(after)])]
