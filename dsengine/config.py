"""Configuration: frozen, resolved once, and the single source of the command-line flags.

Each field's metadata carries its help text; `dsengine.cli` derives the flags from the fields, so that the Python API,
the command line and the documentation cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from dsengine.demo import CHECKPOINT_DIR

DType = Literal["auto", "float32", "bfloat16"]
WeightFormat = Literal["auto", "fp8", "dequantized"]
ActivationFormat = Literal["auto", "fp8", "float"]
Speculation = Literal["NEXTN", "NGRAM"]
DraftAcceptance = Literal["coupled", "rejection"]
SelfTest = Literal["auto", "on", "off"]
CacheDType = Literal["auto", "bfloat16", "fp8_e4m3"]
ChecksumMode = Literal["auto", "on", "off"]
MoeExchange = Literal["gather", "all_to_all", "deepep", "deepep_normal"]
Share = Literal["attention", "world"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
EngineFailurePolicy = Literal["restart", "exit"]
ToolCallFormat = Literal["deepseekv3", "deepseekv31", "deepseekv32", "kimi_k2"]

# Kernels for many heads load a tile of 64 latents at once if a block holds one; a small block shares more prefixes.
_BLOCK_SIZES = {"cuda": 64}
_CHOICES: dict[str, Any] = {
    "dtype": DType,
    "speculative_acceptance": DraftAcceptance,
    "weight_format": WeightFormat,
    "activation_format": ActivationFormat,
    "kv_cache_dtype": CacheDType,
    "self_test": SelfTest,
    "verify_checksums": ChecksumMode,
}


def _option(default: Any, help: str, *aliases: str) -> Any:
    return field(default=default, metadata={"help": help, "aliases": aliases})


@dataclass(frozen=True)
class ParallelConfig:
    """Over how many processes ("ranks", one device each) a model is spread, and where they meet.

    Raises:
        ValueError: the sizes do not fit each other; the message names them.
    """

    tp_size: int = _option(
        1, "Ranks (processes with one device each) that run the model together.", "--tensor-parallel-size"
    )
    attn_dp_size: int = _option(
        1,
        "Groups of ranks that have requests and a KV cache of their own (data-parallel attention); the "
        "tp-size / attn-dp-size ranks of a group share its heads.",
    )
    dp_size: int | None = _option(None, "With --enable-dp-attention: another name of --attn-dp-size.")
    enable_dp_attention: bool = _option(False, "Take --dp-size as --attn-dp-size.")
    ep_size: int = _option(
        1,
        "Ranks that hold whole experts: as many as --tp-size, or 1 to give each rank a slice of every expert.",
        "--expert-parallel-size",
    )
    dense_parallel: Share = _option(
        "attention",
        "Who shares the layers without experts: the ranks of each attention group, or the world, all ranks, each of "
        "which then holds less and gets the tokens of all groups.",
    )
    moe_dense_tp_size: int | None = _option(
        None, "Another way to say --dense-parallel: as many as --tp-size (world), or as a group has (attention)."
    )
    lm_head_parallel: Share = _option(
        "attention", "Who shares the lm_head: the ranks of each attention group, or the world, all ranks."
    )
    enable_dp_lm_head: bool = _option(
        False, "Another way to say --lm-head-parallel attention; of no use with world, and refused."
    )
    moe_exchange: MoeExchange = _option(
        "gather",
        "How tokens come to experts on other ranks: gather brings all to all ranks, all_to_all each to the ranks that "
        "hold its experts (--ep-size only); deepep does so with DeepEP's kernels (bfloat16 on CUDA), those for low "
        "latency up to 128 tokens a rank; deepep_normal leaves these out. DeepEP: not yet run on a GPU.",
    )
    ep_num_redundant_experts: int = _option(
        0, "Places for second copies of busy experts, over all ranks (--ep-size only)."
    )
    enable_eplb: bool = _option(
        False, "Count the tokens of each expert, and move experts between ranks so that all have about the same to do."
    )
    eplb_rebalance_num_iterations: int = _option(
        1000, "With --enable-eplb: steps from one look at the counts to the next."
    )
    nnodes: int = _option(1, "Machines with tp-size / nnodes ranks each; the same command is run on every one.")
    node_rank: int = _option(0, "Number of this machine; machine 0 serves the requests.")
    dist_init_addr: str | None = _option(
        None, "HOST:PORT of machine 0 where the ranks of several machines meet; it listens on this address only."
    )
    dist_timeout: float = _option(
        120.0, "Seconds after which a rank that does not answer counts as lost, and with it the whole engine."
    )

    def __post_init__(self) -> None:
        _require_positive(self, "tp_size", "attn_dp_size", "dp_size", "ep_size", "nnodes")
        if (self.dp_size is not None) != self.enable_dp_attention:
            raise ValueError(
                "dp_size and enable_dp_attention go together (without attention there would be whole replicas of the "
                "model, which are several servers); or give attn_dp_size alone"
            )
        if self.dp_size is not None:
            if self.attn_dp_size not in (1, self.dp_size):
                raise ValueError(f"attn_dp_size is {self.attn_dp_size} and dp_size is {self.dp_size}; give one of them")
            object.__setattr__(self, "attn_dp_size", self.dp_size)
        if self.tp_size % self.attn_dp_size:
            raise ValueError(
                f"attn_dp_size is {self.attn_dp_size}; it must divide tp_size, the number of all ranks, which is "
                f"{self.tp_size}"
            )
        if self.ep_size not in (1, self.tp_size):
            raise ValueError(f"ep_size is {self.ep_size}; it must be 1, or tp_size, which is {self.tp_size}")
        self._check_shares()
        self._check_experts()
        if self.dist_timeout < 1:
            raise ValueError(f"dist_timeout is {self.dist_timeout}; it must be at least 1 second")
        self._check_nodes()

    def _check_shares(self) -> None:
        _require_choices(self, dense_parallel=Share, lm_head_parallel=Share)
        if self.enable_dp_lm_head and self.lm_head_parallel == "world":
            raise ValueError("enable_dp_lm_head keeps the lm_head within groups, but lm_head_parallel is world")
        if self.moe_dense_tp_size is None:
            return
        group = self.tp_size // self.attn_dp_size
        if self.moe_dense_tp_size not in (group, self.tp_size):
            raise ValueError(
                f"moe_dense_tp_size is {self.moe_dense_tp_size}; it must be tp_size, which is {self.tp_size}, or the "
                f"ranks of an attention group, which are {group}"
            )
        meant = "attention" if self.moe_dense_tp_size == group else "world"
        if self.dense_parallel == "world" and meant == "attention" and self.attn_dp_size > 1:
            raise ValueError(
                f"moe_dense_tp_size is {self.moe_dense_tp_size}, the ranks of an attention group, but dense_parallel "
                "is world; give one of them"
            )
        if self.dense_parallel == "attention":
            object.__setattr__(self, "dense_parallel", meant)

    def _check_experts(self) -> None:
        _require_choices(self, moe_exchange=MoeExchange)
        _require_positive(self, "eplb_rebalance_num_iterations")
        if self.ep_num_redundant_experts < 0:
            raise ValueError(f"ep_num_redundant_experts is {self.ep_num_redundant_experts}; it must be at least 0")
        for name in ("moe_exchange", "ep_num_redundant_experts", "enable_eplb"):
            if not self.experts_whole and getattr(self, name) not in (0, "gather"):
                advice = f"set it to tp_size, which is {self.tp_size}" if self.tp_size > 1 else "there is one rank only"
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which needs whole experts on several ranks, but ep_size is "
                    f"{self.ep_size}; {advice}"
                )

    def _check_nodes(self) -> None:
        if self.tp_size % self.nnodes:
            raise ValueError(f"nnodes is {self.nnodes}; it must divide tp_size, which is {self.tp_size}")
        if not 0 <= self.node_rank < self.nnodes:
            raise ValueError(f"node_rank is {self.node_rank}; it must lie in [0, {self.nnodes - 1}] (nnodes - 1)")
        if (self.nnodes > 1) != (self.dist_init_addr is not None):
            raise ValueError(
                f"nnodes is {self.nnodes} and dist_init_addr is {self.dist_init_addr}; several machines need one "
                "to meet at, as in 10.0.0.1:20000, and a single machine none"
            )
        if self.dist_init_addr is not None:
            host, _, port = self.dist_init_addr.rpartition(":")
            if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
                raise ValueError(
                    f"dist_init_addr is {self.dist_init_addr!r}; it must have the form HOST:PORT, as in 10.0.0.1:20000"
                )

    @property
    def experts_whole(self) -> bool:
        """Routed experts are dealt out whole rather than cut."""
        return self.ep_size > 1

    @property
    def local_size(self) -> int:
        """Ranks on each machine."""
        return self.tp_size // self.nnodes

    @property
    def local_ranks(self) -> range:
        """The ranks of this machine."""
        return range(self.node_rank * self.local_size, (self.node_rank + 1) * self.local_size)


@dataclass(frozen=True)
class EngineConfig(ParallelConfig):
    """Everything that decides how one engine runs. Values left at `None` or "auto" are chosen at start-up.

    Raises:
        ValueError: a value is out of range; the message names the field, the value and what would be right.
    """

    model: str | None = _option(None, "Local folder or hub name of a checkpoint; none: the embedded demo model.")
    revision: str | None = _option(None, "Branch, tag or commit of a hub checkpoint.")
    verify_checksums: ChecksumMode = _option(
        "auto",
        "Compare the checkpoint with its manifest (dsengine.sha256.json) before loading it; auto: names and sizes, and "
        "below 1 GiB the SHA-256 of every file, where there is a manifest.",
    )
    device: str = _option("auto", "Device to run on: auto, cpu, cuda or cuda:N.")
    dtype: DType = _option(
        "auto", "Type of activations and of unquantised weights; auto: bfloat16 on CUDA, float32 on a CPU."
    )
    weight_format: WeightFormat = _option(
        "auto",
        "Keep block-FP8 weights as FP8 in memory, or dequantise them at load; auto: FP8 where the device has it.",
    )
    activation_format: ActivationFormat = _option(
        "auto",
        "Input of layers whose weights stay FP8: quantised to FP8 in groups of 128 channels, or float; "
        "auto: FP8 where the device multiplies in it.",
    )
    context_length: int | None = _option(
        None, "Longest prompt + output in tokens; default: the checkpoint's.", "--max-model-len"
    )
    block_size: int | None = _option(
        None, "Tokens in one KV-cache block; default: 64 on CUDA, where kernels want it, 16 elsewhere.", "--page-size"
    )
    max_total_tokens: int | None = _option(None, "Tokens the KV cache holds; default: from the memory at hand.")
    mem_fraction_static: float = _option(
        0.85,
        "Fraction of the device's memory for weights, CUDA graphs and KV cache together.",
        "--gpu-memory-utilization",
    )
    kv_cache_dtype: CacheDType = _option(
        "auto", "Type of the cached latents; auto: that of the activations. fp8_e4m3 takes 656 bytes a token and layer."
    )
    max_running_requests: int = _option(256, "Requests that are computed at the same time.", "--max-num-seqs")
    max_queued_requests: int = _option(
        2048, "Requests that may wait; further ones get HTTP 429.", "--max-num-queued-reqs"
    )
    chunked_prefill_size: int = _option(
        2048, "Token budget of one step: decode tokens first, then chunks of prompts.", "--max-num-batched-tokens"
    )
    target_itl_ms: float | None = _option(
        None, "Milliseconds between a request's tokens: steps compute no more, in prompts and drafts, than fits."
    )
    target_ttft_ms: float | None = _option(
        None, "Milliseconds to a request's first token: where it can still be met, it goes before --target-itl-ms."
    )
    cuda_graph_bs: tuple[int, ...] = _option(
        (),
        "Batch sizes for which the decode step is captured as a CUDA graph; default: 1, 2, 4 and multiples of 8.",
        "--cudagraph-capture-sizes",
    )
    cuda_graph_max_bs: int | None = _option(
        None, "Largest of these batch sizes; default: 256.", "--max-cudagraph-capture-size"
    )
    disable_cuda_graph: bool = _option(False, "Run decode steps kernel by kernel.", "--enforce-eager")
    disable_overlap_schedule: bool = _option(
        False,
        "Wait for each step's tokens before preparing the next step (which a CPU always does).",
        "--no-async-scheduling",
    )
    disable_radix_cache: bool = _option(
        False, "Do not reuse the cache of common prefixes.", "--no-enable-prefix-caching"
    )
    kernel: tuple[str, ...] = _option((), "Force a backend for an operation, as in mla_decode=ref; may be repeated.")
    self_test: SelfTest = _option(
        "auto",
        "Compare every chosen kernel with its reference on slices of the checkpoint before loading it, and replace "
        "those that fail; auto: on for FP8 checkpoints.",
    )
    speculative_algorithm: Speculation | None = _option(
        None,
        "Draft several tokens and verify them in one step: NEXTN drafts with the checkpoint's NextN layer, NGRAM looks "
        "them up in the text. The output stays the same.",
    )
    speculative_num_steps: int = _option(3, "Depth of the trees of drafted tokens.")
    speculative_eagle_topk: int = _option(
        1, "Width of the trees: continuations tried of each expanded node; 1 drafts chains."
    )
    speculative_num_draft_tokens: int | None = _option(
        None, "Nodes of a tree that are verified, the newest token included; default: steps + 1, or 8 for wider trees."
    )
    speculative_adaptive: bool | None = _option(
        None, "Choose each step's tree by acceptance and load, up to the size given; default: on."
    )
    speculative_acceptance: DraftAcceptance = _option(
        "coupled",
        "How drafts of sampled tokens are accepted: coupled gives the tokens that there would be without drafts; "
        "rejection draws the drafts and accepts more of flat distributions: the same distribution, other tokens.",
    )
    disable_jump_forward: bool = _option(
        False, "Do not propose the texts that a grammar leaves no choice about; draw them token by token."
    )
    seed: int = _option(0, "Seeds the draws of requests that bring no seed.", "--random-seed")
    num_threads: int | None = _option(None, "CPU threads of the engine; default: all cores.")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "kernel", tuple(self.kernel))
        _require_positive(self, "block_size", "max_running_requests", "max_queued_requests", "chunked_prefill_size")
        _require_positive(self, "context_length", "max_total_tokens", "num_threads", "cuda_graph_max_bs")
        object.__setattr__(self, "cuda_graph_bs", tuple(self.cuda_graph_bs))
        if any(size < 1 for size in self.cuda_graph_bs):
            raise ValueError(f"cuda_graph_bs is {list(self.cuda_graph_bs)}; every batch size must be at least 1")
        if not 0.05 <= self.mem_fraction_static <= 0.98:
            raise ValueError(f"mem_fraction_static is {self.mem_fraction_static}; it must lie in [0.05, 0.98]")
        for name in ("target_itl_ms", "target_ttft_ms"):
            if (target := getattr(self, name)) is not None and not 0 < target < 1e9:
                raise ValueError(f"{name} is {target}; it must be above 0")
        if self.target_ttft_ms is not None and self.target_itl_ms is None:
            raise ValueError("target_ttft_ms is of no use without target_itl_ms, which it goes before")
        _require_choices(self, **_CHOICES)
        self._check_speculation()
        for item in self.kernel:
            op, sep, backend = item.partition("=")
            if not (op and sep and backend):
                raise ValueError(f"kernel is {item!r}; it must have the form operation=backend, as in mla_decode=ref")

    def _check_speculation(self) -> None:
        _require_positive(self, "speculative_num_steps", "speculative_eagle_topk")
        if self.speculative_algorithm is not None:
            _require_choices(self, speculative_algorithm=Speculation)
        steps, topk, nodes = self.speculative_num_steps, self.speculative_eagle_topk, self.speculative_num_draft_tokens
        most = 1 + topk + (steps - 1) * topk**2
        if nodes is not None and not 2 <= nodes <= most:
            raise ValueError(
                f"speculative_num_draft_tokens is {nodes}; with {steps} steps of {topk} it must lie in [2, {most}]"
            )
        for option in fields(self) if self.speculative_algorithm is None else ():
            if option.name.startswith("speculative_") and (value := getattr(self, option.name)) != option.default:
                raise ValueError(f"{option.name} is {value}, which needs speculative_algorithm: NEXTN or NGRAM")

    @property
    def tree_nodes(self) -> int:
        """Nodes of the largest tree: those asked for, else a whole chain or at most 8."""
        if self.speculative_num_draft_tokens is not None:
            return self.speculative_num_draft_tokens
        steps, topk = self.speculative_num_steps, self.speculative_eagle_topk
        return steps + 1 if topk == 1 else min(8, 1 + topk + (steps - 1) * topk**2)

    @property
    def model_or_demo(self) -> str:
        """The checkpoint to load: the one named, else the embedded one."""
        return self.model if self.model is not None else str(CHECKPOINT_DIR)

    def block_size_on(self, device_type: str) -> int:
        """Tokens in one cache block on a device of this type ("cuda", "cpu")."""
        return self.block_size if self.block_size is not None else _BLOCK_SIZES.get(device_type, 16)

    @property
    def forced_kernels(self) -> dict[str, str]:
        return dict(item.split("=", 1) for item in self.kernel)


@dataclass(frozen=True)
class ServerConfig:
    """Everything that decides how the HTTP server behaves."""

    host: str = _option("127.0.0.1", "Address to listen on.")
    port: int = _option(30000, "Port to listen on.")
    served_model_name: str | None = _option(None, "Name clients use for the model; default: the name it was loaded by.")
    api_key: tuple[str, ...] = _option(
        (),
        "Clients must send this key as a bearer token (all routes but /health). May be repeated: holders of different "
        "keys share no cached prefixes.",
    )
    enable_admin: bool = _option(
        False,
        "Serve /abort_request, /pause, /continue, /sleep, /wake_up, /is_sleeping and /update_weights_from_disk, to "
        "holders of the admin key.",
    )
    admin_api_key: str | None = _option(None, "Bearer token of the admin routes; --enable-admin needs one.")
    disable_web_page: bool = _option(False, "Do not serve the web page at /.")
    weight_update_root: tuple[str, ...] = _option(
        (), "Folder under which /update_weights_from_disk may find checkpoints; may be repeated."
    )
    thinking: bool | None = _option(
        None, "Default of the chat template's thinking switch; default: the template's own."
    )
    tool_call_parser: ToolCallFormat | None = _option(
        None, "Wire format of the model's function calls; default: chosen from the checkpoint."
    )
    max_body_bytes: int = _option(8 * 1024 * 1024, "Largest request body; larger ones get HTTP 413.")
    drain_timeout: float = _option(30.0, "Seconds that running requests get to finish after SIGTERM.")
    on_engine_failure: EngineFailurePolicy = _option(
        "restart", "When the engine process dies: restart it, or exit non-zero."
    )
    log_level: LogLevel = _option("info", "Verbosity of the log.")
    log_format: LogFormat = _option("text", "Lines of the server's log: text for people, or one JSON object each.")
    log_requests: bool = _option(
        False,
        "Tell in the log, of every generating request, its parameters, lengths, times and finish reasons: no contents.",
        "--enable-log-requests",
    )
    log_requests_contents: bool = _option(
        False, "With --log-requests: prompts and answers too, cut after 10,000 characters."
    )
    otlp_traces_endpoint: str | None = _option(
        None, "Send an OpenTelemetry trace of every generating request to this OTLP collector, as in http://HOST:4318."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must lie in [0, 65535] (0 picks a free one)")
        _require_positive(self, "max_body_bytes")
        if self.enable_admin != bool(self.admin_api_key):
            missing = "admin_api_key" if self.enable_admin else "enable_admin"
            raise ValueError(f"{missing} is missing: enable_admin and admin_api_key go together")
        object.__setattr__(self, "api_key", (self.api_key,) if isinstance(self.api_key, str) else tuple(self.api_key))
        if "" in self.api_key:
            raise ValueError("api_key is empty; give a key that cannot be guessed, or none")
        object.__setattr__(self, "weight_update_root", tuple(self.weight_update_root))
        for root in self.weight_update_root:
            if not Path(root).is_dir():
                raise ValueError(f"weight_update_root is {root!r}; there is no such folder")
        if self.weight_update_root and not self.enable_admin:
            raise ValueError("weight_update_root is of no use without enable_admin")
        if self.admin_api_key in self.api_key:
            raise ValueError("admin_api_key is the same as api_key; administrators need a key of their own")
        if self.drain_timeout < 0:
            raise ValueError(f"drain_timeout is {self.drain_timeout}; it must not be negative")
        _require_choices(self, on_engine_failure=EngineFailurePolicy, log_level=LogLevel, log_format=LogFormat)
        if self.log_requests_contents and not self.log_requests:
            raise ValueError("log_requests is missing: log_requests_contents adds to what it logs")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_traces_endpoint is {endpoint!r}; it must begin with http:// or https://")
        if self.tool_call_parser is not None:
            _require_choices(self, tool_call_parser=ToolCallFormat)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _require_choices(config: Any, **literals: Any) -> None:
    for name, literal in literals.items():
        value, allowed = getattr(config, name), get_args(literal)
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
