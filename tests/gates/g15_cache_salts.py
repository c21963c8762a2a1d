"""G15: prefixes cached under one key or salt never serve another, asked over HTTP of a real engine."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import httpx
from gate_frame import Findings, Outcome, Scale
from server_process import DEMO_MODEL, running_server

TITLE = "prefixes cached under other keys and salts"
TARGET = "1,000 cross-salt probes: 0 hits"
KEYS = ("key-of-one", "key-of-another")
OWNERS = [(key, salt) for key in KEYS for salt in (None, "a", "b", "a\x00", "ab")]
PROMPT_TOKENS = 64
# Each probe that must miss is checked against one that must hit, so that a cache that never hits cannot pass.
MIN_OWN_HITS = 0.9


def run(scale: Scale, seed: int) -> Outcome:
    rng, found = random.Random(seed), Findings("G15")
    flags = [flag for key in KEYS for flag in ("--api-key", key)]
    own = own_hits = hits = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), *flags) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        while found.num_cases < scale.of(1_000, 60):
            prompt = [rng.randrange(10, 900) for _ in range(PROMPT_TOKENS)]
            owner, *strangers = rng.sample(OWNERS, 5)
            _cached(client, prompt, owner)
            for stranger in strangers:
                found.num_cases += 1
                probe = [*prompt[: rng.randrange(PROMPT_TOKENS // 2, PROMPT_TOKENS)], 5]
                if cached := _cached(client, probe, stranger):
                    hits += 1
                    found.fail(f"{stranger} was served {cached} tokens that {owner} had cached")
            own += 1
            own_hits += _cached(client, prompt, owner) > 0
    if own_hits < own * MIN_OWN_HITS:
        found.fail(f"only {own_hits} of {own} requests hit what their own owner had cached: the probes prove nothing")
    return found.outcome(f"{found.num_cases:,} probes: {hits} hits; {own_hits} of {own} of the owners' own")


def _cached(client: httpx.Client, prompt: list[int], owner: tuple[str, str | None]) -> int:
    """Tokens of the prompt that the server had in its cache for this owner."""
    key, salt = owner
    body: dict[str, Any] = {"model": DEMO_MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    if salt is not None:
        body["cache_salt"] = salt
    answer = client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    answer.raise_for_status()
    cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached
