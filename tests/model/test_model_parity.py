"""The model against Hugging Face's, from checkpoints that Hugging Face wrote: prefill, chunks, decode, mixtures."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import TINY_CONFIGS, Session, cpu_kernels, load_tiny, save_hf_model
from torch import Tensor

from dsengine.model import attention_plan
from dsengine.model.deepseek import DeepseekModel

TOLERANCE = 2e-5


class Pair:
    """One checkpoint, read by Hugging Face and by the engine."""

    def __init__(self, name: str, folder: Path) -> None:
        self.theirs: Any = save_hf_model(name, folder)
        self.folder = folder
        self.ours: DeepseekModel = load_tiny(folder)

    def expected(self, tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.theirs(torch.tensor([tokens])).logits[0]
        return logits


@pytest.fixture(scope="module", params=list(TINY_CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    yield Pair(request.param, tmp_path_factory.mktemp(request.param))


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


def test_prefill(pair: Pair) -> None:
    tokens = [random_tokens(100, seed=1), random_tokens(57, seed=2), random_tokens(1, seed=3)]
    session = Session(pair.ours, max_tokens=100, num_requests=3)
    short, first, second = session.run([(2, tokens[2]), (0, tokens[0]), (1, tokens[1])])
    for got, ids in ((first, tokens[0]), (second, tokens[1]), (short, tokens[2])):
        assert_close(got, pair.expected(ids))


@pytest.mark.parametrize("chunk", [1, 7, 16, 33, 64])
@pytest.mark.parametrize("absorbed", [True, False])
def test_chunked_prefill(pair: Pair, chunk: int, absorbed: bool) -> None:
    tokens = random_tokens(100, seed=4)
    session = Session(pair.ours, max_tokens=100, num_requests=1)
    got = [
        session.run([(0, tokens[start : start + chunk])], num_decodes=int(absorbed))[0]
        for start in range(0, len(tokens), chunk)
    ]
    assert_close(torch.cat(got), pair.expected(tokens))


@pytest.mark.parametrize("backend", ["ref", "cpu"])
def test_every_backend_of_attention_and_experts(pair: Pair, backend: str) -> None:
    forced = {"mla_decode": backend, "mla_prefill": backend, "moe_experts": backend, "rms_norm": backend}
    model = load_tiny(pair.folder, kernels=cpu_kernels(**forced))
    tokens = random_tokens(70, seed=5)
    session = Session(model, max_tokens=70, num_requests=1)
    got = [session.run([(0, tokens[:40])]), session.run([(0, tokens[40:69])]), session.run([(0, tokens[69:])])]
    assert_close(torch.cat([logits for (logits,) in got]), pair.expected(tokens))


def test_step_decode(pair: Pair) -> None:
    tokens = random_tokens(60, seed=6)
    session = Session(pair.ours, max_tokens=60, num_requests=1)
    got = session.run([(0, tokens[:30])])
    got += [session.run([(0, [token])])[0] for token in tokens[30:]]
    assert_close(torch.cat(got), pair.expected(tokens))


def test_mixed_batches(pair: Pair) -> None:
    """Decoding requests, drafts of three tokens, fresh prompts and continued prompts in the same passes."""
    tokens = [random_tokens(80, seed) for seed in range(10, 15)]
    session = Session(pair.ours, max_tokens=80, num_requests=5, block_size=4)
    got: dict[int, list[Tensor]] = {request: [] for request in range(5)}

    def step(absorbed: dict[int, int], expanded: dict[int, int]) -> None:
        lengths = list((absorbed | expanded).items())
        chunks = [(r, tokens[r][session.lengths[r] : session.lengths[r] + n]) for r, n in lengths]
        for (request, _), logits in zip(chunks, session.run(chunks, len(absorbed)), strict=True):
            got[request].append(logits)

    step({}, {0: 20, 1: 31})
    step({1: 1}, {2: 40, 0: 13})
    step({1: 1, 2: 3}, {3: 17, 0: 11})
    step({0: 1, 2: 1, 1: 3}, {4: 9, 3: 30})
    step({0: 1, 1: 1, 2: 1, 3: 1, 4: 1}, {})
    for request, parts in got.items():
        logits = torch.cat(parts)
        assert_close(logits, pair.expected(tokens[request][: logits.shape[0]]))


def test_long_context_in_many_pieces(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of several requests expanded 24 tokens at a time give what one expansion gives."""
    plan = attention_plan.plan_attention

    def plan_small_pieces(batch: Any, block_size: int) -> Any:
        return plan(batch, block_size, piece_tokens=24)

    monkeypatch.setattr("dsengine.model.deepseek.plan_attention", plan_small_pieces)
    tokens = [random_tokens(90, seed) for seed in (20, 21, 22)]
    session = Session(pair.ours, max_tokens=90, num_requests=3)
    first = session.run([(0, tokens[0][:50]), (1, tokens[1][:10]), (2, tokens[2][:77])], num_decodes=0)
    second = session.run([(r, tokens[r][session.lengths[r] :]) for r in range(3)], num_decodes=0)
    for request in range(3):
        assert_close(torch.cat((first[request], second[request])), pair.expected(tokens[request]))


def test_greedy_continuation(pair: Pair) -> None:
    prompt = random_tokens(23, seed=30)
    theirs, cache, ids = [], None, torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(64):
            result = pair.theirs(ids, past_key_values=cache, use_cache=True)
            cache, ids = result.past_key_values, result.logits[:, -1:].argmax(-1)
            theirs.append(int(ids))
    session = Session(pair.ours, max_tokens=100, num_requests=1)
    ours, new = [], prompt
    for _ in range(64):
        new = [int(session.run([(0, new)])[0][-1].argmax())]
        ours += new
    assert ours == theirs


def test_batch_composition_does_not_change_tokens(pair: Pair) -> None:
    prompts = [random_tokens(count, seed=count) for count in (5, 17, 29)]
    alone = []
    for prompt in prompts:
        session = Session(pair.ours, max_tokens=64, num_requests=1)
        produced, new = [], prompt
        for _ in range(20):
            new = [int(session.run([(0, new)])[0][-1].argmax())]
            produced += new
        alone.append(produced)
    session = Session(pair.ours, max_tokens=64, num_requests=3)
    news = [list(prompt) for prompt in prompts]
    together: list[list[int]] = [[], [], []]
    for _ in range(20):
        for request, logits in enumerate(session.run(list(enumerate(news)))):
            news[request] = [int(logits[-1].argmax())]
            together[request] += news[request]
    assert together == alone


def test_bfloat16_is_no_further_from_float32_than_theirs(pair: Pair) -> None:
    tokens = random_tokens(64, seed=40)
    session = Session(load_tiny(pair.folder, dtype=torch.bfloat16), max_tokens=64, num_requests=1)
    assert session.kv_caches[0].dtype == torch.bfloat16
    ours = torch.cat([session.run([(0, tokens[:40])])[0], session.run([(0, tokens[40:])], num_decodes=1)[0]])
    rounded = copy.deepcopy(pair.theirs).to(torch.bfloat16)
    with torch.inference_mode():
        theirs = rounded(torch.tensor([tokens])).logits[0].float()
    exact = pair.expected(tokens)
    # The median row: where rounding swaps two experts of nearly equal score, single rows go far off in both.
    assert (ours - exact).norm(dim=-1).median() < 1.25 * (theirs - exact).norm(dim=-1).median()


def test_empty_batch(pair: Pair) -> None:
    """A data-parallel rank without requests takes part in a step with no tokens."""
    session = Session(pair.ours, max_tokens=8, num_requests=1)
    batch = session.batch([(0, [1])])
    empty = type(batch)(
        input_ids=batch.input_ids[:0],
        positions=batch.positions[:0],
        slot_mapping=batch.slot_mapping[:0],
        block_table=batch.block_table[:0],
        cache_seqlens=batch.cache_seqlens[:0],
        cu_seqlens_q=batch.cu_seqlens_q[:1],
        num_decodes=0,
        num_decode_tokens=0,
        query_lens=(),
        context_lens=(),
        logits_indices=batch.logits_indices[:0],
    )
    hidden = pair.ours.forward(empty, session.kv_caches)
    assert hidden.shape == (0, 128)
    assert pair.ours.compute_logits(hidden).shape == (0, 320)
    assert all(cache.isnan().all() for cache in session.kv_caches)


def test_only_the_given_slots_are_written(pair: Pair) -> None:
    session = Session(pair.ours, max_tokens=32, num_requests=2)
    batch = session.batch([(1, random_tokens(13, seed=50))])
    pair.ours.forward(batch, session.kv_caches)
    for layer, cache in enumerate(session.kv_caches):
        written = ~cache.flatten(0, 1).isnan().any(dim=-1)
        expected = torch.zeros_like(written)
        if layer < pair.ours.config.num_hidden_layers:  # the last one is the NextN layer's
            expected[batch.slot_mapping] = True
        assert torch.equal(written, expected)
