"""Requests of OpenAI's Responses API, as requests of a chat. Nothing is stored: every request brings its whole past."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsengine.engine.sampling_params import MAX_TOP_LOGPROBS
from dsengine.server.errors import validation_failed
from dsengine.server.protocol import ChatCompletionRequest, ReasoningEffort
from dsengine.server.protocol_base import (
    INTEGRAL,
    MAX_INT,
    ModelName,
    Strict,
    check_verbosity,
    contradiction,
    unsupported,
)
from dsengine.server.protocol_messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, CallId, FunctionName


class _Item(BaseModel):
    """Items come back as they were sent, with ids and states that mean nothing to a stateless server."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(_Item):
    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str


Parts = str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: CallId
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class FunctionOutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: CallId
    output: Parts


class ReasoningItem(_Item):
    type: Literal["reasoning"]
    content: Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None


InputItem = FunctionCallItem | FunctionOutputItem | ReasoningItem | MessageItem


class ResponseTool(Strict):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedResponseTool(Strict):
    type: Literal["function"]
    name: FunctionName


class AllowedResponseTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedResponseTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_verbosity(self.verbosity)
        return self


class ReasoningOptions(Strict):
    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("summary", "generate_summary"):
            if getattr(self, name) not in (None, "auto"):
                raise unsupported(name, " except for auto: reasoning is given whole")
        return self


class ResponseStreamOptions(Strict):
    include_obfuscation: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.include_obfuscation:
            raise unsupported("include_obfuscation", " except for false")
        return self


# The first acts. Encrypted reasoning is not needed where it is given in plain text; the others tell more of tools that
# run at OpenAI, of which there are none here.
Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponsesRequest(Strict):
    model: ModelName
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), INTEGRAL] | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | AllowedResponseTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None

    include: Annotated[list[Included], Field(max_length=64)] | None = None
    stream_options: ResponseStreamOptions | None = None

    # Accepted without effect: they concern OpenAI's own service and the tools that it runs.
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    max_tool_calls: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    truncation: Literal["auto", "disabled"] | None = None

    # Known, and refused: nothing is stored.
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("background", "previous_response_id", "conversation", "prompt"):
            if getattr(self, name):
                raise unsupported(name, ": nothing is stored between requests")
        if self.truncation == "auto":
            raise unsupported("truncation", " except for disabled")
        if self.top_logprobs and "message.output_text.logprobs" not in (self.include or []):
            raise contradiction("top_logprobs needs message.output_text.logprobs in include", "top_logprobs")
        wanted = self.text.format if self.text is not None else None
        if wanted is not None and (wanted.type == "json_schema") != (wanted.schema_ is not None):
            raise contradiction("a format of type json_schema needs a schema, others have none", "text.format")
        return self


def as_chat(request: ResponsesRequest) -> ChatCompletionRequest:
    """The same request to chat completions.

    Raises:
        ApiError: it makes no chat.
    """
    given: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_output_tokens,
        "parallel_tool_calls": request.parallel_tool_calls,
        "reasoning_effort": request.reasoning.effort if request.reasoning is not None else None,
        "response_format": _response_format(request),
        "tool_choice": _tool_choice(request),
        "stream": request.stream,
    }
    if request.tools:
        given["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in request.tools
        ]
    if request.include and "message.output_text.logprobs" in request.include:
        given |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    fields = {"model": request.model, "messages": _messages(request)}
    try:
        return ChatCompletionRequest.model_validate(
            fields | {name: value for name, value in given.items() if value is not None}
        )
    except ValidationError as error:
        raise validation_failed(error.errors()) from error


def _tool_choice(request: ResponsesRequest) -> Any:
    choice = request.tool_choice
    if isinstance(choice, NamedResponseTool):
        return _named(choice)
    if isinstance(choice, AllowedResponseTools):
        allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
        return {"type": choice.type, "allowed_tools": allowed}
    return choice


def _named(tool: NamedResponseTool) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name}}


def _response_format(request: ResponsesRequest) -> dict[str, Any] | None:
    if request.text is None or request.text.format is None:
        return None
    wanted = request.text.format
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    return {"type": "json_schema", "json_schema": {"schema": wanted.schema_, "strict": wanted.strict}}


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    # Reasoning, text and calls of one turn are items of their own here, and one message there.
    turn: dict[str, Any] | None = None
    for item in request.input:
        if isinstance(item, FunctionOutputItem):
            turn = None
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            turn = None
            messages.append({"role": item.role, "content": _text(item.content)})
        else:
            if turn is None:
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            _add_to_turn(turn, item)
    return messages


def _add_to_turn(turn: dict[str, Any], item: MessageItem | FunctionCallItem | ReasoningItem) -> None:
    if isinstance(item, MessageItem):
        turn["content"] += _text(item.content)
    elif isinstance(item, ReasoningItem):
        turn["reasoning_content"] = turn.get("reasoning_content", "") + _text(item.content or "")
    else:
        function = {"name": item.name, "arguments": item.arguments}
        turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
