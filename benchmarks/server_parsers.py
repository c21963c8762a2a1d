"""What the text of one token costs on its way out: detokenising, splitting reasoning off, finding calls, encoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from dsengine.demo import CHECKPOINT_DIR
from dsengine.engine.sampling_params import SamplingParams
from dsengine.server.encoding import encode_json
from dsengine.server.reasoning import ReasoningSplitter
from dsengine.server.tools.formats import PARSERS
from dsengine.tokenizer.detokenizer import IncrementalDetokenizer
from dsengine.tokenizer.tokenizer import Tokenizer

_NUM_TOKENS = 4000
_TEXT = "The quick brown fox jumps over 13 lazy dogs, and <b>none</b> of them minds. "
_CALLS = {
    "deepseekv3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n",
        "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseekv31": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>",
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseekv32": (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="text" string="true">',
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>",
        "<|tool_call_end|><|tool_calls_section_end|>",
    ),
}


def parser_times() -> dict[str, float]:
    """Microseconds per token, by what handles it; the best of five runs."""
    tokenizer = Tokenizer.from_checkpoint(CHECKPOINT_DIR)
    ids = (tokenizer.encode(_TEXT * (_NUM_TOKENS // 10)))[:_NUM_TOKENS]
    pieces = [tokenizer.decode([token]) for token in ids]
    times = {
        "detokeniser": _best(lambda: _detokenise(tokenizer, ids, ())),
        "detokeniser, 4 stop strings": _best(lambda: _detokenise(tokenizer, ids, ("END", "###", "\n\n\n", "dogs?"))),
        "reasoning splitter": _best(lambda: _split(pieces)),
        "JSON of a chunk": _best(lambda: _encode(pieces)),
    }
    for name, (before, after) in _CALLS.items():
        inside = [before, '{"text": "', *(piece.replace('"', "'") for piece in pieces), '"}', after]
        times[f"tool calls of {name}, in text"] = _best(partial(_parse, name, pieces))
        times[f"tool calls of {name}, in arguments"] = _best(partial(_parse, name, inside))
    return times


def _best(work: Callable[[], None]) -> float:
    best = float("inf")
    for _ in range(5):
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return 1e6 * best / _NUM_TOKENS


def _detokenise(tokenizer: Tokenizer, ids: Sequence[int], stop: tuple[str, ...]) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, [], SamplingParams(stop=stop))
    for token in ids:
        detokenizer.push([token])
    detokenizer.finish()


def _split(pieces: Sequence[str]) -> None:
    splitter = ReasoningSplitter(True)
    for piece in pieces:
        splitter.push(piece)
    splitter.finish()


def _encode(pieces: Sequence[str]) -> None:
    for piece in pieces:
        choice = {"index": 0, "delta": {"content": piece}, "logprobs": None, "finish_reason": None}
        encode_json({"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "choices": [choice]})


def _parse(name: str, pieces: Sequence[str]) -> None:
    parser = PARSERS[name]()  # type: ignore[index]
    for piece in pieces:
        parser.push(piece)
    parser.finish()
