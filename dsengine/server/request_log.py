"""The log: one line for each event, whatever a client has put into it; and what `--log-requests` says of a request.

Contents of prompts and answers are other people's: they are logged only under `--log-requests-contents`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any

import msgspec

from dsengine.config import LogFormat, LogLevel
from dsengine.engine.sampling_params import SamplingParams
from dsengine.server.request_record import RequestRecord
from dsengine.tokenizer.tokenizer import Tokenizer

# Record attribute with the fields of a structured line.
FIELDS = "fields"
_DEFAULTS = msgspec.structs.asdict(SamplingParams())
_MAX_TEXT_CHARS = 10_000
# What moves a terminal's cursor, changes its colours or begins a line, by any standard.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_CONTROL_BUT_NEWLINE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def configure_logging(level: LogLevel, format: LogFormat) -> None:
    """Send the log of this process to stderr, and nowhere else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class _TextFormatter(logging.Formatter):
    """Lines for people. Control characters are escaped; tracebacks keep their line breaks."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub(_escape, super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return _CONTROL_BUT_NEWLINE.sub(_escape, super().formatException(ei))


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields: dict[str, Any] | None = getattr(record, FIELDS, None)
        entry |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _escape(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}" if ord(match[0]) < 256 else f"\\u{ord(match[0]):04x}"


def describe_request(record: RequestRecord, tokenizer: Tokenizer) -> dict[str, Any]:
    """Fields of a log line about a request that was given to the engine; empty if it never was."""
    if record.params is None:
        return {}
    first = record.first_token
    fields: dict[str, Any] = {
        "response_id": record.response_id,
        "model": record.model,
        "stream": record.stream,
        "params": _describe_params(record.params),
        "sequences": len(record.sequences),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "queue_ms": _milliseconds(max((s.queue_seconds for s in record.sequences), default=0.0)),
        "first_token_ms": None if first is None else _milliseconds(first - record.started),
        "finish_reasons": record.finish_reasons,
    }
    if record.keeps_texts:
        fields["contents"] = [
            {
                "prompt": _shorten(tokenizer.decode(texts.prompt_token_ids, skip_special_tokens=False)),
                "output": _shorten(texts.output),
            }
            for texts in record.texts
        ]
    return fields


def _describe_params(params: SamplingParams) -> dict[str, Any]:
    """What is not as it is by default. What a client wrote as text is counted, not quoted."""
    given = {name: value for name, value in msgspec.structs.asdict(params).items() if value != _DEFAULTS[name]}
    return {name: len(value) if name in ("stop", "logit_bias") else value for name, value in given.items()}


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _shorten(text: str) -> str:
    rest = len(text) - _MAX_TEXT_CHARS
    return text if rest <= 0 else f"{text[:_MAX_TEXT_CHARS]}… ({rest} more characters)"
