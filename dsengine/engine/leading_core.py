"""The engine that rank 0 shows to whoever drives it, when several ranks run the model.

It looks like an `EngineCore`, and has one, over rank 0's part of the model. What is asked of it is gathered until the
next step and told to all ranks at once, together with the time: a tick. Then every rank, this one included, does the
same with the same words. Without attention-DP all ranks share all requests; with it every request belongs to one group
of ranks, and what the groups made of a step comes back here.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from dsengine.engine.core import EngineCore
from dsengine.engine.messages import (
    MAINTENANCE,
    AbortRequests,
    AddRequest,
    CallName,
    DropGrammar,
    EngineInfo,
    EngineInput,
    EngineStats,
    LoadGrammar,
    LoadVocabulary,
    RequestUpdate,
    SpeculationStats,
    StepOutput,
)
from dsengine.model.deepseek import DeepseekModel
from dsengine.parallel.groups import World
from dsengine.parallel.launch import RankProcesses
from dsengine.parallel.prefix_routing import PENDING_WEIGHT, PrefixRouter
from dsengine.parallel.watchdog import RanksFailedError, Watchdog

EVERYBODY = -1
_IDS_IN_REPORT = 20
_ENDING_SECONDS = 3.0


class Tick(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 tells all ranks before they do something together.

    Attributes:
        now: the time of everything that follows.
        messages: each with the attention-DP group that it is for, or `EVERYBODY`.
        steps: a step follows.
        call: a question that every rank answers, with its `argument`.
        stops: it was the last tick.
    """

    now: float
    messages: list[tuple[int, EngineInput]] = []
    steps: bool = False
    call: CallName | None = None
    stops: bool = False
    argument: str = ""

    @property
    def takes_long(self) -> bool:
        """It may take as long as loading a checkpoint does."""
        return self.call in MAINTENANCE


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What a rank says after a tick without a step.

    Attributes:
        result: of the call, if there was one; and `error`, if it could not be answered.
        output: requests that the tick brought and that this rank refused; and how it stands.
    """

    output: StepOutput
    result: dict[str, object] = {}
    error: str | None = None


@dataclass
class _Open:
    """A request that has not ended: where it is, its tokens so far, and what its prompt weighs beyond its tokens."""

    group: int
    salt: str
    token_ids: list[int]
    pending: int


class LeadingCore:
    """Rank 0.

    Args:
        core: of this rank.
        processes: the ranks of this machine, which it has started.
        router: of requests to attention-DP groups.
        info: of the engine as a whole.
        resources: to be given back when the ranks have ended.
    """

    def __init__(
        self,
        core: EngineCore,
        world: World,
        processes: RankProcesses,
        watchdog: Watchdog,
        router: PrefixRouter,
        info: EngineInfo,
        resources: contextlib.ExitStack,
    ) -> None:
        self.info = info
        self.grammars = _Grammars(self._tell)
        self._core = core
        self._world = world
        self._processes = processes
        self._watchdog = watchdog
        self._router = router
        self._resources = resources
        self._outbox: list[tuple[int, EngineInput]] = []
        self._open: dict[str, _Open] = {}
        self._loads = [0] * world.dp_size
        self._late: list[RequestUpdate] = []
        self._now = 0.0
        self._stats = [core.stats()] * world.dp_size
        self._encoder = msgspec.msgpack.Encoder()
        self._output_decoder = msgspec.msgpack.Decoder(StepOutput)
        self._answer_decoder = msgspec.msgpack.Decoder(Answer)

    @property
    def model(self) -> DeepseekModel:
        """Refused: what is done with a part of a model, all ranks would have to do.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"this needs the whole model in one process, but tp_size is {self._world.size}; make it 1")

    @property
    def has_work(self) -> bool:
        return bool(self._outbox) or any(s.num_running or s.num_waiting for s in self._stats)

    def add_request(self, message: AddRequest, now: float) -> None:
        """Queue a request, as `EngineCore.add_request`; it arrives with the next tick."""
        self._core.check_request(message)
        if message.request_id in self._open:
            raise ValueError(f"request id {message.request_id!r} is in use")
        if message.grammar is not None:
            self.grammars.check(message.grammar.key)
        prompt, salt = message.prompt_token_ids, message.cache_salt
        group = self._router.route(prompt, salt, self._loads)
        self._open[message.request_id] = _Open(group, salt, list(prompt), (PENDING_WEIGHT - 1) * len(prompt))
        self._loads[group] += PENDING_WEIGHT * len(prompt)
        self._tell(group, message)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; unknown ids are fine."""
        for request_id in request_ids:
            if request_id in self._open:
                self._tell(self._open[request_id].group, AbortRequests([request_id]))
                self._forget(request_id)

    def step(self, now: float) -> StepOutput:
        """One step of all ranks.

        Raises:
            RanksFailedError: some cannot go on, and so no rank can.
        """
        with self._watchdog.over(self._describe_step()):
            updates = self._tick(Tick(now, self._take_outbox(), steps=True))
            output = self._core.step(now)
            outputs = self._gather(StepOutput([*updates, *output.updates], output.stats))
        return self._merge(outputs)

    def show_life(self, now: float) -> StepOutput:
        """Let the other ranks know that this one is there, and make sure that they are; no step is taken."""
        self._ask(None, now)
        return self._merge([])

    def stats(self) -> EngineStats:
        """Of all groups together, with those of each beside them where there are several."""
        return merge_stats(self._stats)

    def flush_cache(self) -> bool:
        """Forget all cached prefixes on all ranks; refused (False) while requests are running."""
        if any(stats.num_running for stats in self._stats):
            return False
        for group in range(self._world.dp_size):
            self._router.flushed(group)
        return all(answer.result["flushed"] for answer in self._ask("flush_cache"))

    def maintain(self, name: CallName, argument: str) -> int:
        """Sleep, wake up or take other weights, as `EngineCore.maintain`."""
        own, *_ = self._ask(name, argument=argument)
        for group, stats in enumerate(self._stats):
            if stats.num_blocks_cached == 0:
                self._router.flushed(group)
        if own.error is not None:
            raise ValueError(own.error)
        return own.output.stats.sleep_level

    def check_integrity(self) -> None:
        """Prove that every cache block of every rank is free, cached or owned, exactly as counted."""
        for rank, answer in enumerate(self._ask("check_integrity")):
            assert answer.error is None, f"rank {rank}: {answer.error}"

    def close(self) -> None:
        """End the other ranks, in good order if they still answer."""
        if not self._watchdog.has_failed:
            with contextlib.suppress(RanksFailedError), self._watchdog.over("the end"):
                self._tick(Tick(self._now, stops=True))
                self._watchdog.stop()
                self._processes.wait(_ENDING_SECONDS)
        self.give_up()

    def give_up(self) -> None:
        """End the other ranks at once."""
        self._watchdog.stop()
        self._processes.close()
        self._world.close()
        self._resources.close()

    def _describe_step(self) -> str:
        ids = list(self._open)
        more = f" and {len(ids) - _IDS_IN_REPORT} more" if len(ids) > _IDS_IN_REPORT else ""
        return f"step {self._core.num_steps + 1} with requests {', '.join(ids[:_IDS_IN_REPORT]) or 'none'}{more}"

    def _follow(self, update: RequestUpdate) -> None:
        request = self._open.get(update.request_id)
        if request is None:
            return
        request.token_ids.extend(update.new_token_ids)
        if update.new_token_ids:
            self._loads[request.group] += len(update.new_token_ids) - request.pending
            request.pending = 0
        if update.finish_reason is not None:
            self._router.finished(request.group, request.token_ids, request.salt)
            self._forget(update.request_id)

    def _forget(self, request_id: str) -> None:
        request = self._open.pop(request_id)
        self._loads[request.group] -= len(request.token_ids) + request.pending

    def _tell(self, group: int, message: EngineInput) -> None:
        self._outbox.append((group, message))

    def _take_outbox(self) -> list[tuple[int, EngineInput]]:
        messages, self._outbox = self._outbox, []
        return messages

    def _tick(self, tick: Tick) -> list[RequestUpdate]:
        self._now = tick.now
        self._world.broadcast_bytes(self._encoder.encode(tick), 0)
        return apply_messages(self._core, tick, self._world.dp_rank)

    def _gather(self, output: StepOutput) -> list[StepOutput]:
        """The outputs of all groups, in their order."""
        if self._world.dp_size == 1:
            return [output]
        data = self._world.gather_bytes(b"", 0)
        assert data is not None
        leaders = data[self._world.attention.size :: self._world.attention.size]
        return [output, *(self._output_decoder.decode(item) for item in leaders)]

    def _ask(self, call: CallName | None, now: float | None = None, argument: str = "") -> list[Answer]:
        """The answers of all ranks; what they refused is told after the next step."""
        tick = Tick(self._now if now is None else now, self._take_outbox(), call=call, argument=argument)
        what = f"the call {call}" if call is not None else "a rest between steps"
        with self._watchdog.over(what, limited=not tick.takes_long):
            updates = self._tick(tick)
            own = answer_call(self._core, tick, updates)
            data = self._world.gather_bytes(b"", 0)
        assert data is not None
        answers = [own, *(self._answer_decoder.decode(item) for item in data[1:])]
        for answer in answers[:: self._world.attention.size]:
            self._late += answer.output.updates
        self._stats = [answer.output.stats for answer in answers[:: self._world.attention.size]]
        return answers

    def _merge(self, outputs: Sequence[StepOutput]) -> StepOutput:
        """What all groups say, and what was left over from calls."""
        if outputs:
            self._stats = [output.stats for output in outputs]
        updates = [*self._late, *(update for output in outputs for update in output.updates)]
        self._late.clear()
        for update in updates:
            self._follow(update)
        return StepOutput(updates, self.stats())


class _Grammars:
    """Passes what `GrammarStore` is told on to all ranks."""

    def __init__(self, tell: Callable[[int, EngineInput], None]) -> None:
        self._tell = tell
        self._keys: set[str] = set()

    def load_vocabulary(self, tokens: Sequence[bytes], stop_token_ids: Sequence[int]) -> None:
        self._keys.clear()
        self._tell(EVERYBODY, LoadVocabulary(list(tokens), list(stop_token_ids)))

    def load(self, key: str, data: str) -> None:
        self._keys.add(key)
        self._tell(EVERYBODY, LoadGrammar(key, data))

    def drop(self, key: str) -> None:
        self._keys.discard(key)
        self._tell(EVERYBODY, DropGrammar(key))

    def check(self, key: str) -> None:
        if key not in self._keys:
            raise ValueError(f"no grammar {key!r} has been loaded")


def apply_messages(core: EngineCore, tick: Tick, group: int) -> list[RequestUpdate]:
    """Do what a tick says to this rank; returns the refusals of requests."""
    refused = []
    for addressee, message in tick.messages:
        if addressee not in (group, EVERYBODY):
            continue
        match message:
            case AddRequest():
                try:
                    core.add_request(message, tick.now)
                except ValueError as error:
                    refused.append(
                        RequestUpdate(message.request_id, finish_reason="error", error=str(error), rejected=True)
                    )
            case AbortRequests():
                core.abort(message.request_ids)
            case LoadVocabulary():
                core.grammars.load_vocabulary(message.tokens, message.stop_token_ids)
            case LoadGrammar():
                core.grammars.load(message.key, message.data)
            case DropGrammar():
                core.grammars.drop(message.key)
    return refused


def answer_call(core: EngineCore, tick: Tick, refused: list[RequestUpdate]) -> Answer:
    """This rank's answer to the call of a tick.

    Args:
        refused: by `apply_messages` of the same tick.
    """
    result: dict[str, object] = {}
    failure = None
    if tick.call == "flush_cache":
        result = {"flushed": core.flush_cache()}
    elif tick.call == "check_integrity":
        try:
            core.check_integrity()
        except AssertionError as error:
            failure = str(error) or "an assertion failed"
    elif tick.call in MAINTENANCE:
        try:
            core.maintain(tick.call, tick.argument)
        except ValueError as error:
            failure = str(error)
    else:
        assert tick.call is None, f"no rank is asked for {tick.call}"
    return Answer(StepOutput(refused, core.stats()), result, failure)


def merge_stats(groups: Sequence[EngineStats]) -> EngineStats:
    """The sums over all groups."""
    if len(groups) == 1:
        return groups[0]
    counts = [field.name for field in msgspec.structs.fields(EngineStats) if field.type is int]
    summed = {name: sum(getattr(stats, name) for stats in groups) for name in counts}
    alike = {name: getattr(groups[0], name) for name in ("num_steps", "sleep_level")}
    drafted = [stats.speculation for stats in groups if stats.speculation is not None]
    return EngineStats(
        **(summed | alike),
        speculation=_merge_speculation(drafted) if drafted else None,
        experts=groups[0].experts,
        groups=tuple(groups),
    )


def _merge_speculation(groups: Sequence[SpeculationStats]) -> SpeculationStats:
    """Counts of all groups; they draft at the same time, so that the seconds are those of the first."""
    steps: Counter[str] = Counter()
    for stats in groups:
        steps.update(stats.steps)
    return msgspec.structs.replace(
        groups[0],
        num_drafts=sum(stats.num_drafts for stats in groups),
        num_accepted=sum(stats.num_accepted for stats in groups),
        lengths=[sum(counts) for counts in zip(*(stats.lengths for stats in groups), strict=True)],
        tried=[sum(counts) for counts in zip(*(stats.tried for stats in groups), strict=True)],
        steps=dict(steps),
    )
