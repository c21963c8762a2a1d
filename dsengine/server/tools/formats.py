"""Which wire format a checkpoint's calls have, and how its model is told of the functions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from dsengine.config import ToolCallFormat
from dsengine.server.tools.dsml import DsmlParser
from dsengine.server.tools.marked import DeepSeekV3Parser, DeepSeekV31Parser, KimiK2Parser
from dsengine.server.tools.parser import ToolCallParser
from dsengine.tokenizer.tokenizer import Tokenizer

PARSERS: dict[ToolCallFormat, type[ToolCallParser]] = {
    "deepseekv3": DeepSeekV3Parser,
    "deepseekv31": DeepSeekV31Parser,
    "deepseekv32": DsmlParser,
    "kimi_k2": KimiK2Parser,
}

# The texts between the parts of calls that are tokens of their own.
MARKER_TOKENS = tuple(
    getattr(parser, name)
    for parser in (DeepSeekV31Parser, KimiK2Parser)
    for name in ("block_begin", "call_begin", "separator", "call_end", "block_end")
)

# The description of functions that DeepSeek publishes with V3.1, for templates that leave it to the server.
_V31_DESCRIPTION = """## Tools
You have access to the following tools:
{tools}

IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>\
{{additional_tool_calls}}<｜tool▁calls▁end｜>

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces"""
_V3_DESCRIPTION = """## Tools
You have access to the following functions:
{tools}

To call functions, write nothing but this, with one part from <｜tool▁call▁begin｜> to <｜tool▁call▁end｜> per call:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
```json
ARGUMENTS
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"""
_DESCRIPTIONS: dict[ToolCallFormat, str] = {"deepseekv31": _V31_DESCRIPTION, "deepseekv3": _V3_DESCRIPTION}


def detect_format(tokenizer: Tokenizer) -> ToolCallFormat | None:
    """The format that the checkpoint's template writes calls in; None if it writes none that is known.

    A template that does not speak of calls at all stands for the format of its family, if the tokenizer has the tokens.
    """
    try:
        template = tokenizer.chat_template.source
    except ValueError:
        return None
    if "<|tool_call_begin|>" in template:
        return "kimi_k2"
    if "｜DSML｜" in template:
        return "deepseekv32"
    if tokenizer.token_id("<｜tool▁calls▁begin｜>") is None:
        return None
    if "<｜tool▁sep｜>" in template:
        return "deepseekv3" if "```json" in template else "deepseekv31"
    return "deepseekv3"


def describes_tools(template: str) -> bool:
    """Whether a chat template tells the model of the functions it is given."""
    return re.search(r"\btools\b", template) is not None


def with_description(
    messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]], tool_format: ToolCallFormat
) -> list[dict[str, Any]]:
    """Messages whose system text ends with a description of the functions, for templates that describe none.

    Raises:
        ValueError: no description is known for this format.
    """
    if tool_format not in _DESCRIPTIONS:
        raise ValueError(
            f"the chat template cannot describe tools, and no description in the format {tool_format} is known"
        )
    listing = "".join(
        f"\n### {tool['function']['name']}\nDescription: {tool['function']['description']}\n\n"
        f"Parameters: {json.dumps(tool['function']['parameters'], ensure_ascii=False)}\n"
        for tool in tools
    )
    text = _DESCRIPTIONS[tool_format].format(tools=listing.rstrip("\n"))
    if messages and messages[0]["role"] == "system":
        first = messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
