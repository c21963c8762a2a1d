"""The demo model's chat format, once as the Jinja template that ships and once as the segments it is trained on.

Training needs to know which characters the assistant wrote, which a rendered template does not tell; so the same
layout (DeepSeek-V3.1's, section 5.2 and 5.3 of its wire format) exists twice and the tests hold the two equal.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
OUTPUTS_BEGIN, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
SEP = "<｜tool▁sep｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
MARKER_TOKENS = (
    THINK, END_THINK, USER, ASSISTANT, CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END,
    OUTPUTS_BEGIN, OUTPUTS_END, OUTPUT_BEGIN, OUTPUT_END, SEP,
)  # fmt: skip

TOOLS_HEADING = "## Tools\nYou can call these functions:\n"
TOOLS_FORMAT = (
    f"\nTo call one, write {CALLS_BEGIN}{CALL_BEGIN}NAME{SEP}ARGUMENTS AS JSON{CALL_END}{CALLS_END} and nothing else."
)

_LAYOUT = """\
{%- if thinking is not defined -%}
{%- set thinking = enable_thinking if enable_thinking is defined else not tools -%}
{%- endif -%}
{%- set ns = namespace(system='', after_tool=false) -%}
{%- for m in messages if m['role'] == 'system' -%}
{%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + m['content'] -%}
{%- endfor -%}
{%- if tools -%}
{%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + HEADING -%}
{%- for tool in tools -%}
{%- set f = tool['function'] if tool['function'] is defined else tool -%}
{%- set ns.system = ns.system + '\\n### ' + f['name'] + '\\nDescription: ' + (f['description'] or '')
 + '\\nParameters: ' + (f['parameters'] | default({}, true) | tojson) + '\\n' -%}
{%- endfor -%}
{%- set ns.system = ns.system + FORMAT -%}
{%- endif -%}
{{- BOS + ns.system -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{{- USER + m['content'] -}}
{%- set ns.after_tool = false -%}
{%- elif m['role'] == 'tool' -%}
{{- OUTPUT_BEGIN + m['content'] + OUTPUT_END -}}
{%- set ns.after_tool = true -%}
{%- elif m['role'] == 'assistant' -%}
{%- if not ns.after_tool -%}{{- ASSISTANT + END_THINK -}}{%- endif -%}
{%- if m['content'] -%}{{- (m['content'].split(END_THINK) | last) -}}{%- endif -%}
{%- if m['tool_calls'] -%}
{{- CALLS_BEGIN -}}
{%- for call in m['tool_calls'] -%}
{%- set f = call['function'] if call['function'] is defined else call -%}
{{- CALL_BEGIN + f['name'] + SEP -}}
{{- (f['arguments'] if f['arguments'] is string else (f['arguments'] | default({}, true) | tojson)) + CALL_END -}}
{%- endfor -%}
{{- CALLS_END -}}
{%- endif -%}
{{- EOS -}}
{%- set ns.after_tool = false -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.after_tool -%}
{{- ASSISTANT + (THINK if thinking else END_THINK) -}}
{%- endif -%}
"""


def _template() -> str:
    """The template with its names replaced by the literal strings they stand for."""
    constants = {
        "HEADING": TOOLS_HEADING, "FORMAT": TOOLS_FORMAT, "BOS": BOS, "EOS": EOS, "USER": USER, "ASSISTANT": ASSISTANT,
        "END_THINK": END_THINK, "THINK": THINK, "CALLS_BEGIN": CALLS_BEGIN, "CALLS_END": CALLS_END,
        "CALL_BEGIN": CALL_BEGIN, "CALL_END": CALL_END, "OUTPUT_BEGIN": OUTPUT_BEGIN, "OUTPUT_END": OUTPUT_END,
        "SEP": SEP,
    }  # fmt: skip
    literals = {name: "'" + value.replace("\n", "\\n") + "'" for name, value in constants.items()}
    return re.sub(r"\b[A-Z_]+\b", lambda match: literals.get(match[0], match[0]), _LAYOUT)


CHAT_TEMPLATE = _template()

Message = dict[str, Any]
Segment = tuple[str, bool]


@dataclass
class Conversation:
    """Messages in OpenAI's form; with `thinking`, the last assistant message carries `reasoning_content`."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False


def system_text(messages: list[Message], tools: list[dict[str, Any]]) -> str:
    parts = [m["content"] for m in messages if m["role"] == "system"]
    if tools:
        functions = [t.get("function", t) for t in tools]
        listing = "".join(
            f"\n### {f['name']}\nDescription: {f.get('description') or ''}"
            f"\nParameters: {json.dumps(f.get('parameters') or {}, ensure_ascii=False)}\n"
            for f in functions
        )
        parts.append(TOOLS_HEADING + listing + TOOLS_FORMAT)
    return "\n\n".join(parts)


def assistant_text(message: Message) -> str:
    """What the model writes for a turn without reasoning, up to and including the end of sentence."""
    text = (message.get("content") or "").split(END_THINK)[-1]
    if calls := message.get("tool_calls"):
        text += CALLS_BEGIN
        for call in calls:
            function = call.get("function", call)
            arguments = function["arguments"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            text += CALL_BEGIN + function["name"] + SEP + arguments + CALL_END
        text += CALLS_END
    return text + EOS


def segments(conversation: Conversation) -> list[Segment]:
    """(text, written by the assistant in this mode) pieces whose concatenation is the whole training text."""
    messages = conversation.messages
    pieces: list[Segment] = [(BOS + system_text(messages, conversation.tools), False)]
    after_tool = False
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "user":
            pieces.append((USER + message["content"], False))
        elif role == "tool":
            pieces.append((OUTPUT_BEGIN + message["content"] + OUTPUT_END, False))
        elif role == "assistant":
            last = index == len(messages) - 1
            thinks = conversation.thinking and last
            if not after_tool:
                pieces.append((ASSISTANT + (THINK if thinks else END_THINK), False))
            reasoning = message.get("reasoning_content", "") + END_THINK if thinks else ""
            pieces.append((reasoning + assistant_text(message), thinks or not conversation.thinking))
        after_tool = role == "tool"
    return pieces


def prompt_text(
    messages: list[Message], tools: list[dict[str, Any]] | None = None, thinking: bool | None = None
) -> str:
    """The generation prompt, as the template renders it; `thinking=None` is the default (on, off with tools)."""
    tools = tools or []
    thinking = not tools if thinking is None else thinking
    text = "".join(piece for piece, _ in segments(Conversation(messages, tools)))
    if messages and messages[-1]["role"] == "tool":
        return text
    return text + ASSISTANT + (THINK if thinking else END_THINK)
