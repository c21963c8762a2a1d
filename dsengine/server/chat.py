"""/v1/chat/completions: messages in, an answer with its reasoning and its calls split off out.

There is one path: chunks, as streaming sends them. The answer that is not streamed is their sum.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.responses import Response

from dsengine.engine.messages import TokenLogprob
from dsengine.server.generation import Delta, Job
from dsengine.server.grammar.shapes import answer_shape, output_shape
from dsengine.server.logprobs import chat_logprobs, prompt_logprobs
from dsengine.server.protocol import ChatCompletionRequest, UsageIn
from dsengine.server.reasoning import ReasoningSplitter
from dsengine.server.responses import EventStream, json_response
from dsengine.server.service import Service, new_id
from dsengine.server.tools.calls import CallDeltas, CallSum
from dsengine.server.tools.parser import ToolCallParser
from dsengine.server.usage import Usage
from dsengine.tokenizer.chat_template import END_THINK_TOKEN, ends_in_thinking


async def chat_completions(service: Service, request: ChatCompletionRequest) -> Response:
    """Answer one request.

    Raises:
        ApiError: the request cannot be run, or failed.
    """
    chat = await start_chat(service, request, new_id("chatcmpl"))
    if request.stream:
        chunks = chat.chunks(request.usage_in)
        # The first chunk tells whether the engine took the request: until then an error still has its own status.
        return EventStream(await anext(chunks), chunks)
    return json_response(await chat.complete())


async def start_chat(service: Service, request: ChatCompletionRequest, response_id: str) -> Chat:
    """Everything up to the engine: template, tokens, constraint.

    Raises:
        ApiError: the request cannot be run.
    """
    service.check_model(request.model)
    prompt = await service.render_chat(request, request.messages)
    token_ids = await service.tokenize(prompt, "messages", add_special_tokens=False)
    service.check_prompt(token_ids, "messages")
    params = service.sampling_params(
        request,
        max_tokens=request.token_limit,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
    )
    thinking = ends_in_thinking(prompt)
    shape = answer_shape(request, output_shape(request), service.tool_format, service.tokenizer)
    param = "tools" if request.offered_tools else "response_format"
    constraint = await service.constraints.make(shape, param, thinking=thinking)
    jobs = service.jobs(response_id, [token_ids], params, request, constraint)
    return Chat(service, request, response_id, jobs, thinking=thinking)


class Chat:
    """One request's answer on its way.

    Attributes:
        usage: complete when the answer is.
    """

    def __init__(
        self, service: Service, request: ChatCompletionRequest, response_id: str, jobs: list[Job], *, thinking: bool
    ) -> None:
        self._service = service
        self._jobs = jobs
        self._thinking = thinking
        self._choices = [
            _Choice(i, service, service.tool_parser(request), thinking=thinking, logprobs=bool(request.logprobs))
            for i in range(len(jobs))
        ]
        self._head = {"id": response_id, "created": int(time.time()), "model": service.model}
        self.usage = Usage([jobs[0].prompt_token_ids], len(jobs))
        self._prompt_logprobs: list[dict[str, Any] | None] | None = None

    async def chunks(self, usage_in: UsageIn) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of the stream, without the final `[DONE]`."""
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                yield {
                    **self._head,
                    "object": "chat.completion.chunk",
                    "choices": [piece],
                    **self.usage.of_chunk(usage_in),
                }
        if usage_in != "none":
            last = {"choices": [], "usage": self.usage.body()}
            yield {**self._head, "object": "chat.completion.chunk", **last}

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [_Sum(i) for i in range(len(self._jobs))]
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                choices[piece["index"]].add(piece)
        bodies = [choice.body() for choice in choices]
        answer = {**self._head, "object": "chat.completion", "choices": bodies, "usage": self.usage.body()}
        return answer if self._prompt_logprobs is None else answer | {"prompt_logprobs": self._prompt_logprobs}

    async def pieces(self) -> AsyncGenerator[dict[str, Any], None]:
        """The entries of `choices` in the chunks of the stream."""
        opened = False
        async with contextlib.aclosing(self._service.run(self._jobs)) as deltas:
            async for delta in deltas:
                choice = self._choices[delta.index]
                self.usage.add(delta)
                if delta.index == 0 and delta.prompt_logprobs is not None:
                    self._prompt_logprobs = prompt_logprobs(self._service.tokenizer, delta.prompt_logprobs)
                if not opened:
                    opened = True
                    for each in self._choices:
                        yield each.opening()
                pieces = list(choice.advance(delta))
                self.usage.reasoning_tokens = sum(each.reasoning_tokens for each in self._choices)
                for piece in pieces:
                    yield piece


class _Choice:
    """One continuation: turns deltas of text into chunks of reasoning, content and calls."""

    def __init__(
        self, index: int, service: Service, parser: ToolCallParser | None, *, thinking: bool, logprobs: bool
    ) -> None:
        self.reasoning_tokens = 0
        self._index = index
        self._tokenizer = service.tokenizer
        self._thinking = thinking
        self._splitter = ReasoningSplitter(thinking, parser.openers if parser is not None else ())
        self._end_think = service.tokenizer.token_id(END_THINK_TOKEN)
        self._parser = parser
        self._calls = CallDeltas()
        self._has_answer = False
        self._logprobs: list[TokenLogprob] | None = [] if logprobs else None

    def opening(self) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        if self._thinking:
            delta |= {"content": None} | _reasoning("")
        return self._piece(delta)

    def advance(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if self._logprobs is not None:
            self._logprobs.extend(delta.logprobs)
        parts = self._parse(delta)
        for number, part in enumerate(parts, start=1):
            yield self._piece(part, take_logprobs=number == len(parts))
        if delta.finish_reason is not None:
            yield self._end(delta)

    def _parse(self, delta: Delta) -> list[dict[str, Any]]:
        """The delta in parts of one kind each."""
        was_reasoning = self._splitter.in_reasoning
        reasoning, text = self._splitter.push(delta.text)
        if delta.finish_reason is not None:
            rest = self._splitter.finish()
            reasoning, text = reasoning + rest[0], text + rest[1]
        if was_reasoning or reasoning:
            self._count_reasoning(delta.token_ids)
        answer = self._answer(text, finished=delta.finish_reason is not None)
        self._has_answer = self._has_answer or bool(answer)
        return [_reasoning(reasoning), *answer] if reasoning else answer

    def _answer(self, text: str, *, finished: bool) -> list[dict[str, Any]]:
        if self._parser is None:
            return [{"content": text}] if text else []
        deltas = self._calls.of(self._parser.push(text))
        return deltas + self._calls.of(self._parser.finish()) if finished else deltas

    def _end(self, delta: Delta) -> dict[str, Any]:
        # Reasoning that was closed has an answer, if an empty one; reasoning that was cut off has none.
        closed = self._thinking and not self._splitter.in_reasoning and not self._has_answer
        has_calls = self._parser is not None and self._parser.num_calls > 0
        reason = "tool_calls" if has_calls and delta.finish_reason == "stop" else delta.finish_reason
        return self._piece({"content": ""} if closed else {}, take_logprobs=True) | {
            "finish_reason": reason,
            "stop_reason": delta.stop_reason,
        }

    def _count_reasoning(self, token_ids: list[int]) -> None:
        end = token_ids.index(self._end_think) + 1 if self._end_think in token_ids else len(token_ids)
        self.reasoning_tokens += end

    def _piece(self, delta: dict[str, Any], *, take_logprobs: bool = False) -> dict[str, Any]:
        logprobs = None
        if take_logprobs and self._logprobs:
            logprobs = chat_logprobs(self._tokenizer, self._logprobs)
            self._logprobs = []
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _reasoning(text: str) -> dict[str, Any]:
    # DeepSeek's name of the field, and the one that other servers have since taken to.
    return {"reasoning_content": text, "reasoning": text}


class _Sum:
    """What the chunks of one choice add up to."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._texts: dict[str, list[str]] = {}
        self._calls = CallSum()
        self._logprobs: dict[str, Any] | None = None
        self._last: dict[str, Any] = {}

    def add(self, piece: dict[str, Any]) -> None:
        for name in ("content", "reasoning_content"):
            if (text := piece["delta"].get(name)) is not None:
                self._texts.setdefault(name, []).append(text)
        self._calls.add(piece["delta"].get("tool_calls", ()))
        if piece["logprobs"] is not None:
            if self._logprobs is None:
                self._logprobs = piece["logprobs"]
            else:
                self._logprobs["content"].extend(piece["logprobs"]["content"])
        self._last = piece

    def body(self) -> dict[str, Any]:
        texts = {name: "".join(parts) for name, parts in self._texts.items()}
        message: dict[str, Any] = {"role": "assistant", "content": texts.get("content"), "refusal": None}
        if "reasoning_content" in texts:
            message |= _reasoning(texts["reasoning_content"])
        if calls := self._calls.body():
            message |= {"content": texts.get("content") or None, "tool_calls": calls}
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs,
            "finish_reason": self._last["finish_reason"],
            "stop_reason": self._last["stop_reason"],
        }
