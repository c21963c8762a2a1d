"""A scripted engine for tests of the HTTP layer alone, and small conveniences for its clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from dsengine.async_engine import EngineDeadError, QueueFullError, Sequence, Sink
from dsengine.config import EngineConfig, ServerConfig
from dsengine.demo import CHECKPOINT_DIR
from dsengine.engine.constraint import Constraint
from dsengine.engine.messages import EngineInfo, EngineStats, FinishReason, RequestUpdate, TokenLogprob
from dsengine.engine.sampling_params import SamplingParams
from dsengine.server.app import App, create_app
from dsengine.tokenizer.tokenizer import Tokenizer

CONTEXT_LENGTH = 512
MODEL = "scripted"

Script = Callable[[list[int], SamplingParams], str]


class ScriptedEngine:
    """Answers every prompt with the tokens of a script, a given number per update.

    Attributes:
        running: ids of sequences that are being answered; empty again when nothing has leaked.
        seen: every sequence ever asked for, with its parameters.
        hold_at: sequences stop before the update of this number until `resume` is set; `num_held` of them have.
        die_at: the engine dies before the update of this number.
        refusal: raised for every request.
    """

    def __init__(
        self, tokenizer: Tokenizer, script: str | Script = "Hello there.", *, tokens_per_update: int = 1
    ) -> None:
        self.tokenizer = tokenizer
        self.checkpoint = CHECKPOINT_DIR
        self.config = EngineConfig(model=MODEL, max_running_requests=64, max_queued_requests=64)
        self.info = EngineInfo(
            model=MODEL,
            context_length=CONTEXT_LENGTH,
            block_size=16,
            num_blocks=64,
            vocab_size=tokenizer.vocab_size + 8,
            dtype="float32",
            device="cpu",
            kernels={"mla_decode": "ref"},
            load_seconds=0.0,
        )
        self.script: Script = script if callable(script) else lambda ids, params: script
        self.tokens_per_update = tokens_per_update
        self.logprob_of: Callable[[SamplingParams], float] = lambda params: -0.5
        self.is_alive = True
        self.stats = EngineStats(num_blocks=64)
        self.running: set[str] = set()
        self.constraints: dict[str, Constraint | None] = {}
        self.seen: dict[str, tuple[list[int], SamplingParams, str]] = {}
        self.hold_at: int | None = None
        self.num_held = 0
        self.resume = asyncio.Event()
        self.refusal: Exception | None = None
        self.die_at: int | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start_sequence(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        sink: Sink,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
        constraint: Constraint | None = None,
    ) -> Sequence:
        if not self.is_alive:
            raise EngineDeadError("dead")
        if self.refusal is not None:
            raise self.refusal
        self.constraints[request_id] = constraint
        self.seen[request_id] = (prompt_token_ids, params, cache_salt)
        self.running.add(request_id)
        sequence = Sequence(request_id, sink, self._leave)
        updates = self._updates(request_id, prompt_token_ids, params)
        self._tasks[request_id] = asyncio.create_task(self._play(sequence, updates))
        return sequence

    def _leave(self, sequence: Sequence) -> None:
        self.running.discard(sequence.request_id)
        task = self._tasks.pop(sequence.request_id, None)
        if task is not None and not sequence.is_finished:
            task.cancel()

    async def _play(self, sequence: Sequence, updates: list[RequestUpdate]) -> None:
        for number, update in enumerate(updates):
            await asyncio.sleep(0)
            if number == self.hold_at:
                self.num_held += 1
                await self.resume.wait()
            if number == self.die_at:
                self.is_alive = False
                sequence.put(EngineDeadError("dead"))
                return
            sequence.put(update)

    def _updates(self, request_id: str, prompt: list[int], params: SamplingParams) -> list[RequestUpdate]:
        ids = self.tokenizer.encode(self.script(prompt, params))
        finish: FinishReason = "stop"
        ids.append(min(self.tokenizer.eos_token_ids))
        if params.max_tokens is not None and len(ids) > params.max_tokens:
            ids, finish = ids[: params.max_tokens], "length"
        groups = [tuple(ids[i : i + self.tokens_per_update]) for i in range(0, len(ids), self.tokens_per_update)]
        first_logprobs = None
        if params.prompt_logprobs is not None:
            first_logprobs = (None, *(_logprob(i, params.prompt_logprobs) for i in prompt[1:]))
        return [
            RequestUpdate(
                request_id,
                group,
                finish if number == len(groups) - 1 else None,
                cached_tokens=3,
                logprobs=tuple(_logprob(i, params.logprobs, self.logprob_of(params)) for i in group)
                if params.logprobs is not None
                else (),
                prompt_logprobs=first_logprobs if number == 0 else None,
            )
            for number, group in enumerate(groups)
        ]

    async def call(self, name: str, argument: str = "") -> dict[str, object]:
        if not self.is_alive:
            raise EngineDeadError("dead")
        return {"flushed": True} if name == "flush_cache" else {"num_blocks_in_use": 0}


def _logprob(token_id: int, num_top: int, value: float = -0.5) -> TokenLogprob:
    top = tuple((token_id if i == 0 else (token_id + i) % 1000, -0.5 - i) for i in range(num_top))
    return TokenLogprob(token_id, value, 1, top)


def make_app(engine: ScriptedEngine, **options: Any) -> App:
    return create_app(engine, ServerConfig(**options))  # type: ignore[arg-type]


def client_of(app: App, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test", timeout=20, **options)


__all__ = ["CHECKPOINT_DIR", "CONTEXT_LENGTH", "MODEL", "QueueFullError", "ScriptedEngine", "client_of", "make_app"]
