"""Attention groups replay captured steps together or not at all, and write what one process writes, step by step."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from rank_processes import run_worker
from tiny_engine import TOKENIZER_SIZE, random_prompts, write_tiny_checkpoint

from dsengine import LLM, SamplingParams
from dsengine.engine.batch import ScheduledBatch, ScheduledRequest
from dsengine.engine.lock_step import DECODE, LockStep, StepKind, summary
from dsengine.engine.request import Request
from dsengine.specdec.shape import TreeShape

TIMEOUT_S = 120
LONGEST = 30
OUTPUT_LENGTH = 10
# Small caches, so that requests drive each other out, and graphs for fewer requests than can run.
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "block_size": 8,
    "max_total_tokens": 160,
    "context_length": 96,
    "chunked_prefill_size": 24,
    "max_running_requests": 6,
    "cuda_graph_bs": (1, 2, 4),
    "num_threads": 1,
}
TREES: dict[str, Any] = {"speculative_algorithm": "NEXTN", "speculative_eagle_topk": 2, "speculative_num_steps": 2}
# Whether adaptive trees are drafted at all depends on the costs that were measured.
FIXED_TREES = TREES | {"speculative_adaptive": False}
SHARED: dict[str, Any] = {"dense_parallel": "world", "lm_head_parallel": "world"}
MOVING = {"enable_eplb": True, "ep_num_redundant_experts": 4, "eplb_rebalance_num_iterations": 7}
Script = list[list[list[tuple[int, int]]]]
"""[step][group]: the requests that come before it: number of the prompt, number of tokens wanted."""

# Group 1 is idle, prefills beside decodes, decodes beside more; its last prompt is a single token, as in a decode.
SCRIPT: Script = [[[(0, 9), (1, 6), (2, 6)], []], [], [], [[], [(3, 4)]], [], [], [], [[], [(4, 2)]]]
# The largest group decodes 3 requests in steps 1 to 5 and one from then on; graphs are for 4, 2 and 1 requests.
REPLAYED = [-1, 0, 0, -1, 0, 0, 2, 2, 2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("random-v3"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    long = random_prompts(6, longest=LONGEST)
    return [*(prompt[:5] for prompt in long[:4]), long[4][:1], *long]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What follows each prompt."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LENGTH, ignore_eos=True)
    with LLM(str(checkpoint), block_size=8, context_length=96, num_threads=1, progress=False) as llm:
        return [llm.generate(prompt_token_ids=p, sampling_params=params)[0].outputs[0].token_ids for p in prompts]


def random_scripts(count: int, groups: int, num_prompts: int) -> list[Script]:
    """The same every time; mostly little to do, so that groups often decode or are idle."""
    draw = random.Random(5)

    def arriving() -> list[tuple[int, int]]:
        number = draw.choice((0, 0, 0, 0, 0, 1, 1, 2, 4))
        return [(draw.randrange(num_prompts), draw.randint(1, OUTPUT_LENGTH)) for _ in range(number)]

    return [[[arriving() for _ in range(groups)] for _ in range(draw.randint(1, 12))] for _ in range(count)]


def run_ranks(folder: Path, case: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank has done; no rank outlives this call."""
    folder.mkdir()
    (folder / "case.json").write_text(json.dumps(case))
    count = case["options"]["tp_size"]
    run_worker("captured_worker.py", count, folder, helpers=["engine"], timeout_s=TIMEOUT_S)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]


class Bench:
    """Runs scripts on ranks and compares all that was written with what one process writes."""

    def __init__(self, folder: Path, checkpoint: Path, prompts: list[list[int]], expected: list[list[int]]) -> None:
        self.folder, self.checkpoint, self.prompts, self.expected = folder, checkpoint, prompts, expected

    def run(
        self,
        scripts: list[Script],
        *,
        overlap: bool = False,
        refusing: tuple[int, ...] = (),
        sleeps: tuple[int, ...] = (),
        **options: Any,
    ) -> list[dict[str, Any]]:
        options = OPTIONS | options
        case = {
            "checkpoint": str(self.checkpoint),
            "num_valid_tokens": TOKENIZER_SIZE,
            "options": options,
            "overlap": overlap,
            "refusing": refusing,
            "sleeps": sleeps or (0,) * len(scripts),
            "schedules": [
                [[[(self.prompts[p], n) for p, n in group] for group in groups_of(step, options)] for step in script]
                for script in scripts
            ],
        }
        told = run_ranks(self.folder / "world", case)
        for rank, each in enumerate(told):
            group = rank * options["attn_dp_size"] // options["tp_size"]
            for script, tokens in zip(scripts, each["tokens"], strict=True):
                wanted = {
                    f"{number}-{place}": self.expected[prompt][:count]
                    for number, step in enumerate(script)
                    for place, (prompt, count) in enumerate(groups_of(step, options)[group])
                }
                assert tokens == wanted
            assert each["replayed"] == told[0]["replayed"], "some replay and some do not"
            assert each["drafts"] == told[0]["drafts"], "some draft in graphs and some do not"
        return told


def groups_of(step: list[list[tuple[int, int]]], options: dict[str, Any]) -> list[list[tuple[int, int]]]:
    return step or [[]] * int(options["attn_dp_size"])


@pytest.fixture
def bench(tmp_path: Path, checkpoint: Path, prompts: list[list[int]], expected: list[list[int]]) -> Bench:
    return Bench(tmp_path, checkpoint, prompts, expected)


def replays(told: list[dict[str, Any]]) -> set[int]:
    return {graph for script in told[0]["replayed"] for graph in script}


def test_uneven_idle_and_mixed_groups(bench: Bench) -> None:
    scripts = [SCRIPT, *random_scripts(25, 2, len(bench.prompts))]
    told = bench.run(scripts, tp_size=2, attn_dp_size=2)
    assert [rank["sizes"] for rank in told] == [[1, 2, 4]] * 2
    assert told[0]["replayed"][0] == REPLAYED
    assert replays(told) == {-1, 0, 1, 2}


def test_trees_of_groups(bench: Bench) -> None:
    told = bench.run(random_scripts(12, 2, len(bench.prompts)), tp_size=2, attn_dp_size=2, **FIXED_TREES)
    assert told[0]["captured"][0] > 3, "of every size, plain and with trees"
    assert max(replays(told)) >= 3 and -1 in replays(told)
    assert sum(count > 0 for count in told[0]["drafts"].values()) > 1, "drafts are replayed, in several sizes"


def test_trees_of_groups_whose_ranks_share_dense_layers_and_head(bench: Bench) -> None:
    options = FIXED_TREES | SHARED
    told = bench.run([SCRIPT, *random_scripts(8, 2, len(bench.prompts))], tp_size=2, attn_dp_size=2, **options)
    assert max(replays(told)) >= 3 and -1 in replays(told)
    assert sum(count > 0 for count in told[0]["drafts"].values()) > 1, "drafts are replayed, in several sizes"


@pytest.mark.parametrize(
    ("options", "graph"),
    [
        pytest.param({"overlap": True}, 0, id="overlapped", marks=pytest.mark.slow),
        pytest.param(FIXED_TREES, 3, id="trees"),
    ],
)
def test_sleep_forgets_graphs_and_waking_captures_them_again(bench: Bench, options: dict[str, Any], graph: int) -> None:
    told = bench.run([SCRIPT] * 3, sleeps=(1, 2, 0), tp_size=2, attn_dp_size=2, **options)
    for rank in told:
        assert rank["captured"] == rank["captured"][:1] * 3 and rank["captured"][0] > graph
        assert all(max(replayed) >= graph for replayed in rank["replayed"]), rank["replayed"]


def test_overlapped_steps_of_groups(bench: Bench) -> None:
    told = bench.run(random_scripts(12, 2, len(bench.prompts)), overlap=True, tp_size=2, attn_dp_size=2)
    assert replays(told) == {-1, 0, 1, 2}


def test_one_rank_that_cannot_capture_keeps_all_from_it(bench: Bench) -> None:
    told = bench.run([SCRIPT], refusing=(1,), tp_size=2, attn_dp_size=2)
    assert [rank["sizes"] for rank in told] == [[], []] and replays(told) == {-1}


@pytest.mark.slow
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"overlap": True}, TREES, MOVING, SHARED, SHARED | TREES],
    ids=["plain", "overlapped", "trees", "experts move", "shared by all", "trees, shared by all"],
)
def test_four_ranks(bench: Bench, groups: int, options: dict[str, Any]) -> None:
    scripts = random_scripts(20, groups, len(bench.prompts))
    told = bench.run(scripts, tp_size=4, attn_dp_size=groups, ep_size=4, **options)
    assert len(replays(told)) > 3
    assert all(rank["experts_moved"] == ("enable_eplb" in options) for rank in told)


def scheduled(start: int, count: int, **changes: Any) -> ScheduledRequest:
    params = SamplingParams(prompt_logprobs=changes.pop("prompt_logprobs", None))
    request = Request("r", [5] * 8, params, output_token_ids=[6] * 8)
    return ScheduledRequest(request, start, count, **({"samples": True} | changes))


TREE = TreeShape(2, 2, 4)
CHAIN = TreeShape(3, 1, 4)


@pytest.mark.parametrize(
    ("batch", "kind", "logits", "scored"),
    [
        (ScheduledBatch([scheduled(9, 1), scheduled(12, 1)]), DECODE, 2, 0),
        (ScheduledBatch([scheduled(7, 1)]), DECODE, 1, 0),
        (ScheduledBatch([scheduled(9, 1)], tree=TREE), DECODE, 1, 0),
        (ScheduledBatch([scheduled(9, 4, num_drafts=3)], tree=TREE), StepKind(4, True), 4, 0),
        (ScheduledBatch([scheduled(9, 4, num_drafts=3)], tree=CHAIN), StepKind(4, False), 4, 0),
        (ScheduledBatch([scheduled(9, 1), scheduled(3, 5)]), None, 2, 0),
        (ScheduledBatch([scheduled(9, 1), scheduled(3, 1, samples=False)]), None, 1, 0),
        (ScheduledBatch([scheduled(9, 4, num_drafts=3), scheduled(9, 1)], tree=TREE), None, 5, 0),
        (ScheduledBatch([scheduled(7, 1, prompt_logprobs=1)]), None, 1, 0),
        (ScheduledBatch([scheduled(2, 3, prompt_logprobs=1, samples=False)]), None, 0, 3),
        (ScheduledBatch([scheduled(2, 6, prompt_logprobs=1)]), None, 1, 5),
        (ScheduledBatch([scheduled(8, 1, prompt_logprobs=1)]), DECODE, 1, 0),
    ],
)
def test_kinds_of_steps(batch: ScheduledBatch, kind: StepKind | None, logits: int, scored: int) -> None:
    own, idle = summary(batch), summary(ScheduledBatch(tree=TREE))
    trees = sum(s.num_drafts > 0 for s in batch.requests)
    rows = ((logits, 0), (scored, 0))
    expected = LockStep((batch.num_tokens, 0), kind, len(batch.requests), *rows, trees, trees > 0)
    assert LockStep.of([own, idle]) == expected
    assert LockStep.of([idle, idle]) == LockStep((0, 0), None, 0, (0, 0), (0, 0))
    other = summary(ScheduledBatch([scheduled(9, 2, num_drafts=1)] * 3, tree=TreeShape(1, 1, 2)))
    assert LockStep.of([own, idle, other]).kind is None
    assert LockStep.of([idle, other, other]) == LockStep(
        (0, 6, 6), StepKind(2, False), 3, (0, 6, 6), (0, 0, 0), 3, True
    )
