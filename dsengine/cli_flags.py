"""Command-line flags derived from the configuration dataclasses.

A field of `EngineConfig` or `ServerConfig` is declared once, with its help text and the spellings of other engines; the
flag, its type, its default in `--help` and its error messages follow from the declaration, so they cannot drift apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, NoReturn, TypeVar

Config = TypeVar("Config")


class UsageError(Exception):
    """A command line that cannot be obeyed; the message is one or two lines for the user."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes no abbreviated flags and proposes the nearest flag for an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}\n('{self.prog} --help' lists what it takes)")

    def reject_unknown(self, unknown: list[str]) -> None:
        """Raise `UsageError` for the first of `unknown`, with the most similar flag of this parser."""
        if not unknown:
            return
        word = unknown[0].split("=", 1)[0]
        if not word.startswith("-"):
            self.error(f"unexpected argument {word!r}")
        near = difflib.get_close_matches(word, self._option_string_actions, n=1, cutoff=0.6)
        self.error(f"unknown flag {word}" + (f"; did you mean {near[0]}?" if near else ""))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def add_config_flags(parser: argparse.ArgumentParser, config: type[Any], title: str, skip: Iterable[str] = ()) -> None:
    """Add one flag for each field of `config`. A flag that is not given leaves no attribute in the namespace."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name not in skip:
            _add_flag(group, field, hints[field.name])


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, as the first argument or as `--model` (vLLM) or `--model-path` (SGLang)."""
    parser.add_argument(
        "positional_model",
        metavar="MODEL",
        nargs="?",
        help="checkpoint: a folder or a hub name (default: the demo model)",
    )
    parser.add_argument("--model", "--model-path", dest="model", default=None, help=argparse.SUPPRESS)


def _add_flag(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    kind, is_optional = _strip_none(hint)
    names = [flag_name(field.name), *field.metadata.get("aliases", ())]
    text = field.metadata["help"].replace("%", "%%")
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    if kind is bool and is_optional:
        group.add_argument(*names, action=argparse.BooleanOptionalAction, help=text, **options)
    elif kind is bool:
        assert field.default is False, f"{field.name}: a switch must be off by default"
        group.add_argument(*names, action="store_true", help=text, **options)
    elif typing.get_origin(kind) is tuple and typing.get_args(kind)[0] is int:
        group.add_argument(*names, nargs="+", type=int, metavar="N", help=text, **options)
    elif typing.get_origin(kind) is tuple:
        metavar = "OP=BACKEND" if field.name == "kernel" else field.name.upper()
        group.add_argument(*names, action="append", metavar=metavar, help=text, **options)
    elif typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        metavar = "{" + ",".join(choices) + "}"
        group.add_argument(*names, choices=choices, metavar=metavar, help=_with_default(text, field.default), **options)
    else:
        metavar = {int: "N", float: "X"}.get(kind, field.name.upper())
        group.add_argument(*names, type=kind, metavar=metavar, help=_with_default(text, field.default), **options)


def _with_default(text: str, default: Any) -> str:
    return text if default is None else f"{text} [{default}]"


def _strip_none(hint: Any) -> tuple[Any, bool]:
    """The type without `| None`, and whether `None` was allowed."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        assert len(kinds) == 1, f"a flag needs one type, not {hint}"
        return kinds[0], True
    return hint, False


def given_fields(args: argparse.Namespace, config: type[Any]) -> dict[str, Any]:
    """The fields of `config` that the command line set, fit for its constructor (or for `LLM`)."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in vars(args).items() if name in names}


def resolve_model(args: argparse.Namespace) -> None:
    """Merge the two spellings of the model into `args.model`; drop it when none was given."""
    positional = vars(args).pop("positional_model")
    if positional and args.model and positional != args.model:
        raise UsageError(f"two models are named: {positional!r} and --model {args.model!r}; give one")
    args.model = positional or args.model
    if args.model is None:
        del args.model


def build_config(args: argparse.Namespace, config: type[Config]) -> Config:
    """The configuration the command line asks for.

    Raises:
        UsageError: a value is out of range; the message starts with the flag.
    """
    try:
        return config(**given_fields(args, config))
    except ValueError as error:
        raise UsageError(name_flag(str(error), config)) from error


def name_flag(message: str, config: type[Any]) -> str:
    """Replace the leading field name of a configuration's error message by the flag that sets the field."""
    names = "|".join(field.name for field in dataclasses.fields(config))
    return re.sub(rf"^({names})\b", lambda match: flag_name(match[1]), message)


_SAMPLING_FLAGS: dict[str, tuple[type, str]] = {
    "temperature": (float, "Randomness; 0 always takes the likeliest token."),
    "top_p": (float, "Sample among the likeliest tokens of this total probability."),
    "top_k": (int, "Sample among this many of the likeliest tokens."),
    "min_p": (float, "Drop tokens less likely than this fraction of the likeliest one."),
    "repetition_penalty": (float, "Above 1 discourages tokens that occurred in the prompt or output."),
    "presence_penalty": (float, "Discourage tokens that occurred in the output."),
    "frequency_penalty": (float, "Discourage tokens once for each occurrence in the output."),
    "max_tokens": (int, "Longest output in tokens; default: to the end of the context."),
}


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The fields of `SamplingParams` that make sense on a command line."""
    group = parser.add_argument_group("sampling")
    for name, (kind, text) in _SAMPLING_FLAGS.items():
        metavar = "N" if kind is int else "X"
        group.add_argument(flag_name(name), dest=name, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help="End the output before this text; may be repeated.",
    )


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling fields that the command line set."""
    return {name: value for name, value in vars(args).items() if name in _SAMPLING_FLAGS or name == "stop"}
