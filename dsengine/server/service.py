"""What the routes share: the engine, the checks of a prompt, and the way from a request's fields to sequences."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import hmac
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import Any, TypeVar

import msgspec

from dsengine.async_engine import AsyncEngine, EngineDeadError
from dsengine.config import ServerConfig
from dsengine.engine.constraint import Constraint
from dsengine.engine.messages import CallName
from dsengine.engine.sampling_params import SamplingParams, with_child_seed
from dsengine.server import errors
from dsengine.server.conversation import cut_behind, template_messages, template_tools
from dsengine.server.generation import Delta, Generation, Job
from dsengine.server.grammar.constraints import Constraints
from dsengine.server.lifecycle import Lifecycle
from dsengine.server.metrics import Metrics
from dsengine.server.protocol import ChatCompletionRequest, CompletionRequest, TokenizeRequest
from dsengine.server.protocol_messages import ChatMessage, ToolOptions
from dsengine.server.request_record import RequestRecord
from dsengine.server.tools.formats import PARSERS, describes_tools, detect_format, with_description
from dsengine.server.tools.parser import MAX_CALLS, ToolCallParser

T = TypeVar("T")

DEMO_MODEL = "dsengine-demo"

# Text longer than this is rendered and tokenised in a thread: 16 KiB take about 10 ms.
_INLINE_CHARS = 16 * 1024
_TOKENIZER_THREADS = 2
_MAX_SEQUENCES = 1024
_CALL_SECONDS = 10.0

# SamplingParams fields that a request may set under the same name.
_PLAIN_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


class Service:
    """One engine and the state around it.

    Attributes:
        model: the name clients use.
        created: Unix time of the server's start, which the API reports as the model's.
        constraints: of outputs, where requests ask for any.
        tool_format: wire format of the model's calls, None if none is known.
    """

    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        self.engine = engine
        self.config = config
        self.tokenizer = engine.tokenizer
        self.model = config.served_model_name or _model_name(engine.config.model)
        self.created = int(time.time())
        self.tool_format = config.tool_call_parser or detect_format(self.tokenizer)
        self.constraints = Constraints(engine)
        self.metrics = Metrics(lambda: engine.stats, time.monotonic)
        self.lifecycle = Lifecycle(self.metrics)
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._key_digest = b""
        self._record: RequestRecord | None = None

    def for_request(self, digest: bytes, record: RequestRecord | None) -> Service:
        """The same, for one request that came with the key of this digest; it is empty where no key is asked for."""
        service = copy.copy(self)
        service._key_digest, service._record = digest, record
        return service

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self.constraints.close()

    def check_model(self, model: str | None) -> None:
        """Raises `ApiError` 404 for a model that is not the one served."""
        if model is not None and model != self.model:
            raise errors.model_not_found(model)

    async def render_chat(self, request: ChatCompletionRequest | TokenizeRequest, messages: list[ChatMessage]) -> str:
        """Prompt text of a conversation.

        Raises:
            ApiError: the template refuses it.
        """
        switch = self.config.thinking if request.thinking_switch is None else request.thinking_switch
        rendered = template_messages(messages)
        tools = template_tools(request.offered_tools)
        continued = messages[-1].text if request.continues(messages) else None
        opens_turn = continued is None and request.add_generation_prompt is not False

        def render() -> str:
            template = self.tokenizer.chat_template
            described = self._describe(rendered, tools) if tools and not describes_tools(template.source) else rendered
            text = template.render(described, tools=tools, thinking=switch, add_generation_prompt=opens_turn)
            return text if continued is None else cut_behind(text, continued)

        if tools and self.tool_format is None:
            raise errors.invalid(
                "this model has no known format of function calls (the server's --tool-call-parser names one)", "tools"
            )
        try:
            return await self._off_loop(render, _num_chars(rendered) + _num_chars(tools))
        except ValueError as error:
            raise errors.invalid(str(error), "messages") from error

    def _describe(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert self.tool_format is not None
        return with_description(messages, tools, self.tool_format)

    def tool_parser(self, request: ToolOptions) -> ToolCallParser | None:
        """A parser for one answer; None if no functions are offered."""
        if not request.offered_tools or self.tool_format is None:
            return None
        return PARSERS[self.tool_format](1 if request.parallel_tool_calls is False else MAX_CALLS)

    async def tokenize(self, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt; text that cannot fit is refused before it is tokenised.

        Raises:
            ApiError: the text is too long for the context, or no valid Unicode.
        """
        limit = self.engine.info.context_length
        least = len(text.encode("utf-8", "surrogatepass")) // self.tokenizer.max_token_bytes
        if least > limit:
            raise errors.context_length_exceeded(limit, f"the prompt has at least {least}", param)
        try:
            return await self._off_loop(lambda: self.tokenizer.encode(text, add_special_tokens), len(text))
        except ValueError as error:
            raise errors.invalid(str(error), param) from error

    def check_prompt(self, token_ids: Sequence[int], param: str) -> None:
        """Raises `ApiError` 400 for a prompt that is empty, too long, or holds ids the model does not have."""
        info = self.engine.info
        if not token_ids:
            raise errors.invalid("The prompt is empty; it needs at least one token.", param)
        if len(token_ids) >= info.context_length:
            raise errors.context_length_exceeded(info.context_length, f"the prompt has {len(token_ids)}", param)
        if max(token_ids) >= info.vocab_size:
            raise errors.invalid(f"token id {max(token_ids)} is not in the vocabulary of {info.vocab_size}", param)

    def sampling_params(
        self,
        request: ChatCompletionRequest | CompletionRequest,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """Request before checkpoint before engine defaults.

        Raises:
            ApiError: values that contradict each other, or token ids the model does not have.
        """
        chosen: dict[str, Any] = dict(self.tokenizer.sampling_defaults)
        for name in _PLAIN_FIELDS:
            if (value := getattr(request, name)) is not None:
                chosen[name] = value
        bias = {int(token): float(value) for token, value in (request.logit_bias or {}).items()}
        stop_ids = tuple(dict.fromkeys(request.stop_token_ids or ()))
        self._check_ids(bias, "logit_bias")
        self._check_ids(stop_ids, "stop_token_ids")
        try:
            return SamplingParams(
                **chosen,
                n=request.num_sequences,
                max_tokens=max_tokens,
                stop=request.stop_strings,
                stop_token_ids=stop_ids,
                logit_bias=bias or None,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
        except ValueError as error:
            raise errors.invalid(str(error)) from error

    def jobs(
        self,
        response_id: str,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        request: ChatCompletionRequest | CompletionRequest,
        constraint: Constraint | None = None,
    ) -> list[Job]:
        """`n` sequences for each prompt, those of one prompt next to each other.

        Raises:
            ApiError: more sequences than this server runs for one request.
        """
        limit = min(_MAX_SEQUENCES, self.engine.config.max_running_requests + self.engine.config.max_queued_requests)
        if params.n > self.engine.config.max_running_requests:
            raise errors.invalid(f"n is {params.n}; this server runs {self.engine.config.max_running_requests}", "n")
        if len(prompts) * params.n > limit:
            raise errors.invalid(f"{len(prompts)} prompts x n {params.n} are more than {limit} sequences", "prompt")
        if self._record is not None:
            self._record.begin(response_id, self.model, params, stream=bool(request.stream))
        salt = self._cache_salt(request.cache_salt or "")
        priority = request.priority or 0
        return [
            Job(f"{response_id}-{p}-{i}", prompt, with_child_seed(fitted, i), priority, salt, constraint)
            for p, prompt in enumerate(prompts)
            for fitted in (self._fit_context(params, len(prompt)),)
            for i in range(params.n)
        ]

    async def run(self, jobs: Sequence[Job]) -> AsyncGenerator[Delta, None]:
        """Deltas of the jobs, ended early by a shutdown; see `Generation`."""
        if self.lifecycle.refusal is not None:
            raise self.lifecycle.refusal
        if self.engine.stats.sleep_level:
            raise errors.asleep()
        generation = Generation(self.engine, jobs, self.metrics, self._record)
        with self.lifecycle.generation(generation):
            async with contextlib.aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    yield delta

    async def call_engine(
        self, name: CallName, argument: str = "", *, seconds: float | None = _CALL_SECONDS
    ) -> dict[str, object]:
        """Ask the engine something outside the request path.

        Raises:
            ApiError: it does not answer (within so many seconds).
        """
        try:
            async with asyncio.timeout(seconds):
                return await self.engine.call(name, argument)
        except (EngineDeadError, TimeoutError) as error:
            raise errors.engine_unavailable() from error

    def _fit_context(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        # Asking for more than there is room for is common and harmless: the output then ends with "length".
        room = self.engine.info.context_length - num_prompt_tokens
        if params.min_tokens > room:
            raise errors.invalid(f"min_tokens is {params.min_tokens}; the context has room for {room}", "min_tokens")
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        return msgspec.structs.replace(params, max_tokens=limit)

    def _cache_salt(self, salt: str) -> str:
        # Prefixes cached for one key must not show, by their timing, to holders of another.
        return hmac.new(self._key_digest, salt.encode(), hashlib.sha256).hexdigest() if self._key_digest else salt

    def _check_ids(self, token_ids: Sequence[int] | dict[int, float], param: str) -> None:
        size = self.engine.info.vocab_size
        for token_id in token_ids:
            if token_id >= size:
                raise errors.invalid(f"{param} names token id {token_id}; the vocabulary has {size}", param)

    async def _off_loop(self, work: Callable[[], T], num_chars: int) -> T:
        if num_chars <= _INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _num_chars(value: Any) -> int:
    """Characters of all texts in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _num_chars(item) for key, item in value.items())
    return sum(map(_num_chars, value)) if isinstance(value, list) else 0


def _model_name(model: str | None) -> str:
    if model is None:
        return DEMO_MODEL
    # A local folder's path is nobody's business; a hub name has the form owner/name.
    is_path = PurePath(model).is_absolute() or model.startswith((".", "~"))
    return PurePath(model).name if is_path else model
