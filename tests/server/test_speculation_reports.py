"""What clients and Prometheus are told of drafted tokens: by a stand-in, and by a real server whose sums must agree."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from server_process import running_server

from dsengine.engine.messages import EngineStats, SpeculationStats
from dsengine.server.generation import Delta
from dsengine.server.metrics import Metrics
from dsengine.server.usage import Usage

STATS = SpeculationStats(
    shape="2/1/3",
    num_drafts=20,
    num_accepted=11,
    lengths=[3, 2, 5],
    tried=[10, 7],
    steps={"2/1/3": 6, "1/1/2": 1},
    seconds={"draft": 1.0, "verify": 6.0, "accept": 1.0, "catch up": 2.0},
)


def rendered(stats: EngineStats) -> list[str]:
    return Metrics(lambda: stats, lambda: 0.0).render().decode().splitlines()


def test_metrics_of_speculation() -> None:
    lines = rendered(EngineStats(speculation=STATS))
    for line in (
        "dsengine_spec_draft_tokens_total 20.0",
        "dsengine_spec_accepted_tokens_total 11.0",
        'dsengine_spec_accepted_length_bucket{le="0"} 3.0',
        'dsengine_spec_accepted_length_bucket{le="1"} 5.0',
        'dsengine_spec_accepted_length_bucket{le="+Inf"} 10.0',
        "dsengine_spec_accepted_length_sum 12.0",
        'dsengine_spec_acceptance_ratio{depth="1"} 0.7',
        'dsengine_spec_steps_total{tree="2/1/3"} 6.0',
        'dsengine_spec_seconds_total{phase="verify"} 6.0',
        "dsengine_spec_draft_time_ratio 0.3",
    ):
        assert line in lines
    assert STATS.tokens_per_tree == 2.2 and STATS.acceptance(2) == 5 / 7


def test_without_speculation_there_are_no_such_metrics() -> None:
    assert not [line for line in rendered(EngineStats()) if "spec" in line]


def test_usage_counts_drafts() -> None:
    usage = Usage([[1, 2, 3]], 1)
    usage.add(Delta(0, token_ids=[4, 5, 6], num_drafts=7, num_accepted=2))
    usage.add(Delta(0, token_ids=[4], num_drafts=7, num_accepted=0))
    assert usage.body()["completion_tokens_details"] == {
        "reasoning_tokens": 0,
        "accepted_prediction_tokens": 2,
        "rejected_prediction_tokens": 12,
    }
    plain = Usage([[1]], 1)
    plain.add(Delta(0, token_ids=[4]))
    assert set(plain.body()["completion_tokens_details"].values()) == {0}


def test_a_server_tells_the_truth(tmp_path: Path) -> None:
    """What all answers say of their drafts adds up to what /metrics says, with answers that end within a path."""
    tree = ["--speculative-num-steps", "3", "--speculative-eagle-topk", "4", "--no-speculative-adaptive"]
    memory = ["--max-total-tokens", "8192"]
    with running_server(tmp_path, "--speculative-algorithm", "NEXTN", *tree, *memory) as server:

        def usage(number: int) -> dict[str, Any]:
            body: dict[str, Any] = {
                "model": "dsengine-demo",
                "prompt": f"What is {number}17 + 285?",
                "max_tokens": 5 + number,
            }
            body["temperature"] = 0.5 * (number % 2)
            answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60).raise_for_status().json()
            return answer["usage"]  # type: ignore[no-any-return]

        with ThreadPoolExecutor(5) as pool:
            usages = list(pool.map(usage, range(1, 10)))
        text = httpx.get(server.url + "/metrics", timeout=30).raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    told = {(sample.name, *sample.labels.values()): sample.value for sample in samples}
    details = [usage["completion_tokens_details"] for usage in usages]
    accepted = sum(detail["accepted_prediction_tokens"] for detail in details)
    rejected = sum(detail["rejected_prediction_tokens"] for detail in details)
    assert told["dsengine_spec_accepted_tokens_total",] == accepted > 9
    assert told["dsengine_spec_draft_tokens_total",] == accepted + rejected
    trees = told["dsengine_spec_accepted_length_bucket", "+Inf"]
    assert accepted + rejected == 7 * trees, "a tree of 8 nodes holds 7 drafts"
    # An answer's first token comes without a tree; a tree brings what is kept of it, and one more if it is not cut.
    tokens = sum(usage["completion_tokens"] for usage in usages)
    assert accepted < tokens - len(usages) <= accepted + trees < tokens
    assert accepted <= told["dsengine_spec_accepted_length_sum",] <= accepted + 3 * len(usages)
    reached = [trees - told["dsengine_spec_accepted_length_bucket", str(depth)] for depth in range(3)]
    tried = [trees, *reached[:2]]
    rates = [told["dsengine_spec_acceptance_ratio", str(depth)] for depth in (1, 2, 3)]
    assert rates == [count / of for count, of in zip(reached, tried, strict=True)]
    assert [key for key in told if key[0] == "dsengine_spec_steps_total"] == [("dsengine_spec_steps_total", "3/4/8")]
    assert 0 < told["dsengine_spec_steps_total", "3/4/8"] <= trees
    seconds = {key[1]: value for key, value in told.items() if key[0] == "dsengine_spec_seconds_total"}
    assert seconds.keys() == {"draft", "verify", "accept", "catch up"} and min(seconds.values()) > 0
    share = (seconds["draft"] + seconds["catch up"]) / sum(seconds.values())
    assert abs(told["dsengine_spec_draft_time_ratio",] - share) < 1e-9
