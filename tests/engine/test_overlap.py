"""The overlapped loop on a simulated device: the same tokens as the plain one, and the host really works ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_device import SimulatedDevice
from tiny_engine import GREEDY, core_of, random_prompts, tokens, use_queue

from dsengine import LLM, SamplingParams
from dsengine.engine.messages import AddRequest, RequestUpdate


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    device = SimulatedDevice()
    yield device
    device.close()


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), block_size=8)


def overlapped(checkpoint: Path, device: SimulatedDevice, **options: Any) -> LLM:
    llm = use_queue(LLM(str(checkpoint), block_size=8, **options), checkpoint, device)
    assert core_of(llm).overlap and llm.core.info.overlap_schedule
    return llm


def assert_nothing_is_left(llm: LLM) -> None:
    llm.core.check_integrity()
    stats = llm.core.stats()
    assert stats.num_running == stats.num_waiting == stats.num_blocks_in_use == 0


def mixed_params(count: int) -> list[SamplingParams]:
    """Requests that end in different ways and ask for different processing, in turns."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "ignore_eos": True},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "min_tokens": 3, "stop_token_ids": tuple(range(3, 200))},
        {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1, "ignore_eos": True},
        {"temperature": 0.7, "presence_penalty": 1.0, "repetition_penalty": 1.2, "ignore_eos": True},
        {"temperature": 1.0, "stop_token_ids": tuple(range(3, 400)), "logit_bias": {7: 3.0}},
    ]
    return [SamplingParams(seed=i, max_tokens=3 + 5 * (i % 4), **kinds[i % len(kinds)]) for i in range(count)]


@pytest.mark.parametrize(
    "options",
    [{}, {"chunked_prefill_size": 16}, {"disable_radix_cache": True}, {"max_total_tokens": 160}],
    ids=["default", "small-chunks", "no-radix", "tight-cache"],
)
def test_tokens_are_those_of_the_plain_loop(
    checkpoint: Path, plain: LLM, device: SimulatedDevice, options: dict[str, Any]
) -> None:
    prompts, params = random_prompts(12), mixed_params(12)
    expected = plain.generate(prompt_token_ids=prompts, sampling_params=params)
    with overlapped(checkpoint, device, **options) as llm:
        for _ in range(2):  # the second time from the prefix cache
            outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params)
            assert tokens(outputs) == tokens(expected)
            for ours, theirs in zip(outputs, expected, strict=True):
                [our], [their] = ours.outputs, theirs.outputs
                assert (our.finish_reason, our.stop_reason, our.text) == (
                    their.finish_reason,
                    their.stop_reason,
                    their.text,
                )
                assert (our.logprobs is None) == (their.logprobs is None)
                if ours.prompt_logprobs is not None:
                    assert len(ours.prompt_logprobs) == len(ours.prompt_token_ids)
            assert_nothing_is_left(llm)


def test_stop_strings_and_abandoned_streams(checkpoint: Path, plain: LLM, device: SimulatedDevice) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    text = plain.generate("abc", free)[0].outputs[0].text
    stopping = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=(text[20:23],))
    with overlapped(checkpoint, device) as llm:
        [output] = llm.generate("abc", stopping)
        assert output.outputs[0].text == text[: text.index(text[20:23])]
        assert_nothing_is_left(llm)
        stream = llm.generate(["abc", "abcd"], free, stream=True)
        next(stream), next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert_nothing_is_left(llm)
        assert llm.generate("abc", free)[0].outputs[0].text == text, "what was under way must not reach later requests"


def test_not_a_number_ends_only_the_request_that_caused_it(
    checkpoint: Path, plain: LLM, device: SimulatedDevice
) -> None:
    poison = 13
    clean = [[t for t in p if t != poison] or [4] for p in random_prompts(4, seed=2)]
    expected = tokens(plain.generate(prompt_token_ids=clean, sampling_params=GREEDY))
    with overlapped(checkpoint, device, max_total_tokens=400) as llm:
        llm.core.model.embed_tokens[poison] = torch.nan
        prompts = [clean[0], [5, poison, 6, 7, 8, 9, 10, 11, 12, 4, 5], *clean[1:]]
        for _ in range(2):
            outputs = llm.generate(prompt_token_ids=prompts, sampling_params=GREEDY)
            assert outputs[1].outputs[0].finish_reason == "error"
            assert tokens([outputs[0], *outputs[2:]]) == expected
            assert_nothing_is_left(llm)


def test_each_step_is_launched_before_the_last_one_is_fetched(checkpoint: Path, device: SimulatedDevice) -> None:
    with overlapped(checkpoint, device) as llm:
        llm.generate(prompt_token_ids=[[5, 6, 7], [8, 9], [10]], sampling_params=GREEDY)
    host = [event for event in device.log if event[0] in ("launch", "fetch")]
    steps = GREEDY.max_tokens
    assert steps is not None
    expected = [("launch", 0)]
    for number in range(1, steps):
        expected += [("launch", number), ("fetch", number - 1)]
    # All requests end by their length, which the scheduler foresees: no step is launched in vain.
    assert host == [*expected, ("fetch", steps - 1)]


def test_the_host_prepares_a_step_while_the_device_is_held_up(checkpoint: Path, device: SimulatedDevice) -> None:
    """The device may not begin a step before the next one has been launched; the plain loop would never get on."""
    device.gate = threading.Semaphore(0)
    with overlapped(checkpoint, device) as llm:
        core = llm.core
        core.add_request(AddRequest("x", random_prompts(1)[0], GREEDY), 0.0)
        updates: list[RequestUpdate] = core.step(0.0).updates
        assert updates == [] and device.log == [("launch", 0)]
        release = threading.Timer(0.05, device.gate.release)  # later than the second launch
        release.start()
        updates = core.step(0.0).updates
        assert [u.new_token_ids != () for u in updates] == [True]
        launched, ended = device.log.index(("launch", 1)), device.log.index(("end", 0))
        assert launched < ended
        core.abort(["x"])
        device.gate.release(10)
        assert_nothing_is_left(llm)


def test_penalties_wait_for_the_token_they_count(checkpoint: Path, device: SimulatedDevice) -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=1.0, max_tokens=6, ignore_eos=True)
    with overlapped(checkpoint, device) as llm:
        llm.generate(prompt_token_ids=[[5, 6, 7]], sampling_params=params)
    host = [event for event in device.log if event[0] in ("launch", "fetch")]
    assert host == [(what, number) for number in range(6) for what in ("launch", "fetch")]


def test_the_flag_turns_it_off(checkpoint: Path, device: SimulatedDevice) -> None:
    llm = LLM(str(checkpoint), disable_overlap_schedule=True)
    assert not core_of(llm).overlap, "a CPU has no use for it"
    assert not core_of(use_queue(llm, checkpoint, device)).overlap
