"""Requests of Anthropic's Messages API, as requests of a chat."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsengine.server.errors import validation_failed
from dsengine.server.protocol import MAX_STOP_CHARS, MAX_STOP_STRINGS, ChatCompletionRequest
from dsengine.server.protocol_base import INTEGRAL, MAX_INT, ModelName, Strict, contradiction, unsupported
from dsengine.server.protocol_messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, CallId, FunctionName


class _Block(BaseModel):
    """Blocks carry hints for caches and citations that change nothing here; those are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextBlock(_Block):
    type: Literal["text"]
    text: str


class ThinkingBlock(_Block):
    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(_Block):
    type: Literal["redacted_thinking"]


class ToolUseBlock(_Block):
    type: Literal["tool_use"]
    id: CallId
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: dict[str, Any]


class ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: CallId
    content: str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)] = ""
    is_error: bool | None = None


InputBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class InputMessage(Strict):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[InputBlock], Field(max_length=MAX_PARTS, fail_fast=True)]


class AnthropicTool(_Block):
    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class AnthropicToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "tool" and self.name is None:
            raise contradiction("a tool_choice of type tool needs a name", "name")
        return self


class ThinkingConfig(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL] | None = None
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.display == "omitted":
            raise unsupported("display", " as 'omitted': thinking is given whole")
        return self


class _Conversation(Strict):
    model: ModelName
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingConfig | None = None


class CountTokensRequest(_Conversation):
    """What would be the prompt of a message."""


class MessagesRequest(_Conversation):
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT), INTEGRAL]
    stream: bool | None = None
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
            Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
        ]
        | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_INT), INTEGRAL] | None = None

    # Accepted without effect: they concern Anthropic's own service.
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


def as_chat(request: _Conversation) -> ChatCompletionRequest:
    """The same request to chat completions.

    Raises:
        ApiError: it makes no chat.
    """
    fields: dict[str, Any] = {"model": request.model, "messages": _messages(request)}
    fields |= _tools(request)
    # An assistant's text at the end is the beginning of the answer.
    if request.messages[-1].role == "assistant":
        fields["continue_final_message"] = True
    if request.thinking is not None:
        fields["thinking"] = {"type": "disabled" if request.thinking.type == "disabled" else "enabled"}
    if isinstance(request, MessagesRequest):
        given = {name: getattr(request, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "stream")}
        given["stop"] = request.stop_sequences
        fields |= {name: value for name, value in given.items() if value is not None}
    return chat_request(fields)


def chat_request(fields: dict[str, Any]) -> ChatCompletionRequest:
    """A chat's request out of another API's.

    Raises:
        ApiError: it makes none.
    """
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise validation_failed(error.errors()) from error


def _tools(request: _Conversation) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if request.tools:
        fields["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                },
            }
            for tool in request.tools
        ]
    if (choice := request.tool_choice) is not None:
        named = {"type": "function", "function": {"name": choice.name}}
        fields["tool_choice"] = {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return fields


def _messages(request: _Conversation) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.system is not None:
        messages.append({"role": "system", "content": _text(request.system)})
    for message in request.messages:
        messages += _assistant(message) if message.role == "assistant" else _user(message)
    return messages


def _assistant(message: InputMessage) -> list[dict[str, Any]]:
    if isinstance(message.content, str):
        return [{"role": "assistant", "content": message.content}]
    blocks = message.content
    rendered: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(block.text for block in blocks if isinstance(block, TextBlock)),
    }
    if reasoning := "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)):
        rendered["reasoning_content"] = reasoning
    if calls := [block for block in blocks if isinstance(block, ToolUseBlock)]:
        rendered["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.input, ensure_ascii=False)},
            }
            for call in calls
        ]
    return [rendered]


def _user(message: InputMessage) -> list[dict[str, Any]]:
    """A user's turn holds the results of calls, which are messages of their own, and what the user says behind them."""
    if isinstance(message.content, str):
        return [{"role": "user", "content": message.content}]
    results = [block for block in message.content if isinstance(block, ToolResultBlock)]
    rendered: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)} for block in results
    ]
    texts = [block.text for block in message.content if isinstance(block, TextBlock)]
    if texts or not results:
        rendered.append({"role": "user", "content": "".join(texts)})
    return rendered


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)
