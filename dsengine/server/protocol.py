"""The requests of the API, with their bounds.

Strict: a string is no number, `true` is no integer, an unknown field is an error that names it. Fields of OpenAI's API
that would change the answer but are not supported are refused with a message that says so; fields that concern OpenAI's
own service (`user`, `metadata`, `store` …) are accepted without effect. Every bound is closed, so that no request can
ask for unbounded work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dsengine.engine.sampling_params import MAX_TOP_LOGPROBS
from dsengine.server.protocol_base import (
    INTEGRAL,
    INTEGRAL_ITEMS,
    MAX_INT,
    ModelName,
    Strict,
    TokenId,
    check_verbosity,
    contradiction,
    unsupported,
)
from dsengine.server.protocol_formats import OutputOptions, check_enforced, check_schema
from dsengine.server.protocol_messages import MAX_MESSAGES, ChatMessage, ToolOptions

MAX_PROMPTS = 256
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024

Prompt = Annotated[list[TokenId], Field(min_length=1, fail_fast=True), INTEGRAL_ITEMS]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


# Which chunks of a stream tell the tokens so far.
UsageIn = Literal["none", "last", "every"]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None

    @model_validator(mode="after")
    def _check_obfuscation(self) -> Self:
        if self.include_obfuscation:
            raise unsupported("include_obfuscation", " except for false")
        return self

    @property
    def usage_in(self) -> UsageIn:
        if not self.include_usage:
            return "none"
        return "every" if self.continuous_usage_stats else "last"


class _Sampling(OutputOptions):
    """What both generating routes share. None means: as the checkpoint recommends, else the engine's default."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128), INTEGRAL] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT), INTEGRAL] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), INTEGRAL] | None = None
    stop: (
        Annotated[str, Field(max_length=MAX_STOP_CHARS)]
        | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
        | None
    ) = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True), INTEGRAL_ITEMS] | None
    ) = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), INTEGRAL] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT), INTEGRAL] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000), INTEGRAL] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None

    @property
    def num_sequences(self) -> int:
        """Continuations to run of each prompt."""
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if isinstance(self.stop, str):
            return (self.stop,) if self.stop else ()
        return tuple(self.stop or ())

    @property
    def usage_in(self) -> UsageIn:
        return self.stream_options.usage_in if self.stream_options is not None else "none"

    @model_validator(mode="after")
    def _check_constraint(self) -> Self:
        # The end of the text is the one thing that a complete output still allows.
        if self.output_format[0] != "text" and (self.ignore_eos or self.min_tokens):
            raise contradiction("ignore_eos and min_tokens do not go together with a constrained output")
        return self

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise contradiction("stream_options may be set only together with stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise contradiction("prompt_logprobs excludes stream", "prompt_logprobs")
        return self


class TemplateOptions(Strict):
    """The switches of a chat template that a client may set."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class ThinkingOption(Strict):
    type: Literal["enabled", "disabled"]


class _ChatInput(ToolOptions):
    """A conversation's tools and the switches of its rendering."""

    chat_template_kwargs: TemplateOptions | None = None
    thinking: ThinkingOption | None = None
    reasoning_effort: ReasoningEffort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def continues(self, messages: Sequence[ChatMessage]) -> bool:
        """Whether the last message is the beginning of the answer (DeepSeek's API marks it with `prefix`)."""
        return bool(self.continue_final_message or (messages and messages[-1].prefix))

    def check_continuation(self, messages: Sequence[ChatMessage]) -> None:
        """Refuse what cannot be continued."""
        if not self.continues(messages):
            return
        if not messages:
            raise contradiction("continue_final_message needs messages", "continue_final_message")
        last = messages[-1]
        if last.role != "assistant" or not last.text.strip() or last.tool_calls:
            raise contradiction("only a text of the assistant at the end can be continued", "messages")
        if self.add_generation_prompt:
            raise contradiction("add_generation_prompt and continue_final_message exclude each other")

    @property
    def thinking_switch(self) -> bool | None:
        """What the request says about thinking, in whichever spelling; None if nothing."""
        return next(iter(self._thinking_wishes().values()), None)

    def _thinking_wishes(self) -> dict[str, bool]:
        options = self.chat_template_kwargs or TemplateOptions()
        wishes = {
            "chat_template_kwargs.thinking": options.thinking,
            "chat_template_kwargs.enable_thinking": options.enable_thinking,
            "thinking": None if self.thinking is None else self.thinking.type == "enabled",
            "reasoning_effort": None if self.reasoning_effort is None else self.reasoning_effort != "none",
        }
        return {name: wish for name, wish in wishes.items() if wish is not None}

    @model_validator(mode="after")
    def _check_thinking(self) -> Self:
        wishes = self._thinking_wishes()
        if len(set(wishes.values())) > 1:
            raise contradiction(f"{' and '.join(wishes)} contradict each other")
        return self


class ChatCompletionRequest(_Sampling, _ChatInput):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), INTEGRAL] | None = None

    # Accepted without effect: they concern OpenAI's own service.
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None

    # Known, and refused where they would change the answer.
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    verbosity: Literal["low", "medium", "high"] | None = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        for name in ("functions", "audio", "prediction", "web_search_options"):
            if getattr(self, name):
                raise unsupported(name)
        check_verbosity(self.verbosity)
        if self.function_call not in (None, "none", "auto"):
            raise unsupported("function_call")
        if self.modalities not in (None, ["text"]):
            raise unsupported("modalities", " except for text")
        return self

    @model_validator(mode="after")
    def _check_calls(self) -> Self:
        if self.must_call and (self.ignore_eos or self.min_tokens):
            raise contradiction("ignore_eos and min_tokens do not go together with a call that must be made")
        if self.must_call and self.output_format[0] != "text":
            raise contradiction("a call that must be made leaves no room for a constrained answer", "tool_choice")
        for tool in self.offered_tools:
            check_schema(tool.function.parameters or {}, "tools")
            if tool.function.strict:
                check_enforced(tool.function.parameters or {}, "tools")
        return self

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        self.check_continuation(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise contradiction("top_logprobs may be set only together with logprobs: true")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise contradiction("max_tokens and max_completion_tokens contradict each other")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Sampling):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Prompt
        | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT), INTEGRAL] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), INTEGRAL] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128), INTEGRAL] | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.suffix and not all(isinstance(prompt, str) for prompt in self.prompts):
            raise contradiction("suffix needs prompts that are texts", "suffix")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise contradiction(f"best_of is {self.best_of}, which is less than n", "best_of")
        if self.chooses_best and self.stream:
            raise contradiction("the best of several can be told only at their end: best_of excludes stream", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise contradiction("max_tokens may be 0 only together with echo: true")
        return self

    @property
    def chooses_best(self) -> bool:
        return self.num_sequences > (self.n or 1)

    @property
    def num_sequences(self) -> int:
        return self.best_of or self.n or 1

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list of texts or a list of token-id lists."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TokenizeRequest(_ChatInput):
    """Text, or a conversation to be rendered first."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise contradiction("give either prompt or messages")
        self.check_continuation(self.messages or [])
        return self


class DetokenizeRequest(Strict):
    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000, fail_fast=True), INTEGRAL_ITEMS]
    skip_special_tokens: bool = False
