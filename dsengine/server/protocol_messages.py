"""Messages of a conversation and the functions a model may call, as clients send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dsengine.server.protocol_base import INTEGRAL, MAX_INT, Strict, contradiction, unsupported

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOOLS = 512
MAX_CALLS_IN_MESSAGE = MAX_MESSAGES  # calls that other APIs have as messages of their own become those of one

FunctionName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:/-]+$")]
CallId = Annotated[str, Field(min_length=1, max_length=256)]


class ContentPart(BaseModel):
    """One part of a message's content; text is the only kind this server reads."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _text_only(self) -> Self:
        if self.type != "text":
            raise PydanticCustomError("unsupported", "content of this type is not supported: the model reads text only")
        if self.text is None:
            raise PydanticCustomError("missing", "a content part of type text needs a text")
        return self


class CalledFunction(Strict):
    # Whatever name a model has made up comes back in the history.
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class ToolCall(Strict):
    """A call in the history; clients send back what they got, the index of a streamed one included."""

    id: CallId | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int, Field(ge=0, le=MAX_INT), INTEGRAL] | None = None


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS_IN_MESSAGE, fail_fast=True)] | None = None
    tool_call_id: CallId | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None
    prefix: bool | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content or self.refusal or ""

    @property
    def reasoning_text(self) -> str | None:
        return self.reasoning if self.reasoning_content is None else self.reasoning_content

    @model_validator(mode="before")
    @classmethod
    def _no_function_role(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("role") == "function":
            raise unsupported("role", " when it is function; use tool")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("audio", "function_call"):
            if getattr(self, name):
                raise unsupported(name)
        if self.tool_calls and self.role != "assistant":
            raise contradiction("tool_calls belong into messages of the role assistant")
        if self.tool_call_id is not None and self.role != "tool":
            raise contradiction("tool_call_id belongs into messages of the role tool")
        if self.prefix and self.role != "assistant":
            raise contradiction("prefix belongs into a message of the role assistant", "prefix")
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "content is required for messages of this role")
        return self


class FunctionDefinition(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function offered to the model."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    name: FunctionName


class NamedTool(Strict):
    """The choice of one function."""

    type: Literal["function"]
    function: NamedFunction


class AllowedToolSet(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedTools(Strict):
    """The choice of some functions, while the model is told of all: the prompt stays the same from turn to turn."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolSet


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


class ToolOptions(Strict):
    """Which functions the model may, must or must not call."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def offered_tools(self) -> list[Tool]:
        """The functions the model is told of: none if it must not call any."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def must_call(self) -> bool:
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def callable_tools(self) -> list[Tool]:
        """The functions that the choice leaves."""
        chosen = self._chosen_names()
        return [tool for tool in self.offered_tools if not chosen or tool.function.name in chosen]

    def _chosen_names(self) -> list[str]:
        """The functions that the choice names, if it names any."""
        match self.tool_choice:
            case NamedTool():
                return [self.tool_choice.function.name]
            case AllowedTools():
                return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return []

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) != len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise contradiction(f"tools holds two functions called {twice}", "tools")
        if self.must_call and not names:
            raise contradiction("tool_choice asks for a call, but there are no tools", "tool_choice")
        for name in self._chosen_names():
            if name not in names:
                raise contradiction(f"tool_choice names {name}, which is not among the tools", "tool_choice")
        return self
