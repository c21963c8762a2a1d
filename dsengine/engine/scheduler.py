"""What the next step computes: continuous batching under one token budget, as a simulation without tensors or clocks.

There is no prefill and no decode phase: a request has known tokens and computed tokens, and the difference is what it
still needs; one token of it is a decode, more are a prompt (or the recomputation after a preemption), done in chunks.

A step is filled in this order:

1. running requests that need one token, so that no decode waits behind a prompt;
2. running requests that need more, as far as the budget goes;
3. waiting requests, by priority, within one by `admission_score`; the first that does not fit ends the round, so that
   nothing small slips past something big for ever. One is passed over if a running request computes the next block
   of its prefix at this moment: it will find it in the cache soon.

Admission reserves the blocks of all known tokens and keeps clear some room for the output of those that run, so that
preemption is rare. Where it is needed it takes the least important running request (lowest priority, then youngest),
which loses its blocks but finds most of its prefix in the cache when it resumes, at the front of the queue. A running
request never takes blocks from a more important one, and the most important one can take everybody's; as no request
may grow larger than the pool, it always gets on, and there is neither deadlock nor livelock.

Where drafts are wanted, decodes get a tree each from what the decodes have left of the budget (half of it while prompts
are waiting for theirs) and of the blocks; nobody is preempted for a draft.

A step's results may come late. `advance` counts a step as computed as soon as it is launched, with its new tokens as
yet unknown; `commit` enters them when they are there. One step may be scheduled and launched in between: it needs
the counts and the blocks, but no token's value.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from operator import attrgetter

from dsengine.engine.batch import ScheduledBatch, ScheduledRequest
from dsengine.engine.latency import Demand
from dsengine.engine.messages import EngineStats, FinishReason, SpeculationStats
from dsengine.engine.policy import SchedulerConfig, check_prompt_length
from dsengine.engine.prefix_sharing import PrefixSharing
from dsengine.engine.request import Request, RequestStatus
from dsengine.engine.reservations import Reservations
from dsengine.engine.sequence_state import SequenceState, WaitingQueue
from dsengine.engine.stopping import StopRule
from dsengine.engine.turns import Turns
from dsengine.memory.block_manager import BlockManager
from dsengine.memory.radix_cache import RadixCache
from dsengine.specdec.controller import Load
from dsengine.specdec.shape import TreeShape

__all__ = ["Scheduler", "SchedulerConfig"]

_RANK = attrgetter("rank")


class Scheduler:
    """Decides what each step computes and keeps the books of requests and blocks.

    Each step goes through `schedule`, `advance` and `commit`; the next one may be scheduled and advanced before the
    commit. `add`, `abort` and `fail` may come at any time.

    Args:
        radix_cache: None computes every prompt in full.
    """

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager, radix_cache: RadixCache | None) -> None:
        self.config = config
        self._manager = block_manager
        self._cache = radix_cache
        self._sharing = PrefixSharing(block_manager, radix_cache, config.block_size, config.lookahead)
        self._reservations = Reservations(config, block_manager)
        self._turns = Turns(config, self._sharing)
        # A request alone must fit the pool to its end.
        self.max_tokens_per_request = min(config.context_length, block_manager.num_blocks * config.block_size)
        self._max_running = min(config.max_running_requests, config.token_budget)
        self._states: dict[str, SequenceState] = {}
        self._waiting = WaitingQueue()
        self._running: list[SequenceState] = []
        self._preempted: list[Request] = []
        self._num_added = 0
        self._num_preemptions = 0
        self._budget = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._states)

    def check_prompt(self, length: int) -> None:
        """Proves that a prompt of so many tokens can run.

        Raises:
            ValueError: it is empty or can never fit.
        """
        check_prompt_length(length, self.config, self._manager.num_blocks)

    def add(self, request: Request) -> None:
        """Queues a new request.

        Raises:
            ValueError: its prompt is empty or can never fit, or its id is in use.
        """
        if request.request_id in self._states:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self.check_prompt(request.num_prompt_tokens)
        state = SequenceState(request, self._num_added, StopRule.of(request, self.max_tokens_per_request))
        self._sharing.track(state)
        self._num_added += 1
        request.status = RequestStatus.WAITING
        self._states[request.request_id] = state
        self._waiting.append(state)

    def abort(self, request_id: str) -> Request | None:
        """Ends a request at once; None when there is none of this id, or no longer."""
        state = self._states.get(request_id)
        if state is None:
            return None
        self._finish(state, "abort", None)
        return state.request

    def fail(self, request: Request, message: str) -> None:
        """Ends a request whose numbers went wrong; what it computed leaves the cache, where nobody else uses it."""
        if not self.holds(request):
            return
        state = self._states[request.request_id]
        request.error = message
        self._finish(state, "error", None)
        self._sharing.discard(state)

    def flush_cache(self) -> bool:
        """Forgets all cached prefixes; refused (False) while requests are running."""
        if self._running:
            return False
        if self._cache is not None:
            self._cache.flush()
        return True

    def load(self) -> Load:
        """How many running requests could have a tree, and their mean length."""
        lengths = [state.num_tokens for state in self._running if state.can_draft]
        return Load(len(lengths), sum(lengths) // max(len(lengths), 1))

    def demand(self, now: float) -> Demand:
        """What the next step has to do, at a time on the clock of the requests' `arrival_time`."""
        prompts = [s for s in self._running if s.num_tokens - s.request.num_computed_tokens > 1]
        decoding = len(self._running) - len(prompts)
        first = prompts[0] if prompts else next(iter(self._waiting), None)
        if first is None:
            return Demand(decoding)
        context = first.request.num_computed_tokens or self._sharing.find(first) * self.config.block_size
        return Demand(decoding, first.num_tokens - context, context, now - first.request.arrival_time)

    def schedule(
        self, now: float, tree: TreeShape | None = None, *, only_proposals: bool = False, budget: int | None = None
    ) -> ScheduledBatch:
        """Chooses the tokens of the next step; empty only if there is no work, or all of it waits for a commit.

        Args:
            now: seconds, on the clock of the requests' `arrival_time`.
            tree: shape of the drafts for requests that decode; the step must then be committed before the next one is
                scheduled.
            only_proposals: drafts are for requests with a proposal alone.
            budget: tokens of this step, no fewer than running requests; None: as configured.
        """
        self._budget = self.config.token_budget if budget is None else max(budget, len(self._running))
        self._preempted = []
        for state in self._running:
            state.num_scheduled = state.num_drafts = 0
        others = self._schedule_decodes()
        if tree is not None:
            self._add_drafts(tree, 0.5 if others or self._waiting else 1.0, only_proposals)
        for state in others:
            if state.is_running and self._budget > 0:
                self._schedule_chunk(state)
        if not self._preempted and self._waiting:
            self._admit(now)
        batch = []
        for state in self._running:
            count = state.num_scheduled
            if count:
                start = state.request.num_computed_tokens
                samples = start + count - state.num_drafts == state.num_tokens
                awaits = samples and state.num_pending > 0
                batch.append(ScheduledRequest(state.request, start, count, samples, awaits, state.num_drafts))
        return ScheduledBatch(batch, self._preempted, tree, only_proposals)

    def _schedule_decodes(self) -> list[SequenceState]:
        """Schedules requests that need one token; returns those that need more."""
        block_size, running = self.config.block_size, self._running
        others = []
        i = 0
        while i < len(running):  # preemption shortens the list, behind i
            state = running[i]
            computed = state.request.num_computed_tokens
            if state.num_tokens - computed > 1:
                others.append(state)
            elif state.num_pending and state.has_all_tokens:
                pass  # it ends when the token on its way is there
            elif computed < len(state.request.block_table) * block_size or self._take_block(state):
                state.num_scheduled = 1
                self._budget -= 1
            i += 1
        return others

    def _add_drafts(self, tree: TreeShape, share: float, only_proposals: bool) -> None:
        """Gives scheduled decodes a tree each, from `share` of the budget that is left."""
        # Also those that may have one token more only: a step of nothing but trees can run as a captured graph.
        count, budget = tree.num_nodes - 1, int(self._budget * share)
        for state in self._running:
            if budget < count:
                return
            end = state.request.num_computed_tokens + tree.num_slots
            if state.num_scheduled == 0 or not state.can_draft or end > self.max_tokens_per_request:
                continue
            if only_proposals and not state.request.proposal:
                continue
            missing = self.config.blocks_for(end) - len(state.request.block_table)
            if missing > self._reservations.unreserved:
                continue
            if missing > 0:
                self._allocate(state, missing)
            state.num_drafts = count
            state.num_scheduled += count
            self._budget -= count
            budget -= count

    def _take_block(self, state: SequenceState) -> bool:
        """One more block for a running request, from less important ones if need be."""
        while self._manager.num_available < 1:
            victim = self._running[-1]
            if victim is state:
                return False  # it waits, with what it has, for one of the more important ones to finish
            self._preempt(victim)
        self._allocate(state, 1)
        return True

    def _schedule_chunk(self, state: SequenceState) -> None:
        config, request = self.config, state.request
        computed = request.num_computed_tokens
        count = min(state.num_tokens - computed, self._budget)
        missing = config.blocks_for(computed + count) - len(request.block_table)
        while missing > self._manager.num_available and self._running[-1] is not state:
            self._preempt(self._running[-1])
        if missing > self._manager.num_available:
            missing = self._manager.num_available
            count = (len(request.block_table) + missing) * config.block_size - computed
        if count > 0:
            if missing > 0:
                self._allocate(state, missing)
            state.num_scheduled = count
            self._budget -= count

    def _allocate(self, state: SequenceState, num_blocks: int) -> None:
        state.request.block_table += self._sharing.allocate(num_blocks)
        self._reservations.draw(state, num_blocks)

    def _admit(self, now: float) -> None:
        for group in self._waiting.window(self.config.waiting_window):
            if self._budget == 0:
                return
            went_on = self._admit_group(group, now)
            self._turns.count_overtakes(group)
            if not went_on:
                return

    def _admit_group(self, group: Sequence[SequenceState], now: float) -> bool:
        """Admits requests of one priority; False ends the round."""
        if len(self._running) >= self._max_running and self._running[-1].request.priority >= group[0].request.priority:
            return False
        for state in sorted(group, key=lambda s: (-self._turns.score(s, now), s.arrival)):
            if self._budget == 0:
                return False
            # What was found for the score may have been evicted for a request admitted since.
            self._sharing.find(state)
            if not self._turns.has_come(state) and self._sharing.is_in_the_making(state):
                continue
            if not self._fits(state) and not self._make_room(state):
                return False
            self._start(state)
            state.request.note_admission(now)
        return True

    def _fits(self, state: SequenceState) -> bool:
        """The request can be admitted: a place, its blocks, and room for the output of all."""
        if not self._running:
            return True
        if len(self._running) >= self._max_running:
            return False
        needed, spare = self._reservations.needed(state), self._reservations.spare
        matched = state.num_matched
        if needed <= spare:
            return True
        if needed - matched > spare:
            return False
        return needed - matched + self._sharing.count_idle(state) <= spare

    def _make_room(self, state: SequenceState) -> bool:
        """Preempts requests of lower priority, if that helps `state` in."""
        priority = state.request.priority
        victims = []
        for victim in reversed(self._running):
            if victim.request.priority >= priority:
                break
            victims.append(victim)
        everyone = len(victims) == len(self._running)
        needed = self._reservations.needed(state) - state.num_matched
        spare = self._reservations.spare
        spare += sum(len(v.request.block_table) + v.reserved + v.growth for v in victims)
        if not victims or (needed > spare and not everyone):
            return False
        for victim in victims:
            self._preempt(victim)
            if self._fits(state):
                return True
        return False

    def _start(self, state: SequenceState) -> None:
        request = state.request
        self._waiting.remove(state)
        self._sharing.acquire(state)
        insort(self._running, state, key=_RANK)
        state.is_running = True
        state.can_draft = False
        request.status = RequestStatus.RUNNING
        self._reservations.open(state)
        self._schedule_chunk(state)

    def _stop_running(self, state: SequenceState) -> None:
        del self._running[bisect_left(self._running, state.rank, key=_RANK)]
        state.is_running = False
        self._reservations.close(state)
        self._budget += state.num_scheduled
        state.num_scheduled = state.num_drafts = 0
        self._sharing.release(state)

    def _preempt(self, state: SequenceState) -> None:
        request = state.request
        self._stop_running(state)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = state.num_settled = 0
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._sharing.track(state)
        self._waiting.push_front(state)
        self._preempted.append(request)

    def _finish(self, state: SequenceState, reason: FinishReason, stop_reason: int | None) -> None:
        request = state.request
        if state.is_running:
            self._stop_running(state)
        else:
            self._waiting.remove(state)
        del self._states[request.request_id]
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason

    def advance(self, batch: ScheduledBatch) -> None:
        """Counts a scheduled step, which has been launched, as computed; the tokens it draws are still to come."""
        states = self._states
        for item in batch.requests:
            request = item.request
            state = states.get(request.request_id)
            if state is None or state.request is not request or state.num_scheduled == 0:
                continue  # aborted since
            assert request.num_computed_tokens == item.start, "schedule and advance do not alternate"
            state.num_scheduled = 0
            request.num_computed_tokens = item.start + item.num_tokens - item.num_drafts
            if item.samples:
                state.num_tokens += 1
                state.num_pending += 1

    def commit(self, batch: ScheduledBatch, sampled: Sequence[Sequence[int]]) -> list[Request]:
        """Enters the results of a step that was advanced: new tokens, whole blocks, finished requests (returned).

        Requests that have ended since the step was scheduled are passed over: what it drew for them is dropped. So is
        what it drew for a request after the token that ends it.

        Args:
            sampled: for each scheduled request its new tokens: none where it does not sample, several where drafts
                were accepted.
        """
        finished = []
        states, sharing, block_size = self._states, self._sharing, self.config.block_size
        for item, tokens in zip(batch.requests, sampled, strict=True):
            request = item.request
            state = states.get(request.request_id)
            if state is None or state.request is not request:
                continue
            assert (len(tokens) > 0) == item.samples and len(tokens) <= 1 + item.num_drafts, (
                f"request {request.request_id!r} has a token too many or too few"
            )
            computed, verdict = item.start + item.num_tokens - item.num_drafts, None
            if tokens:
                verdict = state.enter(tokens)
                if item.num_drafts:
                    computed = request.num_computed_tokens
            if state.is_running:  # else it was preempted while the step was under way, and its blocks are gone
                state.num_settled = computed
                if item.num_tokens > 1 or computed % block_size == 0:
                    sharing.publish(state)
            if verdict is not None:
                self._finish(state, *verdict)
                finished.append(request)
        return finished

    def holds(self, request: Request) -> bool:
        """Whether the request is waiting or running."""
        state = self._states.get(request.request_id)
        return state is not None and state.request is request

    def stats(self, num_steps: int = 0, speculation: SpeculationStats | None = None) -> EngineStats:
        """A snapshot; steps and drafts are counted by the engine."""
        lookups = self._cache.stats if self._cache is not None else None
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks=self._manager.num_blocks,
            num_blocks_in_use=self._manager.num_in_use,
            num_blocks_cached=self._manager.num_cached,
            prefix_query_tokens=lookups.query_tokens if lookups is not None else 0,
            prefix_hit_tokens=lookups.hit_tokens if lookups is not None else 0,
            num_preemptions=self._num_preemptions,
            num_steps=num_steps,
            speculation=speculation,
        )

    def check_integrity(self) -> None:
        """Proves that every block is free, cached or owned, exactly as counted, and every request in one place.

        Raises:
            AssertionError: something is leaked, lost or counted wrongly.
        """
        running, waiting = self._running, list(self._waiting)
        self._sharing.check_integrity(running)
        assert {id(s) for s in running + waiting} == {id(s) for s in self._states.values()}, "a request is lost"
        assert len(running) + len(waiting) == len(self._states) and len(waiting) == len(self._waiting)
        assert [s.rank for s in running] == sorted(s.rank for s in running), "running requests are out of order"
        self._reservations.check_integrity(running)
        for state in running:
            assert state.is_running
            assert len(state.request.block_table) >= self.config.blocks_for(state.request.num_computed_tokens)
        for state in running + waiting:
            state.check_integrity()
