"""What /metrics tells Prometheus. Every label value comes from a closed set: clients cannot create series."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from dsengine.engine.messages import EngineStats, ExpertStats, RequestUpdate, SpeculationStats

CLIENT_CLOSED_REQUEST = 499

FINISH_REASONS = ("stop", "length", "abort", "error")
ADMIN_ROUTES = (
    "/abort_request",
    "/pause",
    "/continue",
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/update_weights_from_disk",
)
ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/health",
    "/health_generate",
    "/metrics",
    "/server_info",
    "/flush_cache",
    "/tokenize",
    "/detokenize",
    *ADMIN_ROUTES,
)
STATUSES = ("2xx", "4xx", "5xx", "disconnected")

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server. `stats` gives the engine's latest report."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, stats: Callable[[], EngineStats], clock: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        self._clock = clock
        registry.register(_EngineCollector(stats))
        self._prompt_tokens = Counter(
            "dsengine_prompt_tokens", "Prompt tokens of sequences that began to run.", registry=registry
        )
        self._cached_tokens = Counter(
            "dsengine_cached_tokens", "Prompt tokens found in the prefix cache.", registry=registry
        )
        self._generation_tokens = Counter("dsengine_generation_tokens", "Tokens generated.", registry=registry)
        self._first_token = Histogram(
            "dsengine_time_to_first_token_seconds",
            "From the request's admission to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._inter_token = Histogram(
            "dsengine_inter_token_latency_seconds",
            "Between one token and the next of a sequence.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self._end_to_end = Histogram(
            "dsengine_e2e_request_latency_seconds",
            "From the request's admission to its last token.",
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self._finished = Counter(
            "dsengine_sequences", "Sequences that ended, by reason.", ["finish_reason"], registry=registry
        )
        self._responses = Counter("dsengine_http_responses", "HTTP responses.", ["route", "status"], registry=registry)
        self._in_flight = Gauge("dsengine_http_requests_in_flight", "HTTP requests being handled.", registry=registry)
        for reason in FINISH_REASONS:
            self._finished.labels(reason)
        for route in (*ROUTES, "other"):
            for status in STATUSES:
                self._responses.labels(route, status)

    def render(self) -> bytes:
        """The exposition text of all metrics."""
        return generate_latest(self._registry)

    def sequence(self, num_prompt_tokens: int) -> SequenceTimer:
        return SequenceTimer(self, num_prompt_tokens, self._clock())

    def response(self, path: str, status: int | None) -> None:
        """Count one response; `status` is None when the client had gone before there was one."""
        if path.startswith("/v1/models"):
            path = "/v1/models"
        gone = status in (None, CLIENT_CLOSED_REQUEST)
        label = "disconnected" if gone else f"{status or 500}"[0] + "xx"
        self._responses.labels(path if path in ROUTES else "other", label).inc()

    def set_in_flight(self, count: int) -> None:
        self._in_flight.set(count)


class SequenceTimer:
    """Observes one sequence from admission to end; times are those of the metrics' clock.

    Attributes:
        queue_seconds: that it waited before it was computed.
        num_tokens: generated so far.
    """

    def __init__(self, metrics: Metrics, num_prompt_tokens: int, now: float) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = 0
        self.cached_tokens = 0
        self.queue_seconds = 0.0
        self.started = now
        self.first_token: float | None = None
        self.ended: float | None = None
        self.finish_reason: str | None = None
        self._metrics = metrics
        self._last = now

    def update(self, update: RequestUpdate, now: float) -> None:
        """Tokens have arrived together at `now`; latency is shared out evenly among them."""
        count = len(update.new_token_ids)
        if count == 0:
            return
        metrics = self._metrics
        metrics._generation_tokens.inc(count)
        self.num_tokens += count
        if self.first_token is None:
            self.first_token, self.cached_tokens, self.queue_seconds = now, update.cached_tokens, update.queue_seconds
            metrics._first_token.observe(now - self.started)
            metrics._prompt_tokens.inc(self.num_prompt_tokens)
            metrics._cached_tokens.inc(update.cached_tokens)
        else:
            for _ in range(count):
                metrics._inter_token.observe((now - self._last) / count)
        self._last = now

    def finish(self, reason: str, now: float) -> None:
        self.finish_reason = reason if reason in FINISH_REASONS else "error"
        self.ended = now
        self._metrics._finished.labels(self.finish_reason).inc()
        if reason in ("stop", "length"):
            self._metrics._end_to_end.observe(now - self.started)


class _EngineCollector(Collector):
    """Reads the engine's report when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        gauges = {
            "dsengine_num_requests_running": ("Sequences being computed.", stats.num_running),
            "dsengine_num_requests_waiting": ("Sequences waiting for admission.", stats.num_waiting),
            "dsengine_kv_cache_blocks": ("Blocks of the KV cache.", stats.num_blocks),
            "dsengine_kv_cache_blocks_in_use": ("Blocks owned by running sequences.", stats.num_blocks_in_use),
            "dsengine_kv_cache_blocks_cached": ("Blocks kept for reuse of prefixes.", stats.num_blocks_cached),
            "dsengine_kv_cache_usage_ratio": (
                "Share of the blocks owned by running sequences.",
                stats.num_blocks_in_use / max(stats.num_blocks, 1),
            ),
            "dsengine_token_budget": ("Tokens that the latest step might compute.", stats.token_budget),
            "dsengine_prefix_cache_hit_ratio": (
                "Share of prompt tokens found in the prefix cache.",
                stats.prefix_hit_tokens / max(stats.prefix_query_tokens, 1),
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily("dsengine_preemptions", "Preempted sequences.", value=stats.num_preemptions)
        yield CounterMetricFamily("dsengine_engine_steps", "Steps of the engine.", value=stats.num_steps)
        yield CounterMetricFamily(
            "dsengine_jump_forward_tokens",
            "Tokens that grammars proposed and steps accepted.",
            value=stats.num_jumped_tokens,
        )
        if stats.speculation is not None:
            yield from _speculation_metrics(stats.speculation)
        if stats.experts is not None:
            yield from _expert_metrics(stats.experts)
        yield from _group_metrics(stats.groups)


def _group_metrics(groups: Sequence[EngineStats]) -> Iterator[Metric]:
    """What each attention-DP group has to do and in its cache, where there are several."""
    if not groups:
        return
    tables: dict[str, tuple[str, list[float]]] = {
        "num_requests_running": ("Sequences being computed", [s.num_running for s in groups]),
        "num_requests_waiting": ("Sequences waiting for admission", [s.num_waiting for s in groups]),
        "kv_cache_blocks": ("Blocks of the KV cache", [s.num_blocks for s in groups]),
        "kv_cache_blocks_in_use": ("Blocks owned by running sequences", [s.num_blocks_in_use for s in groups]),
        "kv_cache_blocks_cached": ("Blocks kept for reuse of prefixes", [s.num_blocks_cached for s in groups]),
        "kv_cache_usage_ratio": (
            "Share of the blocks owned by running sequences",
            [s.num_blocks_in_use / max(s.num_blocks, 1) for s in groups],
        ),
        "prefix_cache_hit_ratio": (
            "Share of prompt tokens found in the prefix cache",
            [s.prefix_hit_tokens / max(s.prefix_query_tokens, 1) for s in groups],
        ),
    }
    for name, (text, values) in tables.items():
        family = GaugeMetricFamily(f"dsengine_group_{name}", f"{text}, by attention group.", labels=["group"])
        for number, value in enumerate(values):
            family.add_metric([str(number)], value)
        yield family


def _expert_metrics(stats: ExpertStats) -> Iterator[Metric]:
    """Where --enable-eplb counts tokens, from the first look at the counts on."""
    yield GaugeMetricFamily(
        "dsengine_expert_step_imbalance_ratio",
        "Tokens of the rank with most for its experts over the mean of ranks, in a step and MoE layer, on average.",
        value=stats.step_imbalance,
    )
    yield GaugeMetricFamily(
        "dsengine_expert_worst_layer_imbalance_ratio",
        "The same of the MoE layer where it is largest.",
        value=stats.worst_layer_imbalance,
    )
    yield CounterMetricFamily("dsengine_expert_looks", "Looks at the counts of tokens by expert.", value=stats.looks)
    yield CounterMetricFamily("dsengine_experts_moved", "Experts brought to other places.", value=stats.moved)


def _speculation_metrics(stats: SpeculationStats) -> Iterator[Metric]:
    """What has come of drafting; the label values are those of the configured tree and of what is smaller."""
    yield CounterMetricFamily("dsengine_spec_draft_tokens", "Drafted tokens verified.", value=stats.num_drafts)
    yield CounterMetricFamily("dsengine_spec_accepted_tokens", "Drafts that became tokens.", value=stats.num_accepted)
    lengths = HistogramMetricFamily("dsengine_spec_accepted_length", "Drafts accepted of one tree.")
    buckets = [(str(length), sum(stats.lengths[: length + 1])) for length in range(len(stats.lengths))]
    lengths.add_metric([], [*buckets, ("+Inf", sum(stats.lengths))], stats.total_length)
    yield lengths
    rates = GaugeMetricFamily(
        "dsengine_spec_acceptance_ratio", "Share of drafts accepted where the one before was.", labels=["depth"]
    )
    for depth in range(1, len(stats.lengths)):
        if stats.tried[depth - 1]:
            rates.add_metric([str(depth)], stats.acceptance(depth))
    yield rates
    steps = CounterMetricFamily("dsengine_spec_steps", "Steps with trees of this steps/topk/nodes.", labels=["tree"])
    for tree, count in stats.steps.items():
        steps.add_metric([tree], count)
    yield steps
    seconds = CounterMetricFamily("dsengine_spec_seconds", "Time of the phases of steps.", labels=["phase"])
    for phase, value in stats.seconds.items():
        seconds.add_metric([phase], value)
    yield seconds
    share = (stats.seconds.get("draft", 0.0) + stats.seconds.get("catch up", 0.0)) / max(
        sum(stats.seconds.values()), 1e-9
    )
    yield GaugeMetricFamily("dsengine_spec_draft_time_ratio", "Share of the steps' time spent drafting.", value=share)
