"""Prompts of a wanted length for a server whose tokenizer is unknown, and when each of them is due."""

from __future__ import annotations

import json
import math
import random

import httpx

from benchmarks.serving_client import Call, Target

_WORDS = tuple(
    word
    for line in (
        "time year people way day man thing woman life child world school state family student group country problem",
        "part place case week company system program question work number night point home water room mother area",
        "money fact story month lot right study book eye job word business issue side kind head house service friend",
    )
    for word in line.split()
)


class PromptMaker:
    """Makes random prompts, alike for alike seeds.

    With a vocabulary size the prompts are random token ids and exact in length; otherwise they are words, counted by a
    calibration against the server's own usage figures.

    Args:
        shared_prefix_len: leading tokens that are common to all prompts of a group; 0 makes every prompt its own.
        num_groups: how many different prefixes there are.
    """

    def __init__(
        self,
        input_len: int,
        shared_prefix_len: int,
        num_groups: int,
        vocab_size: int | None,
        tokens_per_word: float,
        seed: int,
    ) -> None:
        if not 0 <= shared_prefix_len < input_len:
            raise ValueError(f"--shared-prefix-len is {shared_prefix_len}; it must lie in [0, {input_len - 1}]")
        self._random = random.Random(seed)
        self._vocab_size = vocab_size
        self._tokens_per_word = tokens_per_word
        self._tail_len = input_len - shared_prefix_len
        self._prefixes = [self._pieces(shared_prefix_len) for _ in range(num_groups)] if shared_prefix_len else [[]]
        self._count = 0

    def make(self) -> str | list[int]:
        prefix = self._prefixes[self._count % len(self._prefixes)]
        self._count += 1
        pieces = [*prefix, *self._pieces(self._tail_len)]
        if self._vocab_size is not None:
            return [int(piece) for piece in pieces]
        return " ".join(str(piece) for piece in pieces)

    def _pieces(self, num_tokens: int) -> list[int] | list[str]:
        if self._vocab_size is not None:
            # The last tenth of a vocabulary is where special tokens usually lie.
            highest = max(2, self._vocab_size * 9 // 10)
            return [self._random.randrange(1, highest) for _ in range(num_tokens)]
        return self._random.choices(_WORDS, k=max(1, round(num_tokens / self._tokens_per_word)))


def arrivals(num_prompts: int, request_rate: float | None, seed: int) -> list[float]:
    """When each request is due: a Poisson process of `request_rate` per second, or all at once."""
    if request_rate is None or math.isinf(request_rate):
        return [0.0] * num_prompts
    rng = random.Random(seed ^ 0x5EED)
    times, now = [], 0.0
    for _ in range(num_prompts):
        now += rng.expovariate(request_rate)
        times.append(now)
    return times


def make_calls(maker: PromptMaker, num_prompts: int, request_rate: float | None, seed: int) -> list[Call]:
    return [Call(maker.make(), arrival) for arrival in arrivals(num_prompts, request_rate, seed)]


def find_vocab_size(base_url: str, api_key: str | None) -> int | None:
    """The vocabulary size a dsengine server reports; None from any other server."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        info = httpx.get(base_url + "/server_info", headers=headers, timeout=10.0).json()
    except (httpx.HTTPError, json.JSONDecodeError):
        return None
    return _find_int(info, "vocab_size")


def _find_int(value: object, key: str) -> int | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get(key), int):
        return int(value[key])
    return next((found for item in value.values() if (found := _find_int(item, key)) is not None), None)


def calibrate(target: Target, seed: int) -> float:
    """Tokens per word of our random words, by the slope between two prompts (the chat template is their intercept)."""
    rng = random.Random(seed)
    counts: list[int] = []
    with httpx.Client(base_url=target.base_url + "/v1/", timeout=httpx.Timeout(30.0, read=None)) as http:
        if target.api_key:
            http.headers["Authorization"] = f"Bearer {target.api_key}"
        for num_words in (30, 150):
            body = target.body(" ".join(rng.choices(_WORDS, k=num_words)), output_len=1)
            body |= {"stream": False}
            body.pop("stream_options")
            response = http.post(target.path(), json=body)
            response.raise_for_status()
            counts.append(response.json()["usage"]["prompt_tokens"])
    return max((counts[1] - counts[0]) / 120, 0.1)
