"""The engine in this process, for offline use: prompts in, `RequestOutput`s out."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, overload

from dsengine.config import EngineConfig
from dsengine.engine.leading_core import LeadingCore
from dsengine.engine.messages import AddRequest, RequestUpdate
from dsengine.engine.process_args import EngineProcessArgs
from dsengine.engine.ranks import Engine, open_engine
from dsengine.engine.sampling_params import SamplingParams, with_child_seed
from dsengine.model.checkpoint import resolve_checkpoint
from dsengine.outputs import RequestMetrics, RequestOutput, SequenceAssembler
from dsengine.progress import loading_progress, request_progress
from dsengine.tokenizer.tokenizer import Tokenizer

Prompts = str | Sequence[str]
Message = Mapping[str, Any]


@dataclass
class _Pending:
    """A request under way: its output, and one assembler per continuation."""

    output: RequestOutput
    assemblers: list[SequenceAssembler]
    started: float


class LLM:
    """A DeepSeek model, loaded and ready.

    Args:
        model: local folder or hub name of a checkpoint; None is the embedded demo model.
        progress: show progress bars when standard error is a terminal.
        options: fields of `EngineConfig`.

    Raises:
        ValueError: an option or the checkpoint is at fault; the message says which and what would be right.

    Example:
        >>> with LLM() as llm:
        ...     print(llm.generate("1, 2, 3,", SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text)
    """

    def __init__(self, model: str | None = None, *, progress: bool = True, **options: Any) -> None:
        self.config = EngineConfig(model=model, **options)
        self._progress = progress
        checkpoint = resolve_checkpoint(self.config.model_or_demo, self.config.revision)
        self.tokenizer = Tokenizer.from_checkpoint(checkpoint)
        if self.config.nnodes > 1:
            raise ValueError(f"nnodes is {self.config.nnodes}; an LLM runs on one machine, serve runs on several")
        args = EngineProcessArgs(
            config=dataclasses.asdict(self.config),
            checkpoint=str(checkpoint),
            eos_token_ids=sorted(self.tokenizer.eos_token_ids),
            num_valid_tokens=self.tokenizer.vocab_size,
            has_heartbeats=False,
        )
        with loading_progress(enabled=progress) as callback:
            self._core: Engine | None = open_engine(args, progress=callback)
        self._ids = itertools.count()

    @property
    def core(self) -> Engine:
        """The engine under this LLM.

        Raises:
            RuntimeError: the LLM has been shut down.
        """
        if self._core is None:
            raise RuntimeError("this LLM has been shut down; make a new one")
        return self._core

    @overload
    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        stream: Literal[True],
    ) -> Iterator[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Continue prompts.

        Args:
            prompts: a string or several; BOS is added as the checkpoint's tokenizer asks.
            sampling_params: for all prompts, or one per prompt; None takes the checkpoint's own defaults.
            prompt_token_ids: token ids instead of text, one list or several.
            stream: yield a `RequestOutput` whenever one has grown, instead of returning all at the end.

        Returns:
            One `RequestOutput` per prompt, in order.

        Raises:
            ValueError: neither or both kinds of prompt given, or a prompt that cannot run; nothing has been run then.
        """
        texts, token_ids = self._tokenize(prompts, prompt_token_ids)
        return self._run(texts, token_ids, sampling_params, stream)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Answer one conversation or several, rendered by the checkpoint's chat template.

        Args:
            messages: a list of `{"role": ..., "content": ...}`, or a list of such lists.
            tools: tool descriptions in OpenAI's form.
            chat_template_kwargs: switches of the template, as in `{"thinking": True}`.

        Returns:
            As `generate`. The text is the model's own: reasoning ends with `</think>` where the model thinks.
        """
        conversations: list[Sequence[Message]]
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)  # type: ignore[list-item,arg-type]
        template = self.tokenizer.chat_template
        texts: list[str | None] = [
            template.render([dict(m) for m in c], tools=list(tools) if tools else None, **(chat_template_kwargs or {}))
            for c in conversations
        ]
        # The template has written BOS already.
        token_ids = [self.tokenizer.encode(t or "", add_special_tokens=False) for t in texts]
        return self._run(texts, token_ids, sampling_params, stream)

    def shutdown(self) -> None:
        """Free the model and its cache, and end the other ranks where there are several."""
        core, self._core = self._core, None
        if isinstance(core, LeadingCore):
            core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _tokenize(
        self, prompts: Prompts | None, prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None
    ) -> tuple[list[str | None], list[list[int]]]:
        if (prompts is None) == (prompt_token_ids is None):
            raise ValueError("give either prompts or prompt_token_ids")
        if prompts is not None:
            texts: list[str | None] = [prompts] if isinstance(prompts, str) else list(prompts)
            return texts, [self.tokenizer.encode(t or "", add_special_tokens=True) for t in texts]
        assert prompt_token_ids is not None
        lists = _as_lists(prompt_token_ids)
        return [None] * len(lists), lists

    def _run(
        self,
        texts: list[str | None],
        token_ids: list[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        stream: bool,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        if sampling_params is None:
            sampling_params = SamplingParams(**self.tokenizer.sampling_defaults)
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(token_ids)
        if len(sampling_params) != len(token_ids):
            raise ValueError(
                f"{len(sampling_params)} sampling_params were given for {len(token_ids)} prompts; give one each"
            )
        pending = self._submit(texts, token_ids, sampling_params)
        if stream:
            return self._steps(pending)
        outputs = [p.output for p in pending]
        with request_progress(len(outputs), enabled=self._progress) as advance:
            for output in self._steps(pending):
                if advance is not None and output.finished:
                    advance(1)
        return outputs

    def _submit(
        self, texts: list[str | None], token_ids: list[list[int]], sampling_params: Sequence[SamplingParams]
    ) -> list[_Pending]:
        pending: list[_Pending] = []
        now = time.monotonic()
        try:
            for text, ids, params in zip(texts, token_ids, sampling_params, strict=True):
                assemblers = [SequenceAssembler(i, self.tokenizer, ids, params) for i in range(params.n)]
                output = RequestOutput(
                    str(next(self._ids)), text, ids, [a.output for a in assemblers], RequestMetrics(len(ids))
                )
                pending.append(_Pending(output, assemblers, now))
                for i in range(params.n):
                    self.core.add_request(AddRequest(f"{output.request_id}-{i}", ids, with_child_seed(params, i)), now)
        except ValueError:
            self._abort(pending)
            raise
        return pending

    def _steps(self, pending: list[_Pending]) -> Iterator[RequestOutput]:
        by_id = {f"{p.output.request_id}-{a.output.index}": (p, a) for p in pending for a in p.assemblers}
        try:
            while any(not p.output.finished for p in pending):
                grown: dict[str, RequestOutput] = {}
                for update in self.core.step(time.monotonic()).updates:
                    if update.request_id in by_id:
                        self._apply(update, *by_id[update.request_id])
                        output = by_id[update.request_id][0].output
                        grown[output.request_id] = output
                yield from grown.values()
        finally:
            self._abort(pending)

    def _apply(self, update: RequestUpdate, pending: _Pending, assembler: SequenceAssembler) -> None:
        if assembler.push(update):
            self.core.abort([update.request_id])
        output, metrics = pending.output, pending.output.metrics
        elapsed = time.monotonic() - pending.started
        metrics.num_cached_tokens = max(metrics.num_cached_tokens, update.cached_tokens)
        metrics.num_generated_tokens += len(update.new_token_ids)
        if metrics.first_token_seconds is None:
            metrics.first_token_seconds = elapsed
        if update.prompt_logprobs is not None:
            output.prompt_logprobs = list(update.prompt_logprobs)
        if output.finished:
            metrics.total_seconds = elapsed

    def _abort(self, pending: list[_Pending]) -> None:
        if self._core is not None:
            self._core.abort([f"{p.output.request_id}-{a.output.index}" for p in pending for a in p.assemblers])


def _as_lists(token_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    """One prompt or several, as several."""
    flat: list[int] = []
    lists: list[list[int]] = []
    for item in token_ids:
        if isinstance(item, int):
            flat.append(item)
        else:
            lists.append(list(item))
    if flat and lists:
        raise ValueError("prompt_token_ids mixes token ids and lists of token ids; give one list, or a list of lists")
    return [flat] if flat else lists
