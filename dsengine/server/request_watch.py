"""Keeps a record of each generating request from its arrival to its end, and hands it to the log and to the traces."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from starlette.types import Scope

from dsengine.config import ServerConfig
from dsengine.server.request_log import describe_request
from dsengine.server.request_record import RECORD, RequestRecord
from dsengine.tokenizer.tokenizer import Tokenizer

_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})


class RequestWatch:
    """What becomes of records.

    Args:
        trace: is given every record at its end; None: there are no traces.
    """

    def __init__(
        self, config: ServerConfig, tokenizer: Tokenizer, trace: Callable[[RequestRecord], None] | None
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._trace = trace

    def begin(self, scope: Scope, request_id: str) -> RequestRecord | None:
        """A record, left in the scope under `RECORD`, if anybody will read it."""
        wanted = self._config.log_requests or self._trace is not None
        if not wanted or scope["path"] not in _PATHS:
            return None
        record = RequestRecord(
            request_id, scope["path"], scope["headers"], keeps_texts=self._config.log_requests_contents
        )
        scope[RECORD] = record
        return record

    def end(self, record: RequestRecord, status: int) -> dict[str, Any]:
        """The request has been answered; returns what its log line says of it."""
        record.status, record.ended = status, time.monotonic()
        if self._trace is not None:
            self._trace(record)
        return describe_request(record, self._tokenizer) if self._config.log_requests else {}
