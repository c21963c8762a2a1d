"""The `dsengine` command: its sub-commands, and what a user sees when something goes wrong.

The parser is built from light modules only, so that `--help` and a mistyped flag answer at once; torch is imported by
the sub-command that runs. A user's mistake is told in one or two lines with exit status 2, a bug keeps its traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

from dsengine import __version__
from dsengine.cli_flags import (
    Parser,
    UsageError,
    add_config_flags,
    add_model_argument,
    add_sampling_flags,
    build_config,
    name_flag,
    resolve_model,
)
from dsengine.cli_simulate import add_simulation_flags
from dsengine.config import EngineConfig, ServerConfig
from dsengine.plan.hardware import GPUS

_EPILOG = "'dsengine COMMAND --help' explains a command. Without MODEL, every command uses the embedded demo model."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["bench", "kv-drift"]:  # a benchmark of its own, with flags of its own
        words = ["bench kv-drift", *words[2:]]
    debug = "--debug" in words
    try:
        return _dispatch([word for word in words if word != "--debug"], debug)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone; keep the interpreter's final flush from complaining about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        message = describe_user_error(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"dsengine: error: {message}" if not isinstance(error, UsageError) else message, file=sys.stderr)
        return 2


def _dispatch(words: list[str], debug: bool) -> int:
    parser, commands = build_parser()
    args, unknown = parser.parse_known_args(words)
    if args.version:
        print(version_line())
        return 0
    if args.command is None:
        parser.reject_unknown(unknown)
        parser.print_help()
        return 0
    commands[args.command].reject_unknown(unknown)
    if args.command != "convert":  # which has two folders instead of a model
        resolve_model(args)
    if debug and args.command == "serve":
        args.log_level = "debug"
    return _RUNNERS[args.command](args)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command, and the parser of each sub-command by name."""
    parser = Parser(
        prog="dsengine",
        usage="dsengine COMMAND [MODEL] [flags]",
        description="Serve DeepSeek's MLA + MoE models.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    actions = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    summaries = {
        "serve": "serve a model over the OpenAI API",
        "chat": "chat with a model in the terminal",
        "generate": "complete prompts and print the completions",
        "bench": "measure prefill and decode speed of a model in this process",
        "plan": "work out what a model needs of which GPUs, and how fast it could be at best",
        "bench kv-drift": "measure what an FP8 KV cache changes in logits, and in the demo model's answers",
        "doctor": "describe this machine, and which backend serves each operation and why",
        "convert": "write a checkpoint in another number format, or the manifest by which its files are verified",
    }
    commands: dict[str, Parser] = {}
    for name, text in summaries.items():
        description = text[0].upper() + text[1:] + "."
        what = "SRC [DST]" if name == "convert" else "[MODEL]"
        command = actions.add_parser(name, help=text, description=description, usage=f"dsengine {name} {what} [flags]")
        commands[name] = command
        if name != "convert":
            add_model_argument(command)
        _ADD_FLAGS[name](command)
        skipped = {field.name for field in dataclasses.fields(EngineConfig)} - _PLAN_FIELDS
        if name != "convert":
            add_config_flags(command, EngineConfig, "engine", skip=skipped if name == "plan" else {"model"})
        command.add_argument(
            "--debug", action="store_true", help="print the traceback of an error (serve: log everything)"
        )
    return parser, commands


def _add_serve_flags(parser: Parser) -> None:
    add_config_flags(parser, ServerConfig, "server")


def _add_chat_flags(parser: Parser) -> None:
    parser.add_argument(
        "-q",
        "--question",
        action="append",
        metavar="TEXT",
        help="ask this instead of reading questions; may be repeated",
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="the chat template's thinking switch [its own default]",
    )
    parser.add_argument(
        "--url", help="chat through a running server, as in http://localhost:30000, instead of in this process"
    )
    parser.add_argument("--api-key", metavar="KEY", help="key of the server at --url [the variable OPENAI_API_KEY]")
    add_sampling_flags(parser)


def _add_generate_flags(parser: Parser) -> None:
    parser.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="text to complete; may be repeated")
    parser.add_argument(
        "-f", "--file", metavar="FILE", help="take one prompt from each line of FILE ('-': standard input)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="send each prompt as a user's message through the chat template"
    )
    parser.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="with --chat: the template's thinking switch"
    )
    parser.add_argument("-n", type=int, default=1, metavar="N", help="completions of each prompt [1]")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-sequence token")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    add_sampling_flags(parser)


def _add_bench_flags(parser: Parser) -> None:
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[1, 8], metavar="B", help="requests at a time [1 8]"
    )
    parser.add_argument("--input-len", type=int, default=256, metavar="N", help="tokens of each prompt [256]")
    parser.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens of each output [64]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="repetitions; the median is reported [3]")


def _add_kv_drift_flags(parser: Parser) -> None:
    parser.add_argument("-f", "--file", metavar="FILE", help="text, one sample a line [the demo's held-out dialogues]")
    parser.add_argument("--texts", type=int, default=32, metavar="N", help="samples that are compared [32]")
    parser.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens taken of a sample [512]")
    parser.add_argument(
        "--problems", type=int, default=100, metavar="N", help="problems the demo model solves with either cache [100]"
    )


def _add_doctor_flags(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _add_plan_flags(parser: Parser) -> None:
    parser.add_argument("--gpu", default="h200", metavar="NAME", help=f"type of GPU: {', '.join(GPUS)} [h200]")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="how many of them [1]")
    parser.add_argument(
        "--batch-size",
        "--batch",
        type=int,
        nargs="+",
        default=[1, 8, 32, 128],
        metavar="B",
        help="requests decoded at a time, on all GPUs together [1 8 32 128]",
    )
    parser.add_argument(
        "--context", type=int, nargs="+", default=[4096, 32768], metavar="N", help="tokens cached of each [4096 32768]"
    )
    parser.add_argument(
        "--mem-fraction-static",
        type=float,
        default=argparse.SUPPRESS,
        metavar="X",
        help="fraction of a GPU's memory for weights and KV cache together [a suggestion]",
    )
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens in one KV-cache block [64]")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    add_simulation_flags(parser)


def _add_convert_flags(parser: Parser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder of a checkpoint")
    parser.add_argument("target", metavar="DST", nargs="?", help="new folder for the converted checkpoint")
    parser.add_argument(
        "--format",
        choices=("fp8", "bf16"),
        metavar="{fp8,bf16}",
        help="of linear layers: FP8 in blocks of 128x128, or bfloat16 [the one that SRC is not in]",
    )
    parser.add_argument(
        "--scale-fmt", choices=("ue8m0",), metavar="{ue8m0}", help="with fp8: scales that are powers of two"
    )
    parser.add_argument(
        "--manifest-only", action="store_true", help="write only the sizes and SHA-256 sums of SRC's files, into SRC"
    )


_ADD_FLAGS = {
    "serve": _add_serve_flags,
    "chat": _add_chat_flags,
    "generate": _add_generate_flags,
    "bench": _add_bench_flags,
    "plan": _add_plan_flags,
    "bench kv-drift": _add_kv_drift_flags,
    "doctor": _add_doctor_flags,
    "convert": _add_convert_flags,
}
# A plan starts no engine: these of its fields are flags of `plan`, all are flags of the other commands.
_PLAN_FIELDS = frozenset(
    {
        "revision",
        "chunked_prefill_size",
        "kv_cache_dtype",
        "max_running_requests",
        "dense_parallel",
        "lm_head_parallel",
    }
)


def _serve(args: argparse.Namespace) -> int:
    engine_config, server_config = build_config(args, EngineConfig), build_config(args, ServerConfig)
    from dsengine.server.launch import serve
    from dsengine.server.torchrun import configure_under_torchrun

    return serve(configure_under_torchrun(engine_config, os.environ), server_config)


def _chat(args: argparse.Namespace) -> int:
    from dsengine.cli_chat import run_chat

    return run_chat(args)


def _generate(args: argparse.Namespace) -> int:
    from dsengine.cli_generate import run_generate

    return run_generate(args)


def _bench(args: argparse.Namespace) -> int:
    from dsengine.cli_bench import run_bench

    return run_bench(args)


def _plan(args: argparse.Namespace) -> int:
    from dsengine.cli_plan import run_plan

    return run_plan(args)


def _kv_drift(args: argparse.Namespace) -> int:
    from dsengine.kv_drift import run_kv_drift

    return run_kv_drift(args)


def _doctor(args: argparse.Namespace) -> int:
    from dsengine.doctor import run_doctor

    return run_doctor(args)


def _convert(args: argparse.Namespace) -> int:
    from dsengine.cli_convert import run_convert

    return run_convert(args)


_RUNNERS = {
    "serve": _serve,
    "chat": _chat,
    "generate": _generate,
    "bench": _bench,
    "bench kv-drift": _kv_drift,
    "plan": _plan,
    "doctor": _doctor,
    "convert": _convert,
}


def version_line() -> str:
    return f"dsengine {__version__} (torch {package_version('torch')}, Python {platform.python_version()})"


def package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe_user_error(error: Exception) -> str | None:
    """One or two lines about a mistake of the user's or a fault of the surroundings; None for a bug of ours."""
    text = str(error).strip()
    if isinstance(error, UsageError):
        return text
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"there is no file or folder {error.filename!r}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)):
        return name_flag(text, EngineConfig) or type(error).__name__
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in kinds or isinstance(error, MemoryError):
        return f"the device is out of memory; a lower --max-total-tokens or --mem-fraction-static asks for less\n{text}"
    if "HTTPError" in kinds or "TransportError" in kinds:
        return f"the network did not help: {text or type(error).__name__}"
    return None


if __name__ == "__main__":
    sys.exit(main())
