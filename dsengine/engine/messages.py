"""What crosses the socket between the front end and an engine: msgpack of these types and nothing else.

The same types serve the in-process engine, so that offline and online runs share one path.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from dsengine.engine.memory_ledger import MemoryLedger
from dsengine.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]
CallName = Literal[
    "flush_cache", "stats", "info", "check_integrity", "pause", "continue", "sleep", "wake_up", "update_weights"
]
MAINTENANCE: frozenset[CallName] = frozenset({"sleep", "wake_up", "update_weights"})
"""Calls that may take as long as loading a checkpoint does, in which nothing is heard of the engine."""


# Errors of requests that the front end tells apart.
GRAMMAR_TOO_SLOW = "following the grammar takes too much time"
GRAMMAR_LEFT = "the output has left its grammar"


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one chosen (or prompt) token, with the likeliest alternatives, best first.

    Values are those of the distribution after logit processing (penalties, bias) but before temperature and filters.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class GrammarUse(msgspec.Struct, frozen=True, array_like=True):
    """The grammar that an output must follow.

    Attributes:
        key: of a grammar sent before.
        after: the token behind which it begins; None: at once.
    """

    key: str
    after: int | None = None


class AddRequest(msgspec.Struct, frozen=True, tag="add"):
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    grammar: GrammarUse | None = None


class AbortRequests(msgspec.Struct, frozen=True, tag="abort"):
    request_ids: list[str]


class LoadVocabulary(msgspec.Struct, frozen=True, tag="vocabulary"):
    """What the tokens spell, for grammars: sent once, before the first of them."""

    tokens: list[bytes]
    stop_token_ids: list[int]


class LoadGrammar(msgspec.Struct, frozen=True, tag="grammar"):
    key: str
    data: str


class DropGrammar(msgspec.Struct, frozen=True, tag="drop_grammar"):
    key: str


class Call(msgspec.Struct, frozen=True, tag="call"):
    """A question to the engine outside the request path; answered by one `Reply` with the same id.

    Attributes:
        argument: of "sleep" the level, of "update_weights" the checkpoint's folder.
    """

    call_id: int
    name: CallName
    argument: str = ""


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    pass


EngineInput = AddRequest | AbortRequests | LoadVocabulary | LoadGrammar | DropGrammar | Call | Shutdown


class RequestUpdate(msgspec.Struct, frozen=True, tag="update"):
    """New tokens of one request after one step; the last one carries `finish_reason`.

    Attributes:
        stop_reason: the stop token id that matched, if one did.
        cached_tokens: prompt tokens found in the prefix cache when the request was first admitted.
        error: what went wrong, when `finish_reason` is "error".
        rejected: the request was refused before it ran, for a reason the client can mend.
        num_drafts: drafted tokens that were verified for these, and `num_accepted` how many of them were kept.
        queue_seconds: with the first tokens: how long the request waited until it was first computed.
    """

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    error: str | None = None
    rejected: bool = False
    num_drafts: int = 0
    num_accepted: int = 0
    queue_seconds: float = 0.0


class SpeculationStats(msgspec.Struct, frozen=True):
    """What has come of drafting since the engine started.

    Attributes:
        shape: of the latest trees, as steps/topk/nodes; "none" while nothing is drafted.
        num_drafts: drafted tokens that were verified.
        num_accepted: drafts that became tokens; `lengths` also count what stood behind the end of an answer.
        lengths: trees by the number of drafts accepted from them.
        tried: trees whose path reached depth 1, 2, … or ended just before it.
        steps: steps by the shape of their trees.
        seconds: spent drafting, verifying, accepting and letting the drafter catch up.
    """

    shape: str
    num_drafts: int
    num_accepted: int
    lengths: list[int]
    tried: list[int]
    steps: dict[str, int]
    seconds: dict[str, float]

    @property
    def total_length(self) -> int:
        """Of all paths together."""
        return sum(count * length for length, count in enumerate(self.lengths))

    @property
    def tokens_per_tree(self) -> float:
        """Tokens of one request in one step with a tree, the model's own included; nan before the first."""
        trees = sum(self.lengths)
        return (trees + self.total_length) / trees if trees else float("nan")

    def acceptance(self, depth: int) -> float:
        """Share of the drafts at `depth` (from 1) that were accepted, where the one before was; nan: none was tried."""
        tried = self.tried[depth - 1]
        return sum(self.lengths[depth:]) / tried if tried else float("nan")


class ExpertStats(msgspec.Struct, frozen=True):
    """How evenly the ranks share the work of routed experts; as in `ExpertBalance`."""

    looks: int
    moved: int
    step_imbalance: float
    worst_layer_imbalance: float


class EngineStats(msgspec.Struct, frozen=True, tag="stats"):
    """A snapshot of the scheduler and the cache, sent with every step's outputs.

    Attributes:
        experts: how evenly ranks share the work of routed experts, where these are balanced.
        groups: the same of each attention-DP group, where there are several; their sums stand above.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_in_use: int = 0
    num_blocks_cached: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_jumped_tokens: int = 0
    sleep_level: int = 0
    token_budget: int = 0
    speculation: SpeculationStats | None = None
    experts: ExpertStats | None = None
    groups: tuple[EngineStats, ...] = ()


class StepOutput(msgspec.Struct, frozen=True, tag="step"):
    updates: list[RequestUpdate]
    stats: EngineStats


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    call_id: int
    result: dict[str, object]


class RankInfo(msgspec.Struct, frozen=True):
    """One of the processes that run the model together.

    Attributes:
        dp_rank: its group, of those that have requests and a cache of their own.
        node_rank: its machine.
        memory: where its device's memory goes.
    """

    rank: int
    dp_rank: int
    node_rank: int
    pid: int
    device: str
    memory: MemoryLedger | None = None


class EngineInfo(msgspec.Struct, frozen=True, tag="ready"):
    """Sent once, when the engine can take requests.

    Attributes:
        cuda_graph_bs: batch sizes whose decode step was captured.
        overlap_schedule: each step is prepared while the one before it runs.
        speculation: algorithm and largest tree, as in "NEXTN 3/4/8 adaptive"; empty if nothing is drafted.
        memory: where the device's memory goes; of rank 0, where there are several.
        ranks: all processes that run the model, where there are several.
    """

    model: str
    context_length: int
    block_size: int
    num_blocks: int
    vocab_size: int
    dtype: str
    device: str
    kernels: dict[str, str]
    load_seconds: float
    kv_cache_dtype: str = ""
    cuda_graph_bs: list[int] = []
    overlap_schedule: bool = False
    speculation: str = ""
    memory: MemoryLedger | None = None
    ranks: list[RankInfo] = []


class EngineFailure(msgspec.Struct, frozen=True):
    """The engine process cannot go on; `message` is fit for a user's eyes."""

    message: str
    user_error: bool = False


EngineOutput = StepOutput | Reply | EngineInfo
