"""`dsengine chat`: a conversation in the terminal, with a model in this process or behind a URL.

The answer goes to standard output and the reasoning, dimmed, to standard error, so that a script that reads the output
gets the answer alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TextIO

from dsengine.chat_client import CUT_OFF, ChatClient, Piece, ServerError
from dsengine.cli_flags import UsageError, build_config, flag_name, given_fields, given_sampling
from dsengine.config import EngineConfig

_HELP = "/exit ends, /reset starts over, /think on|off switches the reasoning, Ctrl-C stops an answer"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class ChatBackend(Protocol):
    """Whatever answers a conversation."""

    model: str

    def stream(
        self, messages: Sequence[Mapping[str, Any]], thinking: bool | None, options: Mapping[str, Any]
    ) -> Iterator[Piece]: ...

    def close(self) -> None: ...


class LocalChat:
    """A model in this process."""

    def __init__(self, args: argparse.Namespace) -> None:
        build_config(args, EngineConfig)
        from dsengine.llm import LLM

        self._llm = LLM(**given_fields(args, EngineConfig))
        self.model = self._llm.config.model or "the demo model"

    def stream(
        self, messages: Sequence[Mapping[str, Any]], thinking: bool | None, options: Mapping[str, Any]
    ) -> Iterator[Piece]:
        from dsengine.engine.sampling_params import SamplingParams
        from dsengine.server.reasoning import ReasoningSplitter
        from dsengine.tokenizer.chat_template import ends_in_thinking

        params = SamplingParams(**{**self._llm.tokenizer.sampling_defaults, **options})
        switches = {} if thinking is None else {"thinking": thinking}
        splitter: ReasoningSplitter | None = None
        finish_reason = None
        for output in self._llm.chat(messages, params, chat_template_kwargs=switches, stream=True):
            if splitter is None:
                splitter = ReasoningSplitter(ends_in_thinking(output.prompt or ""))
            yield from _pieces(*splitter.push(output.outputs[0].delta))
            finish_reason = output.outputs[0].finish_reason
        if splitter is not None:
            yield from _pieces(*splitter.finish())
        if finish_reason == "length":
            yield CUT_OFF

    def close(self) -> None:
        self._llm.shutdown()


def _pieces(reasoning: str, content: str) -> Iterator[Piece]:
    if reasoning:
        yield Piece("reasoning", reasoning)
    if content:
        yield Piece("content", content)


class Printer:
    """Writes pieces as they come: content to `out`, reasoning to `err`, dim where `err` is a terminal."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = out
        self._err = err
        self._dim = err.isatty()

    def write(self, pieces: Iterable[Piece]) -> str:
        """Print an answer to its end and return its content, without the reasoning."""
        content: list[str] = []
        kind, note = "", ""
        try:
            for piece in pieces:
                if piece.kind == "note":
                    note = piece.text
                elif piece.kind == "reasoning":
                    kind = piece.kind
                    self._put(self._err, _DIM + piece.text + _PLAIN if self._dim else piece.text)
                else:
                    if kind == "reasoning":
                        self._put(self._err, "\n\n" if self._dim else "\n")
                    kind = piece.kind
                    content.append(piece.text)
                    self._put(self._out, piece.text)
        finally:
            if kind:
                self._put(self._out if kind == "content" else self._err, "\n")
        if note:
            self._put(self._err, note + "\n")
        return "".join(content)

    @staticmethod
    def _put(stream: TextIO, text: str) -> None:
        stream.write(text)
        stream.flush()


class Conversation:
    """The messages so far, and what the user has switched."""

    def __init__(
        self, backend: ChatBackend, printer: Printer, system: str | None, thinking: bool | None, options: dict[str, Any]
    ) -> None:
        self._backend = backend
        self._printer = printer
        self._opening: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self._options = options
        self.thinking = thinking

    def ask(self, question: str) -> None:
        """Answer a question. Reasoning is left out of the history, as the model was trained to see it."""
        messages = [*self._messages, {"role": "user", "content": question}]
        pieces = self._backend.stream(messages, self.thinking, self._options)
        content = self._printer.write(pieces)
        self._messages = [*messages, {"role": "assistant", "content": content}]

    def reset(self) -> None:
        self._messages = list(self._opening)


def run_chat(args: argparse.Namespace) -> int:
    """The `chat` sub-command; returns the exit status."""
    options = _options(args)
    backend = _open_backend(args)
    try:
        printer = Printer(sys.stdout, sys.stderr)
        conversation = Conversation(backend, printer, args.system, args.thinking, options)
        if args.question:
            for question in args.question:
                conversation.ask(question)
            return 0
        if sys.stdin.isatty():
            print(f"chatting with {backend.model}; {_HELP}", file=sys.stderr)
            return _talk(conversation, _typed_lines())
        return _talk(conversation, iter(sys.stdin))
    finally:
        backend.close()


def _open_backend(args: argparse.Namespace) -> ChatBackend:
    if args.url is None:
        if args.api_key is not None:
            raise UsageError("--api-key is for a server; give --url as well")
        return LocalChat(args)
    useless = sorted(given_fields(args, EngineConfig).keys() - {"model", "seed"})
    if useless:
        raise UsageError(f"{flag_name(useless[0])} has no effect with --url: the server has its own")
    return ChatClient(args.url, args.api_key or os.environ.get("OPENAI_API_KEY"), getattr(args, "model", None))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options given, found valid before anything is loaded."""
    from dsengine.engine.sampling_params import SamplingParams

    options = given_sampling(args)
    SamplingParams(**options)
    if args.url is not None and "seed" in args:
        options["seed"] = args.seed
    return options


def _typed_lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and history
    while True:
        try:
            yield input("\n> ")
        except EOFError:
            return


def _talk(conversation: Conversation, lines: Iterator[str]) -> int:
    """Answer line by line. One refused question does not end the conversation, but it shows in the exit status."""
    status = 0
    for line in lines:
        text = line.strip()
        if text in ("/exit", "/quit"):
            break
        if text.startswith("/"):
            print(_obey(conversation, text), file=sys.stderr)
        elif text:
            try:
                conversation.ask(text)
            except (ServerError, ValueError) as error:
                print(f"dsengine: error: {error}", file=sys.stderr)
                status = 2
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                print("(stopped)", file=sys.stderr)
    return status


def _obey(conversation: Conversation, command: str) -> str:
    match command.split():
        case ["/reset"]:
            conversation.reset()
            return "a new conversation"
        case ["/think", ("on" | "off") as switch]:
            conversation.thinking = switch == "on"
            return f"thinking is {switch}"
        case ["/help"]:
            return _HELP
    return f"there is no command {command!r}; {_HELP}"
