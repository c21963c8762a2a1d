"""What a request wants its output to look like, as a structural tag of xgrammar.

A structural tag is a nest of sequences, alternatives and repetitions around texts, tokens, JSON schemas, regular
expressions and grammars. Markers of calls are asked for as tokens where the tokenizer has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsengine.config import ToolCallFormat
from dsengine.server.protocol_formats import OutputOptions
from dsengine.server.protocol_messages import Tool, ToolOptions
from dsengine.server.tools.dsml import DsmlParser
from dsengine.server.tools.formats import PARSERS
from dsengine.server.tools.marked import MarkedParser
from dsengine.tokenizer.tokenizer import Tokenizer

Tag = dict[str, Any]

# Models under a constraint like to write whitespace without end where they may.
_MAX_WHITESPACE = 16


def output_shape(options: OutputOptions) -> Tag | None:
    """The shape that `response_format` or one of its relatives asks for; None: any text."""
    kind, value = options.output_format
    match kind:
        case "text":
            return None
        case "json":
            return _json(value)
        case "regex":
            return {"type": "regex", "pattern": value}
        case "grammar":
            return {"type": "grammar", "grammar": value}
        case "choice":
            return _either([_text(choice) for choice in value])
    assert kind == "tag"
    return dict(value)


def answer_shape(
    options: ToolOptions, output: Tag | None, tool_format: ToolCallFormat | None, tokenizer: Tokenizer
) -> Tag | None:
    """The shape of an answer that may, must or must not hold calls; None: any text."""
    if not options.offered_tools or tool_format is None:
        return output
    tools = options.callable_tools
    is_bound = len(tools) < len(options.offered_tools) or any(tool.function.strict for tool in tools)
    if not options.must_call and output is None and not is_bound:
        return None
    calls = CallShapes(tool_format, tokenizer)
    several = options.parallel_tool_calls is not False
    if options.must_call:
        return calls.block(tools, several=several)
    if output is not None:
        return _either([output, calls.block(tools, several=several)])
    return calls.text_or_block(tools, several=several)


class CallShapes:
    """Shapes of blocks of calls in one wire format."""

    def __init__(self, tool_format: ToolCallFormat, tokenizer: Tokenizer) -> None:
        self._format = tool_format
        self._parser = PARSERS[tool_format]
        self._tokenizer = tokenizer

    def block(self, tools: Sequence[Tool], *, several: bool) -> Tag:
        """One call or, if `several`, any number of them but none."""
        begin, end = self._block_ends()
        return _sequence([begin, self._calls(tools, several=several), end])

    def text_or_block(self, tools: Sequence[Tool], *, several: bool) -> Tag:
        """Any text; if a block begins in it, it must be one, and ends the answer."""
        begin, end = self._block_ends()
        inside = _sequence([self._calls(tools, several=several), end])
        if begin["type"] == "token":
            tag = {"type": "tag", "begin": begin, "content": self._calls(tools, several=several), "end": end}
            return {
                "type": "token_triggered_tags",
                "trigger_tokens": [begin["token"]],
                "tags": [tag],
                "stop_after_first": True,
            }
        # Whitespace before the block belongs to the free text.
        return {"type": "dispatch", "rules": [[begin["value"].strip(), inside]], "loop": False}

    def _block_ends(self) -> tuple[Tag, Tag]:
        if self._parser is DsmlParser:
            return _text(f"\n\n{DsmlParser.block_begin}\n"), _text(DsmlParser.block_end)
        return self._mark(self._parser.block_begin), self._mark(self._parser.block_end)

    def _calls(self, tools: Sequence[Tool], *, several: bool) -> Tag:
        call = _either([self._call(tool) for tool in tools])
        if not several:
            return call
        if self._format == "deepseekv3":
            return _sequence([call, {"type": "star", "content": _sequence([_text("\n"), call])}])
        return {"type": "plus", "content": call}

    def _call(self, tool: Tool) -> Tag:
        name, schema = tool.function.name, tool.function.parameters or {"type": "object"}
        if tool.function.strict is False:
            schema = {"type": "object"}
        if self._parser is DsmlParser:
            return _dsml_call(name, schema)
        parser = self._parser
        assert issubclass(parser, MarkedParser)
        before: dict[ToolCallFormat, list[Tag]] = {
            "deepseekv3": [_text("function"), self._mark(parser.separator), _text(f"{name}\n```json\n")],
            "deepseekv31": [_text(name), self._mark(parser.separator)],
            "kimi_k2": [_text(f"functions.{name}:"), _REGEX_INDEX, self._mark(parser.separator)],
        }
        after = [_text("\n```")] if self._format == "deepseekv3" else []
        return _sequence(
            [self._mark(parser.call_begin), *before[self._format], _json(schema), *after, self._mark(parser.call_end)]
        )

    def _mark(self, marker: str) -> Tag:
        token_id = self._tokenizer.token_id(marker)
        return _text(marker) if token_id is None else {"type": "token", "token": token_id}


_REGEX_INDEX: Tag = {"type": "regex", "pattern": "[0-9]{1,3}"}


def _dsml_call(name: str, schema: dict[str, Any]) -> Tag:
    content = {"type": "json_schema", "json_schema": schema, "style": "deepseek_xml"}
    return _sequence([_text(f'{DsmlParser.call_begin} name="{name}">\n'), content, _text("</｜DSML｜invoke>\n")])


def _json(schema: dict[str, Any] | bool) -> Tag:
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": _MAX_WHITESPACE}


def _text(value: str) -> Tag:
    return {"type": "const_string", "value": value}


def _sequence(elements: list[Tag]) -> Tag:
    return {"type": "sequence", "elements": elements}


def _either(elements: list[Tag]) -> Tag:
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": elements}
