"""The offline engine over several ranks: the demo model's answers are those of one process, whatever is asked of it."""

from __future__ import annotations

from typing import Any

import pytest

from dsengine import LLM, RequestOutput, SamplingParams
from dsengine.demo.evaluate import complete
from dsengine.demo.problems import three_digit_problems, tool_problems
from dsengine.engine.leading_core import LeadingCore
from dsengine.parallel.launch import is_alive

QUESTIONS = ["What is 347 + 285?", "1, 2, 3,", "Hello", "The capital of a country is", "What is 500 - 123?", "7 + 8 ="]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
# Six requests do not fit at a time, and prompts take several steps.
OPTIONS: dict[str, Any] = {
    "weight_format": "dequantized",
    "num_threads": 1,
    "block_size": 8,
    "max_total_tokens": 160,
    "chunked_prefill_size": 24,
    "progress": False,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tp_size": 2},
    "EP2": {"tp_size": 2, "ep_size": 2},
    "TP4": {"tp_size": 4},
    "EP4": {"tp_size": 4, "ep_size": 4},
    "DP2": {"tp_size": 2, "attn_dp_size": 2},
    "DP2 EP2": {"tp_size": 2, "attn_dp_size": 2, "ep_size": 2},
    "DP2 TP2": {"tp_size": 4, "attn_dp_size": 2},
    "DP2 EP2+2": {
        "tp_size": 2,
        "attn_dp_size": 2,
        "ep_size": 2,
        "moe_exchange": "all_to_all",
        "ep_num_redundant_experts": 2,
        "enable_eplb": True,
        "eplb_rebalance_num_iterations": 5,
    },
}


def ask(llm: LLM) -> list[list[RequestOutput]]:
    """All kinds of requests: together, again from the cache, edited, scored and drawn."""
    params = [
        SamplingParams(temperature=0, max_tokens=12, frequency_penalty=0.7, presence_penalty=0.3, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.3, logprobs=3, prompt_logprobs=2),
        SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=12, n=2, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=12, logit_bias={40: 5.0}, min_tokens=12, logprobs=1),
    ]
    return [
        llm.generate(QUESTIONS, GREEDY),
        llm.generate(QUESTIONS, GREEDY),
        llm.generate(QUESTIONS[:4], params),
        llm.generate(" ".join(QUESTIONS * 2), SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=1)),
    ]


def check_same(outputs: list[list[RequestOutput]], expected: list[list[RequestOutput]]) -> None:
    for ours, theirs in zip(outputs, expected, strict=True):
        for our, their in zip(ours, theirs, strict=True):
            assert [o.token_ids for o in our.outputs] == [o.token_ids for o in their.outputs]
            assert [o.finish_reason for o in our.outputs] == [o.finish_reason for o in their.outputs]
            for our_continuation, their_continuation in zip(our.outputs, their.outputs, strict=True):
                check_close(our_continuation.logprobs, their_continuation.logprobs)
            check_close(our.prompt_logprobs, their.prompt_logprobs)


def check_close(ours: Any, theirs: Any) -> None:
    assert (ours is None) == (theirs is None)
    for our, their in zip(ours or (), theirs or (), strict=True):
        assert (our is None) == (their is None)
        if our is not None:
            assert our.token_id == their.token_id and our.logprob == pytest.approx(their.logprob, abs=1e-3)
            assert [token for token, _ in our.top] == [token for token, _ in their.top]


def check_idle(llm: LLM) -> None:
    llm.core.check_integrity()
    stats = llm.core.stats()
    assert stats.num_running == stats.num_waiting == stats.num_blocks_in_use == 0


@pytest.fixture(scope="module")
def expected() -> list[list[RequestOutput]]:
    with LLM(**OPTIONS) as llm:
        return ask(llm)


@pytest.mark.parametrize(
    "layout",
    ["TP2", "DP2", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name not in ("TP2", "DP2"))],
)
def test_ranks_answer_as_one_process_does(layout: str, expected: list[list[RequestOutput]]) -> None:
    with LLM(**OPTIONS, **LAYOUTS[layout]) as llm:
        check_same(ask(llm), expected)
        check_idle(llm)
        assert llm.core.stats().num_preemptions + llm.core.stats().prefix_hit_tokens > 0
        stream = llm.generate(QUESTIONS, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True), stream=True)
        assert next(iter(stream)).outputs
        del stream  # whoever stops reading aborts
        check_idle(llm)
        assert llm.core.flush_cache() and llm.core.stats().num_blocks_in_use == 0
        check_same([llm.generate(QUESTIONS, GREEDY)], expected[:1])
        assert isinstance(llm.core, LeadingCore)
        pids = [rank.pid for rank in llm.core.info.ranks[1:]]
        assert len(pids) == LAYOUTS[layout]["tp_size"] - 1 and all(is_alive(pid) for pid in pids)
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("algorithm", "layout"),
    [
        ("NEXTN", "DP2"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("NEXTN", "TP2"), ("NGRAM", "TP2"), ("NEXTN", "DP2 TP2")]
        ),
    ],
)
def test_trees_are_verified_alike_on_all_ranks(
    algorithm: str, layout: str, expected: list[list[RequestOutput]]
) -> None:
    options = OPTIONS | {"speculative_algorithm": algorithm, "speculative_eagle_topk": 2, "max_total_tokens": 400}
    with LLM(**options, **LAYOUTS[layout]) as llm:
        check_same(ask(llm), expected)
        check_idle(llm)
        speculation = llm.core.stats().speculation
        assert speculation is not None and speculation.num_accepted > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tp_size": 3}, ["num_attention_heads is 4", "3 ranks"]),
        ({"tp_size": 2, "weight_format": "fp8"}, ["moe_intermediate_size", "256"]),
        ({"tp_size": 4, "attn_dp_size": 3}, ["attn_dp_size is 3", "tp_size"]),
        ({"tp_size": 4, "ep_size": 2}, ["ep_size is 2", "4"]),
        ({"tp_size": 2, "moe_exchange": "all_to_all"}, ["all_to_all", "ep_size is 1", "which is 2"]),
        ({"tp_size": 2, "moe_exchange": "pipes"}, ["'pipes'", "all_to_all"]),
        (
            {"tp_size": 2, "ep_size": 2, "moe_exchange": "deepep", "device": "cpu"},
            ["between CUDA devices", "device is cpu", "--moe-exchange all_to_all"],
        ),
        ({"tp_size": 2, "ep_size": 2, "ep_num_redundant_experts": 3}, ["redundant_experts", "multiple of 2"]),
        ({"tp_size": 2, "ep_size": 2, "ep_num_redundant_experts": -1}, ["ep_num_redundant_experts is -1"]),
        ({"enable_eplb": True}, ["enable_eplb", "ep_size is 1"]),
        ({"tp_size": 2, "dp_size": 2}, ["dp_size", "enable_dp_attention"]),
        ({"tp_size": 2, "device": "cuda:0"}, ["cuda"]),
        ({"tp_size": 3, "nnodes": 2}, ["nnodes is 2", "tp_size", "3"]),
        ({"tp_size": 2, "nnodes": 2}, ["dist_init_addr"]),
        ({"tp_size": 2, "nnodes": 2, "dist_init_addr": "nowhere"}, ["'nowhere'", "HOST:PORT"]),
        ({"tp_size": 2, "nnodes": 2, "dist_init_addr": "127.0.0.1:1"}, ["an LLM runs on one machine"]),
        ({"node_rank": 1}, ["node_rank is 1"]),
        ({"dist_timeout": 0.1}, ["dist_timeout is 0.1"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_started(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        LLM(progress=False, **options)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2", "DP2 EP2"])
def test_held_out_problems_are_answered_alike(layout: str) -> None:
    problems = [*three_digit_problems(60), *tool_problems(20)]
    options = OPTIONS | {"max_total_tokens": 8192, "chunked_prefill_size": 512}
    with LLM(**options) as llm:
        expected = complete(llm, problems)
    with LLM(**options, **LAYOUTS[layout]) as llm:
        assert complete(llm, problems) == expected
    assert sum(problem.grade(text) for problem, text in zip(problems, expected, strict=True)) > 70
