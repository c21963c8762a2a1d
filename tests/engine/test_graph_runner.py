"""Everything about captured decode steps but the capture: padding, static tensors, the choice of a size."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replayed_graphs import ReplayedGraphs
from simulated_device import SimulatedDevice
from tiny_engine import GREEDY, TOKENIZER_SIZE, core_of, random_prompts, tokens, use_queue

from dsengine import LLM
from dsengine.engine.batch import ScheduledBatch, ScheduledRequest
from dsengine.engine.batch_inputs import BatchInputs
from dsengine.engine.graph_runner import (
    FP8_WEIGHTS_ONLY,
    OUTSIDE_GRAPHS,
    GraphRunner,
    graph_batch_sizes,
    operations_against_capture,
)
from dsengine.engine.launch import DirectQueue
from dsengine.engine.model_runner import ModelRunner, decode_function
from dsengine.engine.request import Request
from dsengine.engine.sampling_params import SamplingParams
from dsengine.kernels.registry import Choice, select_kernels

BLOCK_SIZE = 8
CONTEXT = 96
CPU = torch.device("cpu")


class Bench:
    """A model with some requests in its cache, whose next step can be computed with and without graphs."""

    def __init__(self, checkpoint: Path, tokens_per_request: int = 1) -> None:
        llm = LLM(str(checkpoint), block_size=BLOCK_SIZE, max_total_tokens=100 * BLOCK_SIZE, context_length=CONTEXT)
        self.plain: ModelRunner = core_of(llm)._launcher.runner
        self.backend = ReplayedGraphs()
        self.graphs = GraphRunner(
            partial(decode_function, self.plain.model, self.plain.pool),
            self.backend,
            device=CPU,
            block_size=BLOCK_SIZE,
            context_length=CONTEXT,
            tokens_per_request=tokens_per_request,
        )
        self.tokens_per_request = tokens_per_request
        self.requests: list[Request] = []
        self.next_block = 0

    def capture(self, *sizes: int) -> None:
        with torch.inference_mode():
            self.graphs.capture(sizes)

    def add(self, length: int) -> None:
        """A request of which all but the last `tokens_per_request` tokens are computed."""
        prompt = np.random.default_rng(length).integers(3, TOKENIZER_SIZE, size=length).tolist()
        request = Request(f"r{len(self.requests)}", prompt, SamplingParams())
        count = -(-length // BLOCK_SIZE)
        request.block_table = list(range(self.next_block, self.next_block + count))
        self.next_block += count
        context = length - self.tokens_per_request
        if context > 0:
            self.run(self.inputs([ScheduledRequest(request, 0, context, samples=False)]))
        self.requests.append(request)

    def next_step(self, count: int) -> BatchInputs:
        new = self.tokens_per_request
        scheduled = [ScheduledRequest(r, r.num_tokens - new, new, samples=True) for r in self.requests[:count]]
        inputs = self.inputs(scheduled)
        return replace(inputs, num_decodes=count, logits_indices=np.arange(inputs.num_tokens))

    def inputs(self, scheduled: list[ScheduledRequest]) -> BatchInputs:
        return self.plain.prepare(ScheduledBatch(scheduled), {}).inputs

    def run(self, inputs: BatchInputs, drawn: torch.Tensor | None = None) -> torch.Tensor:
        with torch.inference_mode():
            batch = inputs.to_device(CPU, drawn)
            hidden = self.plain.model.forward(batch, self.plain.pool.layers)
            return self.plain.model.compute_logits(hidden[batch.logits_indices])

    def replay(self, inputs: BatchInputs, drawn: torch.Tensor | None = None) -> torch.Tensor:
        with torch.inference_mode():
            [logits] = self.graphs.run(inputs, drawn)
        return logits.clone()

    def cache(self) -> list[torch.Tensor]:
        return [layer.clone() for layer in self.plain.pool.layers]


@pytest.fixture(scope="module")
def bench(checkpoint: Path) -> Bench:
    bench = Bench(checkpoint)
    for length in (40, 9, 1, 17, 33, 8, 95):
        bench.add(length)
    bench.capture(1, 4, 8)
    return bench


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7])
def test_a_replayed_step_is_the_plain_step(bench: Bench, count: int) -> None:
    inputs = bench.next_step(count)
    assert bench.graphs.fits(inputs)
    before = bench.cache()
    expected = bench.run(inputs)
    after = bench.cache()
    for layer, contents in zip(bench.plain.pool.layers, before, strict=True):
        layer.copy_(contents)
    logits = bench.replay(inputs)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert logits.shape == expected.shape
    # Padding rows store nothing: the cache is what the plain step made of it, in every slot.
    for layer, contents in zip(bench.plain.pool.layers, after, strict=True):
        torch.testing.assert_close(layer, contents, atol=1e-5, rtol=1e-5)


def test_the_smallest_size_that_fits_is_replayed(bench: Bench) -> None:
    replays = [graph.num_replays for graph in bench.backend.captured]
    bench.replay(bench.next_step(3))
    bench.replay(bench.next_step(1))
    bench.replay(bench.next_step(5))
    after = [graph.num_replays for graph in bench.backend.captured]
    assert [b - a for a, b in zip(replays, after, strict=True)] == [1, 1, 1], "one each, captured the largest first"
    assert bench.graphs.sizes == [1, 4, 8]


def test_what_a_larger_batch_left_behind_is_not_read(bench: Bench) -> None:
    alone = bench.replay(bench.next_step(1))
    bench.replay(bench.next_step(7))
    torch.testing.assert_close(bench.replay(bench.next_step(1)), alone, atol=0, rtol=0)
    three = bench.replay(bench.next_step(3))
    bench.replay(bench.next_step(4))  # the same graph, with other contents where three has padding
    torch.testing.assert_close(bench.replay(bench.next_step(3)), three, atol=0, rtol=0)


def test_tokens_that_only_the_device_knows(bench: Bench) -> None:
    inputs = bench.next_step(3)
    drawn = torch.tensor([5, int(inputs.input_ids[2]), int(inputs.input_ids[0])])
    ids = inputs.input_ids.copy()
    ids[[0, 2]] = 0
    open_inputs = replace(inputs, input_ids=ids, open_tokens=np.array([0, 2]), open_sources=np.array([2, 1]))
    expected = bench.replay(inputs)
    torch.testing.assert_close(bench.replay(open_inputs, drawn), expected, atol=0, rtol=0)
    # A request whose logits were no numbers has drawn -1; its step is in vain, and harmless.
    spoilt = torch.tensor([5, -1, int(inputs.input_ids[0])])
    torch.testing.assert_close(bench.replay(open_inputs, spoilt)[:2], expected[:2], atol=1e-5, rtol=1e-5)


def test_only_decodes_fit(bench: Bench) -> None:
    inputs = bench.next_step(4)
    assert not bench.graphs.fits(replace(inputs, logits_indices=inputs.logits_indices[:3])), "a row is not wanted"
    assert not bench.graphs.fits(bench.inputs([ScheduledRequest(bench.requests[0], 30, 10, samples=True)]))
    request = bench.requests[0]
    mixed = [ScheduledRequest(bench.requests[1], 8, 1, True), ScheduledRequest(request, 30, 10, True)]
    assert not bench.graphs.fits(bench.inputs(mixed))
    many = [ScheduledRequest(bench.requests[i % 7], 0, 1, True) for i in range(9)]
    assert not bench.graphs.fits(bench.inputs(many)), "larger than the largest graph"


def test_verify_steps_of_several_tokens(checkpoint: Path) -> None:
    bench = Bench(checkpoint, tokens_per_request=3)
    for length in (40, 9, 3, 17):
        bench.add(length)
    bench.capture(2, 4)
    for count in (1, 3, 4):
        inputs = bench.next_step(count)
        assert bench.graphs.fits(inputs) and inputs.num_tokens == 3 * count
        torch.testing.assert_close(bench.replay(inputs), bench.run(inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_whole_engine_replays_its_decodes(checkpoint: Path, overlap: bool) -> None:
    options: dict[str, Any] = {"block_size": BLOCK_SIZE, "context_length": CONTEXT}
    prompts = random_prompts(6, longest=30)
    llm = LLM(str(checkpoint), **options)
    expected = tokens(llm.generate(prompt_token_ids=prompts, sampling_params=GREEDY))
    with contextlib.closing(SimulatedDevice()) as device:
        use_queue(llm, checkpoint, device if overlap else DirectQueue())
        core_of(llm).overlap = overlap
        runner = core_of(llm)._launcher.runner
        backend = ReplayedGraphs()
        function = partial(decode_function, runner.model, runner.pool)
        runner.graphs = GraphRunner(function, backend, device=CPU, block_size=BLOCK_SIZE, context_length=CONTEXT)
        with torch.inference_mode():
            runner.graphs.capture([1, 2, 4, 8])
        outputs = llm.generate(prompt_token_ids=prompts, sampling_params=GREEDY)
    assert tokens(outputs) == expected
    assert sum(graph.num_replays for graph in backend.captured) >= 10
    llm.core.check_integrity()


@pytest.mark.parametrize(
    ("wanted", "largest", "running", "sizes"),
    [
        ((), None, 256, [1, 2, 4, *range(8, 257, 8)]),
        ((), None, 4096, [1, 2, 4, *range(8, 257, 8)]),
        ((), 512, 4096, [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]),
        ((), None, 20, [1, 2, 4, 8, 16, 20]),
        ((), None, 1, [1]),
        ((), 3, 20, [1, 2, 3]),
        ((16, 2, 2, 400), None, 256, [2, 16]),
    ],
)
def test_sizes(wanted: tuple[int, ...], largest: int | None, running: int, sizes: list[int]) -> None:
    assert graph_batch_sizes(wanted, largest, running) == sizes


def test_sizes_none_of_which_can_occur_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cuda_graph_bs is 64, 128; at least one size must be at most 32"):
        graph_batch_sizes((64, 128), None, 32)


def test_backends_that_wait_for_the_host_are_named() -> None:
    kernels = select_kernels(CPU)
    assert kernels.table().keys() >= OUTSIDE_GRAPHS | FP8_WEIGHTS_ONLY, "an operation has got another name"
    assert f"moe_experts={kernels.table()['moe_experts']}" in operations_against_capture(kernels, has_fp8_weights=True)
    choices = tuple(Choice(c.operation, "triton", "") for c in kernels.choices)
    assert operations_against_capture(replace(kernels, choices=choices), has_fp8_weights=True) == []
    slow = tuple(
        Choice(c.operation, "ref" if c.operation in ("gemm_fp8_block", "mla_prefill", "sample") else "triton", "")
        for c in kernels.choices
    )
    assert operations_against_capture(replace(kernels, choices=slow), has_fp8_weights=True) == ["gemm_fp8_block=ref"]
    assert operations_against_capture(replace(kernels, choices=slow), has_fp8_weights=False) == []
