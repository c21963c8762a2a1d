"""Engines whose ranks all share dense layers and lm_head: the tokens, and the scores, of one process."""

from __future__ import annotations

from typing import Any

import pytest

from dsengine import LLM, RequestOutput, SamplingParams

TEXT = "".join(f"{number}, " for number in range(100))
OPTIONS: dict[str, Any] = {
    "weight_format": "dequantized",
    "num_threads": 1,
    "max_total_tokens": 2048,
    "chunked_prefill_size": 512,
    "disable_radix_cache": True,
    "progress": False,
}
SHARED: dict[str, Any] = {"dense_parallel": "world", "lm_head_parallel": "world", "dist_timeout": 60}
TREES = {"speculative_algorithm": "NEXTN", "speculative_eagle_topk": 2, "speculative_num_steps": 2}


def answers(llm: LLM) -> list[RequestOutput]:
    """Scored prompts of one group, longer together than what is scored at once, beside a prompt of the other."""
    ids = llm.tokenizer.encode(TEXT, add_special_tokens=True)
    scored = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=2, ignore_eos=True)
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    assert len(ids) > 300
    prompts = [ids[:190], ids[:9], ids[10:200]]
    return llm.generate(prompt_token_ids=prompts, sampling_params=[scored, plain, scored])


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), TREES], ids=["plain", "trees"])
def test_tokens_and_scores_of_one_process(options: dict[str, Any]) -> None:
    with LLM(**OPTIONS) as one:
        expected = answers(one)
    with LLM(**OPTIONS, **SHARED, **options, tp_size=2, attn_dp_size=2) as two:
        found = answers(two)
        two.core.check_integrity()
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert (mine.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
        for a, b in zip(mine.prompt_logprobs or [], theirs.prompt_logprobs or [], strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.token_id == b.token_id and a.logprob == pytest.approx(b.logprob, abs=1e-4)
