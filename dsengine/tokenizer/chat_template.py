"""Messages to prompt text, by the Jinja template that came with the checkpoint.

A template is code by the checkpoint's author that runs over data by a client. It therefore runs in Jinja's immutable
sandbox, gets a closed set of variables, and is stopped at a deadline; a template is never taken from a request.

What the deadline guarantees: it is looked at in every turn of every loop, at every call, every subscription and every
piece of output, so that between two looks a template evaluates only expressions over the request's own data.
Multiplication is bounded besides, since `'x' * n` is the one operator whose result can dwarf its operands.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

THINK_TOKEN = "<think>"
END_THINK_TOKEN = "</think>"

DEFAULT_TIME_LIMIT = 5.0
_MAX_REPEATED = 1_000_000
_LOOP_FILTER = "dsengine_timed_loop"


class TemplateTimeout(ValueError):
    """A template ran past its deadline."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source.
        bos_token, eos_token, pad_token: texts of the special tokens, for the template's variables of these names.
        time_limit: seconds one rendering may take.

    Raises:
        ValueError: the source is not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        pad_token: str = "",
        time_limit: float = DEFAULT_TIME_LIMIT,
    ) -> None:
        self.source = source
        self.time_limit = time_limit
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        self._environment = _TimedSandbox()
        try:
            tree = self._environment.parse(source)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, _LOOP_FILTER, [], [], None, None)
            code = self._environment.compile(tree)
            self._template = jinja2.Template.from_code(self._environment, code, self._environment.make_globals(None))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the checkpoint's chat template is not valid: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Prompt text of a conversation, BOS included: encode it without special tokens.

        Args:
            messages: `{"role": ..., "content": ...}` with text contents, oldest first.
            tools: descriptions of functions in OpenAI's form.
            thinking: the template's thinking switch (`enable_thinking` is another spelling of it); None leaves the
                template its own default.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            ValueError: the template refuses the messages, fails on them, or runs past the time limit.
        """
        if thinking is not None and enable_thinking is not None and thinking != enable_thinking:
            raise ValueError(
                f"thinking is {thinking} but enable_thinking is {enable_thinking}; they name the same switch"
            )
        switch = enable_thinking if thinking is None else thinking
        variables: dict[str, Any] = {
            **self._tokens,
            "messages": [dict(m) for m in messages],
            "tools": [dict(t) for t in tools] if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        if switch is not None:
            variables |= {"thinking": switch, "enable_thinking": switch}
        return self._run(variables)

    def _run(self, variables: dict[str, Any]) -> str:
        environment = self._environment
        environment.start(self.time_limit)
        try:
            pieces = []
            for piece in self._template.generate(variables):
                environment.check_deadline()
                pieces.append(piece)
            return "".join(pieces)
        except TemplateTimeout:
            raise
        except _RefusedByTemplate as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise ValueError(f"the chat template cannot render these messages: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise ValueError("the chat template cannot render these messages: they are too large") from error
        finally:
            environment.stop()


def ends_in_thinking(prompt: str) -> bool:
    """Whether the rendered prompt leaves the model inside its reasoning."""
    return prompt.rstrip().endswith(THINK_TOKEN)


class _RefusedByTemplate(jinja2.TemplateError):
    """`raise_exception` was called by the template."""


class _TimedSandbox(ImmutableSandboxedEnvironment):
    """A sandbox with a deadline per thread, looked at wherever a template can spend time."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json
        self.filters[_LOOP_FILTER] = self._timed_loop
        self.globals["raise_exception"] = _raise_exception
        self._clock = threading.local()

    def start(self, seconds: float) -> None:
        self._clock.deadline = time.monotonic() + seconds

    def stop(self) -> None:
        self._clock.deadline = None

    def check_deadline(self) -> None:
        deadline = getattr(self._clock, "deadline", None)
        if deadline is not None and time.monotonic() > deadline:
            raise TemplateTimeout("the chat template took too long to render these messages")

    def _timed_loop(self, items: Iterable[Any]) -> Iterator[Any] | list[Any]:
        # An empty result keeps `{% else %}` and undefined variables as Jinja has them.
        if isinstance(items, jinja2.Undefined):
            return list(items)
        return self._with_checks(items)

    def _with_checks(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.check_deadline()
            yield item

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_deadline()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_deadline()
        return super().getattr(obj, attribute)

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_deadline()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.check_deadline()
        if operator == "**":
            raise _RefusedByTemplate("** is not available to chat templates")
        for operand, factor in ((left, right), (right, left)):
            if isinstance(operand, Sequence) and isinstance(factor, int) and len(operand) * factor > _MAX_REPEATED:
                raise _RefusedByTemplate(f"a repetition of {factor} times is too long")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedByTemplate(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would change what the model reads; this one is transformers'.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
