"""Talking to a running server over the OpenAI API, with nothing but httpx.

`dsengine chat --url` must work against any server that speaks the API, and without the `openai` package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import httpx

# Reading has no limit: a long prompt on a slow machine may take minutes until its first token.
_TIMEOUT = httpx.Timeout(10.0, read=None)


class Piece(NamedTuple):
    """A bit of an answer: of the reasoning, of what is said, or a note by us about how it ended."""

    kind: Literal["reasoning", "content", "note"]
    text: str


CUT_OFF = Piece("note", "(cut off: the limit of tokens was reached)")


class ServerError(ValueError):
    """The server refused or broke off; the message is fit for a user's eyes."""


class ChatClient:
    """One server and one of its models.

    Args:
        url: address of the server, with or without the trailing `/v1`.
        api_key: sent as a bearer token.
        model: name of the model; None asks the server and takes its first.

    Raises:
        ServerError: the server cannot be reached, or refuses.
    """

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        self.url = normalize_url(url)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=self.url + "/v1/", headers=headers, timeout=_TIMEOUT)
        self.model = model or self._first_model()

    def stream(
        self, messages: Sequence[Mapping[str, Any]], thinking: bool | None, options: Mapping[str, Any]
    ) -> Iterator[Piece]:
        """Stream the answer to a conversation. Closing the iterator drops the connection, which aborts the request.

        Args:
            options: further fields of the request, as in `{"temperature": 0}`.

        Raises:
            ServerError: as above, also in the middle of the stream.
        """
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "stream": True, **options}
        if thinking is not None:
            body["chat_template_kwargs"] = {"thinking": thinking}
        try:
            with self._http.stream("POST", "chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ServerError(error_message(response))
                for event in read_events(response.iter_lines()):
                    yield from _pieces(event)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def close(self) -> None:
        self._http.close()

    def _first_model(self) -> str:
        try:
            response = self._http.get("models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise ServerError(error_message(response))
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ServerError(f"{self.url}/v1/models did not answer as the OpenAI API does") from None

    def _unreachable(self, error: httpx.HTTPError) -> ServerError:
        return ServerError(f"the server at {self.url} cannot be reached: {error or type(error).__name__}")


def normalize_url(url: str) -> str:
    """`localhost:30000`, `http://localhost:30000/` and `http://localhost:30000/v1` name the same server."""
    if "://" not in url:
        url = "http://" + url
    return url.rstrip("/").removesuffix("/v1")


def read_events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON payloads of a stream of server-sent events, up to `[DONE]`.

    Raises:
        ServerError: a payload is not JSON, or is the server's report of an error.
    """
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise ServerError(f"the server sent something that is not JSON: {data[:200]!r}") from None
        if "error" in event:
            raise ServerError(f"the server reports an error: {_message_of(event['error'])}")
        yield event


def error_message(response: httpx.Response) -> str:
    """What an unsuccessful response says, in OpenAI's shape or not."""
    try:
        text = _message_of(response.json()["error"])
    except (ValueError, LookupError, TypeError):
        text = response.text.strip()[:200]
    return f"the server answered {response.status_code}: {text}"


def _message_of(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _pieces(event: Mapping[str, Any]) -> Iterator[Piece]:
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or {}
        # vLLM has renamed the field; both spellings are about.
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if reasoning:
            yield Piece("reasoning", reasoning)
        if delta.get("content"):
            yield Piece("content", delta["content"])
        if choice.get("finish_reason") == "length":
            yield CUT_OFF
