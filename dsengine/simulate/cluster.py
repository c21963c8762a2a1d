"""One instance of a layout serving a workload: real schedulers and caches, steps that take as long as the model says.

Groups step in lock-step. Where there are very many, only some of them are simulated, with their share of the requests:
the others are taken to fare alike, so that the fullest of all is somewhat underrated.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from dsengine.engine.batch import ScheduledBatch
from dsengine.engine.request import Request
from dsengine.engine.sampling_params import SamplingParams
from dsengine.engine.scheduler import Scheduler, SchedulerConfig
from dsengine.memory.block_manager import BlockManager
from dsengine.memory.radix_cache import RadixCache
from dsengine.parallel.prefix_routing import PENDING_WEIGHT
from dsengine.simulate.routing import Router
from dsengine.simulate.step_model import GroupStep, StepModel
from dsengine.simulate.workload import OUTPUT_TOKEN, Conversation, Dialogue

Phase = Literal["both", "prefill", "decode"]
"""What the instance does: all of it, prompts and their first token, or decoding of prompts that arrive computed."""


@dataclass
class Record:
    """What happened in a simulation.

    Attributes:
        steps: for each step its end, its duration, the part of it that is communication, prompt tokens that entered
            (cached or not), prompt tokens that were computed, and output tokens.
        first_token: seconds from arrival to the first token, in the order of first tokens.
        gaps: how often each time between two tokens of a request occurred.
        finished: when each request ended.
    """

    steps: list[tuple[float, float, float, int, int, int]] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    gaps: Counter[float] = field(default_factory=Counter)
    finished: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    hit_tokens: int = 0
    preemptions: int = 0
    imbalance: list[float] = field(default_factory=list)


class Group:
    """One attention group: a scheduler and a cache."""

    def __init__(self, config: SchedulerConfig, num_blocks: int) -> None:
        manager = BlockManager(num_blocks)
        self.cache = RadixCache(manager, config.block_size)
        self.scheduler = Scheduler(config, manager, self.cache)
        self.outstanding = 0
        """Tokens of requests that have not ended, as a router wants them counted."""


@dataclass
class _Open:
    """A request under way."""

    dialogue: Dialogue
    group: int
    latest: float | None = None


class Instance:
    """Attention groups in lock-step.

    Args:
        num_groups: groups that are simulated.
        weight: groups that each of them stands for.
        num_blocks: cache blocks of a group.
        concurrency: conversations that are under way at any time; None: they come when they arrive.
    """

    def __init__(
        self,
        model: StepModel,
        scheduler: SchedulerConfig,
        num_blocks: int,
        router: Router,
        *,
        num_groups: int,
        weight: float = 1.0,
        phase: Phase = "both",
        concurrency: int | None = None,
    ) -> None:
        self.groups = [Group(scheduler, num_blocks) for _ in range(num_groups)]
        self.record = Record()
        self._model, self._router, self._weight, self._phase = model, router, weight, phase
        self._concurrency = concurrency
        self._now = 0.0
        self._open: dict[str, _Open] = {}
        self._ids = itertools.count(2)  # hash(-1) equals hash(-2)
        self._names = itertools.count()

    def run(self, conversations: Sequence[Conversation]) -> Record:
        """Serve all of them to their end."""
        coming = deque(conversations)
        later: list[tuple[float, int, Dialogue]] = []  # next turns, by when they are sent
        while coming or later or self._open:
            self._send_due(coming, later)
            if not self._open:
                # Conversations that wait for their turn, and not for their time, wait for one of `later` to end.
                arrivals = [each.arrival for each in itertools.islice(coming, 1) if self._concurrency is None]
                self._now = min([*arrivals, *(due for due, _, _ in later[:1])])
                continue
            for dialogue in self._step():
                if dialogue.is_over:
                    continue
                think = dialogue.conversation.think_time
                heapq.heappush(later, (self._now + think, next(self._names), dialogue))
        for group in self.groups:
            group.scheduler.check_integrity()
            self.record.prompt_tokens += group.cache.stats.query_tokens
            self.record.hit_tokens += group.cache.stats.hit_tokens
            self.record.preemptions += group.scheduler.stats().num_preemptions
        return self.record

    def _send_due(self, coming: deque[Conversation], later: list[tuple[float, int, Dialogue]]) -> None:
        while later and later[0][0] <= self._now:
            due, _, dialogue = heapq.heappop(later)
            self._send(dialogue, due)
        if self._concurrency is not None:
            while coming and len(self._open) + len(later) < self._concurrency:
                self._send(Dialogue(coming.popleft(), self._ids), self._now)
        while self._concurrency is None and coming and coming[0].arrival <= self._now:
            conversation = coming.popleft()
            self._send(Dialogue(conversation, self._ids), conversation.arrival)

    def _send(self, dialogue: Dialogue, arrival: float) -> None:
        prompt = dialogue.next_prompt()
        chosen = self._router.route(prompt, "", [group.outstanding for group in self.groups])
        name = str(next(self._names))
        output = 1 if self._phase == "prefill" else dialogue.output_len
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        self.groups[chosen].scheduler.add(Request(name, prompt, params, arrival_time=arrival))
        self.groups[chosen].outstanding += PENDING_WEIGHT * len(prompt)
        self._open[name] = _Open(dialogue, chosen)

    def _step(self) -> list[Dialogue]:
        """One step of all groups; returns the dialogues in which something was answered."""
        batches = [group.scheduler.schedule(self._now) for group in self.groups]
        works = [self._work(batch) for batch in batches]
        time = self._model.seconds(works, self._weight)
        entered = sum(
            item.start + item.num_tokens
            for batch in batches
            for item in batch.requests
            if item.samples and item.start + item.num_tokens == item.request.num_prompt_tokens
        )
        self._now += time.total
        answered = []
        drawn = 0
        for group, batch in zip(self.groups, batches, strict=True):
            group.scheduler.advance(batch)
            sampled = [(OUTPUT_TOKEN,) if item.samples else () for item in batch.requests]
            ended = group.scheduler.commit(batch, sampled)
            drawn += self._note_tokens(group, batch)
            answered += [self._end(request) for request in ended]
        prompts = sum(work.prompt_tokens for work in works)
        self.record.steps.append((self._now, time.total, time.communication, entered, prompts, drawn))
        tokens = [work.tokens for work in works]
        self.record.imbalance.append(max(tokens) * len(tokens) / max(sum(tokens), 1))
        return answered

    def _work(self, batch: ScheduledBatch) -> GroupStep:
        decodes = context = tokens = pairs = expanded = samples = 0
        for item in batch.requests:
            end = item.start + item.num_tokens
            samples += item.samples
            if item.num_tokens == 1 and item.start >= item.request.num_prompt_tokens:
                decodes += 1
                context += end
            elif self._phase != "decode":
                tokens += item.num_tokens
                pairs += item.num_tokens * item.start + item.num_tokens * (item.num_tokens + 1) // 2
                expanded += end
        return GroupStep(decodes, context, tokens, pairs, expanded, samples)

    def _note_tokens(self, group: Group, batch: ScheduledBatch) -> int:
        gaps, count, now = self.record.gaps, 0, self._now
        for item in batch.requests:
            if item.samples:
                under_way = self._open[item.request.request_id]
                count += 1
                if under_way.latest is None:
                    group.outstanding -= (PENDING_WEIGHT - 1) * item.request.num_prompt_tokens
                    self.record.first_token.append(now - item.request.arrival_time)
                else:
                    gaps[now - under_way.latest] += 1
                under_way.latest = now
        group.outstanding += count
        return count

    def _end(self, request: Request) -> Dialogue:
        under_way = self._open.pop(request.request_id)
        self.groups[under_way.group].outstanding -= request.num_tokens
        self.record.finished.append(self._now)
        dialogue = under_way.dialogue
        dialogue.answered()
        self._router.finished(under_way.group, request.prompt_token_ids + request.output_token_ids, "")
        return dialogue
