"""Acceptance by rejection through the whole engine: the model's own distribution, whatever the drafter proposes.

The tiny model is left a vocabulary of five tokens, so that the distribution of the first four tokens can be computed
for all texts, by running each and applying the request's wishes by hand.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_speculation import PARAMS, TREES, answers, drive, engine
from tiny_engine import random_prompts, tokens
from torch import Tensor

from dsengine import LLM, SamplingParams
from dsengine.engine import sampler as sampler_module
from dsengine.engine.build import build_engine
from dsengine.engine.core import EngineCore
from dsengine.engine.messages import AddRequest
from dsengine.model.teacher_forcing import forced_batch, num_blocks
from dsengine.specdec.verification import AcceptedPaths, reject

VOCAB = 5
LENGTH = 4
PROMPT = [3, 1]


def small_core(checkpoint: Path, tree: tuple[int, int, int], **options: Any) -> EngineCore:
    """An engine that knows the first tokens only."""
    options.setdefault("speculative_acceptance", "rejection")
    with engine(checkpoint, tree, max_running_requests=256, max_total_tokens=8192, **options) as llm:
        return build_engine(llm.config, checkpoint, eos_token_ids=frozenset(), num_valid_tokens=VOCAB)


def sampled_texts(core: EngineCore, params: Callable[[int], SamplingParams], count: int) -> Tensor:
    """int64 [count, LENGTH], the beginnings of the answers to as many requests, each with a seed of its own."""
    texts: list[list[int]] = [[] for _ in range(count)]
    sent = 0
    while sent < count or core.has_work:
        while sent < count and core.stats().num_running + core.stats().num_waiting < 256:
            core.add_request(AddRequest(str(sent), PROMPT, params(sent)), 0.0)
            sent += 1
        for update in core.step(0.0).updates:
            texts[int(update.request_id)] += update.new_token_ids
    core.check_integrity()
    stats = core.stats().speculation
    assert stats is not None and sum(stats.lengths[1:]) > count / 10  # drafts are accepted
    return torch.tensor([text[:LENGTH] for text in texts])


def exact(core: EngineCore, params: SamplingParams) -> Tensor:
    """float64 [VOCAB ** LENGTH], the chance of every text."""
    chances = torch.ones(1, dtype=torch.float64)
    for length in range(LENGTH):
        texts = list(itertools.product(range(VOCAB), repeat=length))
        rows = [PROMPT + list(text) for text in texts]
        batch = forced_batch(rows, core.model.device)
        cache = torch.zeros(num_blocks(rows), 16, core.model.config.latent_dim)
        with torch.inference_mode():
            hidden = core.model.forward(batch, [cache] * len(core.model.layers))
            last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
            logits = core.model.compute_logits(hidden[last])[:, :VOCAB].double()
        logits = logits.clone()  # may be changed outside of inference mode
        following = torch.stack([wished(row, text, params) for row, text in zip(logits, texts, strict=True)])
        chances = (chances[:, None] * following).flatten()
    return chances


def wished(logits: Tensor, text: tuple[int, ...], params: SamplingParams) -> Tensor:
    """The distribution of the token after an output `text`."""
    for token in range(VOCAB):
        if token in PROMPT or token in text:
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        if token in text:
            logits[token] -= params.presence_penalty + params.frequency_penalty * text.count(token)
        logits[token] += (params.logit_bias or {}).get(token, 0.0)
    probs = (logits / params.temperature).softmax(0)
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(0) - probs[order]
    probs[order[before >= params.top_p]] = 0.0
    probs[probs < params.min_p * probs.max()] = 0.0
    return probs / probs.sum()


def p_value(texts: Tensor, chances: Tensor) -> float:
    """Chi-square test of the texts; nothing impossible may occur."""
    powers = torch.tensor([VOCAB ** (LENGTH - 1 - i) for i in range(LENGTH)])
    counts = torch.bincount((texts * powers).sum(1), minlength=VOCAB**LENGTH).double()
    assert counts[chances == 0].sum() == 0
    expected = chances * len(texts)
    common = expected >= 5
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    kept = wanted > 0
    statistic = ((observed - wanted)[kept] ** 2 / wanted[kept]).sum()
    return float(torch.special.gammaincc(torch.tensor((int(kept.sum()) - 1) / 2).double(), statistic / 2))


WISHES: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.2},
    "top-p": {"temperature": 0.3, "top_p": 0.8, "min_p": 0.05},
    "penalties": {"temperature": 0.25, "repetition_penalty": 1.3, "frequency_penalty": 0.6, "logit_bias": {2: 0.7}},
}
CHAIN, TREE = (3, 1, 4), (2, 3, 7)


def check_losslessness(checkpoint: Path, tree: tuple[int, int, int], wish: str, count: int, seed: int) -> float:
    core = small_core(checkpoint, tree)
    params = [SamplingParams(max_tokens=LENGTH, ignore_eos=True, seed=seed + i, **WISHES[wish]) for i in range(count)]
    return p_value(sampled_texts(core, params.__getitem__, count), exact(core, params[0]))


@pytest.mark.parametrize(("tree", "wish"), [(CHAIN, "penalties"), (TREE, "top-p"), (TREE, "plain")], ids=str)
def test_rejection_keeps_the_distribution(checkpoint: Path, tree: Any, wish: str) -> None:
    assert check_losslessness(checkpoint, tree, wish, 2_500, seed=0) > 0.001


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("tree", [CHAIN, TREE], ids=str)
def test_rejection_keeps_the_distribution_of_many_texts(checkpoint: Path, tree: Any, wish: str) -> None:
    assert check_losslessness(checkpoint, tree, wish, 200_000, seed=1 << 32) > 0.001


def test_a_broken_rule_is_caught(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_too_much(tree: Any, drawn: Any, target: Any, uniforms: Tensor, depth: int, topk: int) -> AcceptedPaths:
        return reject(tree, drawn, target, uniforms * 0.8, depth, topk)

    monkeypatch.setattr(sampler_module, "reject", accept_too_much)
    assert check_losslessness(checkpoint, CHAIN, "plain", 2_500, seed=0) < 1e-6


@pytest.mark.parametrize("tree", [(1, 1, 2), (3, 1, 4), (1, 8, 9), (3, 4, 8)], ids=str)
def test_greedy_answers_stay_the_same_beside_sampled_ones(checkpoint: Path, tree: Any) -> None:
    prompts = random_prompts(2 * len(PARAMS), seed=3)
    params = [PARAMS[i % len(PARAMS)] for i in range(len(prompts))]
    greedy = [i for i, p in enumerate(params) if p.temperature == 0]
    with engine(checkpoint) as llm:
        expected = answers(llm, [prompts[i] for i in greedy], [params[i] for i in greedy])
    with engine(checkpoint, tree, speculative_acceptance="rejection") as llm:
        first = answers(llm, prompts, params)
        assert [first[i] for i in greedy] == expected
        assert all(len(ids) <= (p.max_tokens or 0) for (ids, _, _), p in zip(first, params, strict=True))
        assert answers(llm, prompts, params) == first  # the same seeds draw the same tokens
        assert answers(llm, [prompts[i] for i in greedy], [params[i] for i in greedy]) == expected
        # A seed's tokens do not depend on what else is computed.
        assert [answers(llm, [prompt], [p])[0] for prompt, p in zip(prompts[:6], params, strict=False)] == first[:6]


def test_logprobs_are_those_of_the_tokens_drawn(checkpoint: Path) -> None:
    """Scored again as a prompt, the answer has the log-probabilities that came with it."""
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=14, logprobs=2, ignore_eos=True)
    [prompt] = random_prompts(1, seed=8)
    with engine(checkpoint, (3, 3, 9), speculative_acceptance="rejection") as llm:
        [output] = llm.generate(prompt_token_ids=[prompt], sampling_params=params)
        again = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        [scored] = llm.generate(prompt_token_ids=[prompt + output.outputs[0].token_ids], sampling_params=again)
    given, expected = output.outputs[0].logprobs, scored.prompt_logprobs
    assert given is not None and expected is not None
    for ours, theirs in zip(given, expected[len(prompt) :], strict=True):
        assert theirs is not None and ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_arrivals_departures_and_preemption(checkpoint: Path, seed: int) -> None:
    rng = random.Random(seed)
    prompts = random_prompts(7, seed=seed, longest=40)
    params = [rng.choice(PARAMS) for _ in prompts]
    options = {"chunked_prefill_size": rng.choice((16, 2048)), "max_total_tokens": rng.choice((224, 2048))}
    with engine(checkpoint) as llm:
        plain = tokens(llm.generate(prompt_token_ids=prompts, sampling_params=params))
    with engine(checkpoint, TREES[3 + seed], speculative_acceptance="rejection", **options) as llm:
        for key, text in drive(llm, prompts, params, rng).items():
            assert len(text) <= (params[int(key)].max_tokens or 0)
            if params[int(key)].temperature == 0:
                assert text == plain[int(key)][: len(text)]


def test_what_is_looked_up_is_accepted_as_ever(checkpoint: Path) -> None:
    """N-grams are not drawn: both rules are one."""
    prompts, params = random_prompts(4, seed=5), PARAMS[:4]
    with engine(checkpoint) as llm:
        expected = answers(llm, prompts, params)
    with engine(checkpoint, (3, 2, 6), speculative_algorithm="NGRAM", speculative_acceptance="rejection") as llm:
        assert answers(llm, prompts, params) == expected


def test_impossible_options(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="speculative_acceptance is 'typical'; it must be one of coupled, rejection"):
        LLM(progress=False, speculative_acceptance="typical")
