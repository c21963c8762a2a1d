"""A step from the scheduler's decision to host numbers, in two halves: launched now, fetched when they are needed.

On CUDA the launch only queues kernels, so the host is free until it fetches. The queue is an argument because a CPU
has none: there a step is computed while it is launched, unless the tests bring a thread that plays the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dsengine.engine.batch import ScheduledBatch, ScheduledRequest
from dsengine.engine.lock_step import LockStep
from dsengine.engine.messages import ExpertStats, TokenLogprob
from dsengine.engine.model_runner import ModelRunner, PreparedStep, PromptRows
from dsengine.engine.request import Request
from dsengine.engine.sampler import DrawnTokens, SampledToken, Sampler, TokenScores
from dsengine.engine.speculation import DrawnPaths
from dsengine.engine.step_outputs import StepOutputs
from dsengine.model.rebalance import ExpertBalancer
from dsengine.model.transfer import upload

# Prompt tokens whose logits are held at a time: 0.13 GB of float32 at 129,280 tokens.
_SCORED_AT_ONCE = 256


@dataclass(frozen=True)
class DeviceResult:
    """A step's results, on the device or on their way from it.

    Attributes:
        drawn: tokens of requests that sample without a tree.
        scores: the pieces of each scored prompt.
        paths: new tokens of requests with trees, which come before the others.
    """

    drawn: DrawnTokens | None
    scores: tuple[tuple[Request, tuple[TokenScores, ...]], ...]
    paths: DrawnPaths | None = None


class Ticket(Protocol):
    """Work given to a queue."""

    def result(self) -> DeviceResult: ...


class DeviceQueue(Protocol):
    """Carries out work in the order in which it is given; a `concurrent.futures.Executor` of one thread is one."""

    def submit(self, work: Callable[[], DeviceResult], /) -> Ticket: ...


@dataclass(frozen=True)
class _Done:
    value: DeviceResult

    def result(self) -> DeviceResult:
        return self.value


class DirectQueue:
    """Does the work on the spot: all there is to do on CUDA, where kernels queue themselves."""

    def submit(self, work: Callable[[], DeviceResult], /) -> Ticket:
        return _Done(work())


@dataclass(frozen=True)
class StepResult:
    """A step's results on the host: the new tokens, and the scores of chunks of prompts from `start + 1` on."""

    tokens: dict[Request, tuple[SampledToken, ...]]
    prompt_scores: dict[Request, list[TokenLogprob]]


class LaunchedStep:
    """A step that is under way."""

    def __init__(self, batch: ScheduledBatch, prepared: PreparedStep, ticket: Ticket) -> None:
        self.batch = batch
        self._sampled = prepared.sampled
        self._ticket = ticket

    @property
    def drawn_rows(self) -> dict[Request, int]:
        """Row of each request among the drawn tokens."""
        return {scheduled.request: row for row, scheduled in enumerate(self._sampled)}

    @property
    def drawn(self) -> Tensor | None:
        """int64 [N], the drawn tokens, on the device; to be asked for by work that is queued behind this step."""
        drawn = self._ticket.result().drawn
        return None if drawn is None else drawn.token_ids

    @property
    def holds_up_the_next(self) -> bool:
        """The next step cannot be launched before this one's tokens are on the host: penalties count them there, and
        grammars follow them."""
        requests = [scheduled.request for scheduled in self._sampled]
        return any(request.params.has_penalties or request.grammar is not None for request in requests)

    def fetch(self) -> StepResult:
        """Wait for the results."""
        result = self._ticket.result()
        tokens = result.paths.fetch() if result.paths is not None else []
        if result.drawn is not None:
            tokens += [(token,) for token in result.drawn.fetch()]
        return StepResult(
            tokens={s.request: token for s, token in zip(self._sampled, tokens, strict=True)},
            prompt_scores={
                request: [score for piece in pieces for score in piece.fetch()] for request, pieces in result.scores
            },
        )


class StepLauncher:
    """Launches steps: the model's work and the sampler's, one after the other.

    Args:
        balancer: moves experts between ranks, between steps.
    """

    def __init__(
        self, runner: ModelRunner, sampler: Sampler, queue: DeviceQueue, balancer: ExpertBalancer | None = None
    ) -> None:
        self.runner = runner
        self._sampler = sampler
        self._queue = queue
        self._balancer = balancer

    def experts(self) -> ExpertStats | None:
        """How evenly the ranks share routed experts, where these are balanced."""
        balance = self._balancer.balance() if self._balancer is not None else None
        return None if balance is None else ExpertStats(**asdict(balance))

    def launch(
        self, batch: ScheduledBatch, previous: LaunchedStep | None, lock_step: LockStep | None = None
    ) -> LaunchedStep:
        """Prepare a step and queue its work.

        Args:
            previous: the step before, if its tokens are not on the host yet.
            lock_step: of all attention groups, where there are several.
        """
        prepared = self.runner.prepare(batch, previous.drawn_rows if previous is not None else {}, lock_step)
        return LaunchedStep(batch, prepared, self._queue.submit(lambda: self.compute(prepared, previous)))

    @torch.inference_mode()
    def compute(self, step: PreparedStep, previous: LaunchedStep | None) -> DeviceResult:
        """Queue a step's kernels on the device; what `launch` gives to the queue."""
        if self._balancer is not None:
            self._balancer.before_step()
        if step.drafts is not None:
            return self._compute_with_drafts(step, previous)
        outputs = self.runner.forward(step, previous.drawn if previous is not None else None)
        return DeviceResult(self._draw(outputs.logits, step.sampled), self._score_prompts(step, outputs))

    def _compute_with_drafts(self, step: PreparedStep, previous: LaunchedStep | None) -> DeviceResult:
        speculator, plan = self.runner.speculator, step.drafts
        assert speculator is not None and plan is not None
        times = speculator.times
        with times.measure("draft"):
            tree = speculator.draft(plan, step.lock_step)
        with times.measure("verify"):
            outputs = self.runner.forward(step, previous.drawn if previous is not None else None, tree)
        with times.measure("accept"):
            paths, accepted, num_nodes = None, None, 0
            if tree is not None:
                num_nodes = tree.tokens.numel()
                kept, tokens, paths = speculator.verify(plan, tree, outputs)
                accepted = (kept, tokens)
            drawn = self._draw(outputs.logits[num_nodes:], step.sampled[len(plan.trees) :])
            scores = self._score_prompts(step, outputs)
        if outputs.hidden is not None:
            with times.measure("catch up"):
                token_ids = drawn.token_ids if drawn is not None else None
                speculator.catch_up(plan, outputs, accepted, token_ids)
        return DeviceResult(drawn, scores, paths)

    def _draw(self, logits: Tensor, sampled: Sequence[ScheduledRequest]) -> DrawnTokens | None:
        if not sampled:
            return None
        return self._sampler.draw(logits, [s.request for s in sampled], [s.num_output_tokens for s in sampled])

    def _score_prompts(
        self, step: PreparedStep, outputs: StepOutputs
    ) -> tuple[tuple[Request, tuple[TokenScores, ...]], ...]:
        """Of this group's prompts, end to end and in pieces, as many as the group with most of them has: all groups
        may have to compute logits together."""
        counts = None if step.lock_step is None else step.lock_step.rank_scored
        scores: list[list[TokenScores]] = [[] for _ in step.prompts]
        hidden = outputs.hidden
        for first in range(0, step.most_scored, _SCORED_AT_ONCE):
            assert hidden is not None
            parts = list(_parts(step.prompts, first))
            rows = torch.cat([hidden[:0], *(hidden[p.start + a : p.start + b] for p, _, a, b in parts)])
            rank_rows = None if counts is None else tuple(_clamped(count - first) for count in counts)
            logits = self.runner.model.compute_logits(rows, rank_rows)
            done = 0
            for prompt, number, a, b in parts:
                scores[number].append(self._score(prompt, a, logits[done : done + b - a]))
                done += b - a
        return tuple(
            (prompt.scheduled.request, tuple(pieces)) for prompt, pieces in zip(step.prompts, scores, strict=True)
        )

    def _score(self, prompt: PromptRows, first: int, logits: Tensor) -> TokenScores:
        """Of a prompt's rows from `first` on."""
        request, at = prompt.scheduled.request, prompt.scheduled.start + 1 + first
        targets = np.array(request.prompt_token_ids[at : at + len(logits)], dtype=np.int64)
        return self._sampler.score(logits, upload(targets, logits.device), request.params.prompt_logprobs or 0)


def _parts(prompts: Sequence[PromptRows], first: int) -> Iterator[tuple[PromptRows, int, int, int]]:
    """(prompt, its number, from which of its rows on, up to which) of a piece of all rows, end to end."""
    begin = 0
    for number, prompt in enumerate(prompts):
        end = begin + prompt.stop - prompt.start
        a, b = max(begin, first), min(end, first + _SCORED_AT_ONCE)
        if a < b:
            yield prompt, number, a - begin, b - begin
        begin = end


def _clamped(count: int) -> int:
    return max(0, min(count, _SCORED_AT_ONCE))
