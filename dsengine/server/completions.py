"""/v1/completions: raw prompts, as text or token ids, continued.

As for chat, there is one path: chunks; the answer that is not streamed is their sum.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from dsengine.engine.messages import TokenLogprob
from dsengine.server.errors import invalid
from dsengine.server.fim import fim_prompt
from dsengine.server.generation import Delta, Job
from dsengine.server.grammar.shapes import output_shape
from dsengine.server.logprobs import CompletionLogprobs, prompt_logprobs
from dsengine.server.protocol import CompletionRequest, UsageIn
from dsengine.server.responses import EventStream, json_response
from dsengine.server.service import Service, new_id
from dsengine.server.usage import Usage

# OpenAI's default for this route.
_DEFAULT_MAX_TOKENS = 16


async def completions(service: Service, request: CompletionRequest) -> Response:
    """Continue the prompts of one request.

    Raises:
        ApiError: the request cannot be run, or failed.
    """
    service.check_model(request.model)
    prompts = await _token_ids(service, request)
    asked = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    params = service.sampling_params(
        request,
        # The engine always draws a token; where none was asked for, it is dropped again.
        max_tokens=max(asked, 1),
        logprobs=0 if request.chooses_best and request.logprobs is None else request.logprobs,
        prompt_logprobs=max(wanted) if (wanted := _prompt_logprobs_wanted(request)) else None,
    )
    constraint = await service.constraints.make(output_shape(request), "response_format", thinking=False)
    response_id = new_id("cmpl")
    jobs = service.jobs(response_id, prompts, params, request, constraint)
    completion = _Completion(service, request, response_id, jobs)
    if request.stream:
        chunks = completion.chunks(request.usage_in)
        return EventStream(await anext(chunks), chunks)
    return json_response(await completion.complete())


async def _token_ids(service: Service, request: CompletionRequest) -> list[list[int]]:
    result = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            if not prompt:
                raise invalid("The prompt is empty; it needs at least one character.", "prompt")
            if request.suffix:
                prompt = fim_prompt(service.tokenizer, prompt, request.suffix)
            prompt = await service.tokenize(prompt, "prompt", add_special_tokens=True)
        service.check_prompt(prompt, "prompt")
        result.append(prompt)
        await asyncio.sleep(0)  # other requests have their turn between the prompts of a long list
    return result


def _prompt_logprobs_wanted(request: CompletionRequest) -> list[int]:
    """How many alternatives are wanted of the prompt's tokens, by each of the fields that ask for any."""
    echoed = request.logprobs if request.echo else None
    return [value for value in (request.prompt_logprobs, echoed) if value is not None]


class _Completion:
    """One request's continuations on their way."""

    def __init__(self, service: Service, request: CompletionRequest, response_id: str, jobs: list[Job]) -> None:
        self._service = service
        self._jobs = jobs
        self._request = request
        n = request.num_sequences
        self._choices = [_Choice(i, service, request, job, request.prompts[i // n]) for i, job in enumerate(jobs)]
        self._head = {
            "id": response_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model,
        }
        self._usage = Usage([job.prompt_token_ids for job in jobs[::n]], n)

    async def chunks(self, usage_in: UsageIn) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of the stream, without the final `[DONE]`."""
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                yield {**self._head, "choices": [piece], **self._usage.of_chunk(usage_in)}
        if usage_in != "none":
            yield {**self._head, "choices": [], "usage": self._usage.body()}

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        sums: list[dict[str, Any]] = [{"index": i, "text": "", "logprobs": None} for i in range(len(self._jobs))]
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                _add(sums[piece["index"]], piece)
        if self._request.chooses_best:
            sums = self._best_of(sums)
        return {**self._head, "choices": sums, "usage": self._usage.body()}

    def _best_of(self, sums: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of each prompt's continuations the `n` whose tokens are likeliest on average, best first."""
        each, kept = self._request.num_sequences, self._request.n or 1
        best: list[dict[str, Any]] = []
        for first in range(0, len(sums), each):
            group = range(first, first + each)
            best += [sums[i] for i in sorted(group, key=lambda i: -self._choices[i].mean_logprob)[:kept]]
        return [choice | {"index": index} for index, choice in enumerate(best)]

    async def _pieces(self) -> AsyncGenerator[dict[str, Any], None]:
        async with contextlib.aclosing(self._service.run(self._jobs)) as deltas:
            async for delta in deltas:
                choice = self._choices[delta.index]
                kept = choice.keep(delta)
                self._usage.add(kept)
                for piece in choice.advance(kept):
                    yield piece


class _Choice:
    """One continuation: turns deltas into chunks."""

    def __init__(
        self, index: int, service: Service, request: CompletionRequest, job: Job, prompt: str | list[int]
    ) -> None:
        self._index = index
        self._job = job
        self._echo: str | None = None
        if request.echo:
            self._echo = (
                prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt, job.params.skip_special_tokens)
            )
        self._only_echo = request.max_tokens == 0
        self._logprobs: CompletionLogprobs | None = None
        if request.logprobs is not None:
            skip = job.params.skip_special_tokens
            self._logprobs = CompletionLogprobs(service.tokenizer, skip_special_tokens=skip)
        self._tokenizer = service.tokenizer
        self._prompt_logprobs: list[dict[str, Any] | None] | None = None
        self._wants_prompt_logprobs = request.prompt_logprobs is not None
        self._num_top_echoed = request.logprobs or 0
        self._logprob_sum, self._num_scored = 0.0, 0
        self._tokens: list[int] = []
        self._entries: list[TokenLogprob | None] = []

    @property
    def mean_logprob(self) -> float:
        return self._logprob_sum / self._num_scored if self._num_scored else -math.inf

    def keep(self, delta: Delta) -> Delta:
        """The delta as the client asked for it: without the one token that nobody wanted."""
        if self._only_echo:
            delta.text, delta.token_ids, delta.logprobs, delta.finish_reason = "", [], [], "length"
        return delta

    def advance(self, delta: Delta) -> Iterator[dict[str, Any]]:
        text = delta.text
        self._logprob_sum += sum(entry.logprob for entry in delta.logprobs)
        self._num_scored += len(delta.logprobs)
        if self._wants_prompt_logprobs and delta.prompt_logprobs is not None:
            self._prompt_logprobs = prompt_logprobs(self._tokenizer, delta.prompt_logprobs)
        if self._echo is not None:
            text, self._echo = self._echo + text, None
            if self._logprobs is not None:
                entries = delta.prompt_logprobs or []
                self._take(self._job.prompt_token_ids, [_with_top(e, self._num_top_echoed) for e in entries])
        if self._logprobs is not None:
            self._take(delta.token_ids, delta.logprobs)
        if text or delta.finish_reason is not None:
            yield {
                "index": self._index,
                "text": text,
                "logprobs": self._give(),
                "finish_reason": delta.finish_reason,
                "stop_reason": delta.stop_reason,
                **self._scored_prompt(),
            }

    def _scored_prompt(self) -> dict[str, Any]:
        return {} if self._prompt_logprobs is None else {"prompt_logprobs": self._prompt_logprobs}

    def _take(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> None:
        self._tokens.extend(token_ids)
        self._entries.extend(entries)

    def _give(self) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        tokens, self._tokens = self._tokens, []
        entries, self._entries = self._entries, []
        return self._logprobs.take(tokens, entries)


def _with_top(entry: TokenLogprob | None, num_top: int) -> TokenLogprob | None:
    return None if entry is None else msgspec.structs.replace(entry, top=entry.top[:num_top])


def _add(total: dict[str, Any], piece: dict[str, Any]) -> None:
    total["text"] += piece["text"]
    if "prompt_logprobs" in piece:
        total["prompt_logprobs"] = piece["prompt_logprobs"]
    total["finish_reason"], total["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
    if piece["logprobs"] is None:
        return
    if total["logprobs"] is None:
        total["logprobs"] = piece["logprobs"]
        return
    for name, values in piece["logprobs"].items():
        total["logprobs"][name].extend(values)
