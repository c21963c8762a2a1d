"""`dsengine generate`: prompts in, completions out, for scripts and for a first look at a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dsengine.cli_flags import UsageError, build_config, given_fields, given_sampling
from dsengine.config import EngineConfig

if TYPE_CHECKING:
    from dsengine.engine.sampling_params import SamplingParams
    from dsengine.llm import LLM
    from dsengine.outputs import RequestOutput


def run_generate(args: argparse.Namespace) -> int:
    """The `generate` sub-command; returns the exit status."""
    if args.thinking is not None and not args.chat:
        raise UsageError("--thinking switches the chat template; give --chat as well")
    prompts = _read_prompts(args)
    build_config(args, EngineConfig)
    from dsengine.engine.sampling_params import SamplingParams

    chosen = {**given_sampling(args), "n": args.n, "ignore_eos": args.ignore_eos}
    SamplingParams(**chosen)  # tell of a bad value before minutes of loading
    from dsengine.llm import LLM

    with LLM(**given_fields(args, EngineConfig)) as llm:
        params = SamplingParams(**{**llm.tokenizer.sampling_defaults, **chosen})
        if len(prompts) == 1 and args.n == 1 and not args.json:
            _stream_one(llm, prompts[0], params, args)
        else:
            for output in _run_all(llm, prompts, params, args):
                print(_as_json(output) if args.json else _as_text(output))
    return 0


def _read_prompts(args: argparse.Namespace) -> list[str]:
    if bool(args.prompt) == bool(args.file):
        raise UsageError("give the prompts either with --prompt or with --file")
    if args.prompt:
        return list(args.prompt)
    data = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--file {args.file} is not UTF-8 text: byte {error.start} is {data[error.start]:#x}"
        ) from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"--file {args.file} holds no prompt; it must have one on each line")
    return prompts


def _run_all(llm: LLM, prompts: list[str], params: SamplingParams, args: argparse.Namespace) -> list[RequestOutput]:
    if args.chat:
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return list(llm.chat(conversations, params, chat_template_kwargs=_switches(args)))
    return llm.generate(prompts, params)


def _stream_one(llm: LLM, prompt: str, params: SamplingParams, args: argparse.Namespace) -> None:
    if args.chat:
        messages = [{"role": "user", "content": prompt}]
        outputs = iter(llm.chat(messages, params, chat_template_kwargs=_switches(args), stream=True))
    else:
        outputs = llm.generate(prompt, params, stream=True)
    for output in outputs:
        sys.stdout.write(output.outputs[0].delta)
        sys.stdout.flush()
    print()


def _switches(args: argparse.Namespace) -> dict[str, bool]:
    return {} if args.thinking is None else {"thinking": args.thinking}


def _as_text(output: RequestOutput) -> str:
    return "\n".join(completion.text for completion in output.outputs)


def _as_json(output: RequestOutput) -> str:
    record = {
        "prompt": output.prompt,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.metrics.num_cached_tokens,
        "outputs": [
            {"text": o.text, "token_ids": o.token_ids, "finish_reason": o.finish_reason, "stop_reason": o.stop_reason}
            for o in output.outputs
        ],
        "seconds": output.metrics.total_seconds,
    }
    return json.dumps(record, ensure_ascii=False)
