"""Attention groups under random loads: uneven, idle, aborted, preempted, and yet the tokens of a request alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_process import DEMO_MODEL, ServerProcess, running_server

from dsengine import LLM, SamplingParams
from dsengine.engine.leading_core import LeadingCore
from dsengine.engine.messages import AddRequest

# Caches of 160 tokens: long requests drive each other out.
OPTIONS: dict[str, Any] = {
    "weight_format": "dequantized",
    "num_threads": 1,
    "block_size": 8,
    "max_total_tokens": 160,
    "chunked_prefill_size": 24,
    "progress": False,
}
TEXT = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29"
PROMPT_LENGTHS = (1, 5, 30, 70)
OUTPUT_LENGTH = 12


@pytest.fixture(scope="module")
def expected() -> dict[int, list[int]]:
    """Tokens that follow each prompt."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LENGTH, ignore_eos=True)
    with LLM(**OPTIONS) as llm:
        ids = llm.tokenizer.encode(TEXT, add_special_tokens=True)
        outputs = [llm.generate(prompt_token_ids=ids[:n], sampling_params=params)[0] for n in PROMPT_LENGTHS]
    return {n: output.outputs[0].token_ids for n, output in zip(PROMPT_LENGTHS, outputs, strict=True)}


@pytest.fixture(scope="module", params=[pytest.param("plain", marks=pytest.mark.slow), "NextN"])
def groups(request: pytest.FixtureRequest) -> Iterator[LLM]:
    trees = {"speculative_algorithm": "NEXTN", "speculative_eagle_topk": 2, "speculative_num_steps": 2}
    options = OPTIONS | (trees if request.param == "NextN" else {})
    with LLM(**options, tp_size=2, attn_dp_size=2, dist_timeout=60) as llm:
        yield llm
        speculation = llm.core.stats().speculation
        assert request.param == "plain" or (speculation is not None and speculation.num_accepted > 0)


# What happens between two steps: requests come (length of the prompt, length of the output), one is aborted, nobody
# steps for once.
_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(PROMPT_LENGTHS), st.integers(1, OUTPUT_LENGTH)),
        st.just("abort"),
        st.just("rest"),
        st.integers(1, 6),
    ),
    max_size=14,
)


def check_schedule(llm: LLM, events: list[Any], expected: dict[int, list[int]], name: str) -> None:
    core = llm.core
    ids = llm.tokenizer.encode(TEXT, add_special_tokens=True)
    wanted: dict[str, list[int]] = {}
    received: dict[str, list[int]] = {}

    def step() -> None:
        for update in core.step(time.monotonic()).updates:
            if update.request_id in wanted:
                assert update.error is None
                received[update.request_id] += update.new_token_ids

    for number, event in enumerate(events):
        match event:
            case (prompt, output):
                request_id = f"{name}-{number}"
                params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
                core.add_request(AddRequest(request_id, ids[:prompt], params), time.monotonic())
                wanted[request_id], received[request_id] = expected[prompt][:output], []
            case "abort":
                if wanted:
                    request_id = next(iter(wanted))
                    core.abort([request_id])
                    del wanted[request_id]
            case "rest":
                assert isinstance(core, LeadingCore)
                core.show_life(time.monotonic())
            case count:
                for _ in range(count):
                    step()
    for _ in range(400):
        if not core.has_work:
            break
        step()
    assert not core.has_work, "it does not come to an end"
    assert {request_id: received[request_id] for request_id in wanted} == wanted
    core.check_integrity()
    stats = core.stats()
    assert stats.num_running == stats.num_waiting == stats.num_blocks_in_use == 0 and len(stats.groups) == 2


@pytest.mark.timeout(280)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(events=_EVENTS, name=st.uuids().map(str))
def test_any_schedule(groups: LLM, expected: dict[int, list[int]], events: list[Any], name: str) -> None:
    check_schedule(groups, events, expected, name)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(events=_EVENTS, name=st.uuids().map(str))
def test_many_schedules(groups: LLM, expected: dict[int, list[int]], events: list[Any], name: str) -> None:
    check_schedule(groups, events, expected, name)


def test_one_group_prefills_and_preempts_while_the_other_is_idle_or_decodes(
    groups: LLM, expected: dict[int, list[int]]
) -> None:
    events: list[Any] = [(1, 12), 2, *[(70, 12)] * 5, 3, "abort", 2, (5, 3)]
    before = groups.core.stats()
    check_schedule(groups, events, expected, "mixed")
    after = groups.core.stats()
    ran = [a.prefix_query_tokens - b.prefix_query_tokens for a, b in zip(after.groups, before.groups, strict=True)]
    assert all(ran), "one group had nothing to do"


def chat(server: ServerProcess, **options: Any) -> str:
    answer = server.openai().chat.completions.create(
        model=DEMO_MODEL,
        messages=[{"role": "user", "content": "What is 347 + 285?"}],
        temperature=0,
        extra_body={"chat_template_kwargs": {"thinking": False}},
        **options,
    )
    return str(answer.choices[0].message.content)


def value_of(metrics: str, name: str) -> float:
    [line] = [line for line in metrics.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[-1])


def test_a_server_with_two_groups(tmp_path: Path) -> None:
    groups = ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention", "--weight-format", "dequantized")
    flags = (*groups, "--ep-size", "2", "--enable-eplb", "--eplb-rebalance-num-iterations", "8")
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    shape = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    with running_server(tmp_path, *flags, "--max-total-tokens", "4096") as server:
        with ThreadPoolExecutor(6) as pool:
            answers = set(pool.map(lambda _: chat(server, max_tokens=100), range(6)))
        assert len(answers) == 1 and "632" in answers.pop()
        assert chat(server, max_tokens=60, response_format=shape).startswith("{")
        # The second turn of a conversation finds the first one in the cache of its group.
        long = {"model": DEMO_MODEL, "temperature": 0, "max_tokens": 8}
        first = server.openai().completions.create(prompt=TEXT, **long)
        again = server.openai().completions.create(prompt=TEXT + first.choices[0].text + ", 40,", **long)
        assert again.usage is not None and again.usage.prompt_tokens_details is not None
        assert (again.usage.prompt_tokens_details.cached_tokens or 0) > 60
        metrics = httpx.get(server.url + "/metrics", timeout=30).text
        for group in range(2):
            assert f'dsengine_group_kv_cache_blocks{{group="{group}"}} 256.0' in metrics
            assert f'dsengine_group_kv_cache_usage_ratio{{group="{group}"}} 0.0' in metrics
            assert f'dsengine_group_num_requests_waiting{{group="{group}"}} 0.0' in metrics
            [line] = [
                s
                for s in metrics.splitlines()
                if s.startswith(f'dsengine_group_kv_cache_blocks_cached{{group="{group}"')
            ]
            assert float(line.split()[-1]) > 0
        on_average, at_worst = (
            value_of(metrics, f"dsengine_expert_{name}_imbalance_ratio") for name in ("step", "worst_layer")
        )
        assert 1 <= on_average <= at_worst <= 2
        assert value_of(metrics, "dsengine_expert_looks_total") > 2
        assert value_of(metrics, "dsengine_experts_moved_total") > 0
        assert "dsengine_kv_cache_blocks 512.0" in metrics  # each group has a cache of its own
        assert server.is_idle()
        assert httpx.post(server.url + "/flush_cache", timeout=30).json() == {"flushed": True}
