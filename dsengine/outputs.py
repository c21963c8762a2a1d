"""What a caller gets back, and how it grows out of token updates.

One assembler per sequence turns `RequestUpdate`s into text; it is the only place where stop strings end a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dsengine.engine.messages import FinishReason, RequestUpdate, TokenLogprob
from dsengine.engine.sampling_params import SamplingParams
from dsengine.tokenizer.detokenizer import IncrementalDetokenizer
from dsengine.tokenizer.tokenizer import Tokenizer


@dataclass
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
        delta: the text that the latest update added, and `num_new_tokens` how many tokens.
        stop_reason: the stop string or stop token id that ended it, None for EOS.
        logprobs: one entry per token, if the request asked for them.
    """

    index: int
    delta: str = ""
    num_new_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    _pieces: list[str] = field(default_factory=list, repr=False)

    @property
    def text(self) -> str:
        """The whole text so far."""
        # Joined when asked for: adding each delta to a string would copy a long text once per token.
        self._pieces[:] = ["".join(self._pieces)]
        return self._pieces[0]

    def append(self, delta: str) -> None:
        self.delta = delta
        self._pieces.append(delta)


@dataclass
class RequestMetrics:
    """Times in seconds since the request was handed in; token counts of the prompt."""

    num_prompt_tokens: int
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    first_token_seconds: float | None = None
    total_seconds: float | None = None


@dataclass
class RequestOutput:
    """Answer to one prompt: `n` outputs, in order."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def finished(self) -> bool:
        return all(o.finish_reason is not None for o in self.outputs)


class SequenceAssembler:
    """Grows one `CompletionOutput` from the engine's updates."""

    def __init__(self, index: int, tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.output = CompletionOutput(index, logprobs=[] if params.logprobs is not None else None)
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids, params)

    def push(self, update: RequestUpdate) -> bool:
        """Take one update in.

        Returns:
            True when a stop string has ended the sequence while the engine still runs it: the caller aborts it there.
        """
        output = self.output
        if output.finish_reason is not None:
            return False
        delta = self._detokenizer.push(update.new_token_ids)
        # Tokens behind a stop string are not part of the output.
        new = output.num_new_tokens = self._detokenizer.num_tokens - len(output.token_ids)
        output.token_ids.extend(update.new_token_ids[:new])
        if output.logprobs is not None:
            output.logprobs.extend(update.logprobs[:new])
        matched = self._detokenizer.stop_match
        if matched is not None:
            output.finish_reason, output.stop_reason = "stop", matched
        elif update.finish_reason is not None:
            delta += self._detokenizer.finish()
            output.finish_reason, output.stop_reason = update.finish_reason, update.stop_reason
        output.append(delta)
        return matched is not None and update.finish_reason is None
