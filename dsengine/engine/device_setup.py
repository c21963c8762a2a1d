"""From a loaded model to a runner: the cache sized to the memory there is, decode steps captured, all accounted for.

On CUDA the largest steps are run and trial graphs captured before the cache is allocated, because whatever they need
cannot be had any more once the cache has taken the rest. A CPU's memory is shared with everything else on the machine,
so there the cache takes what a server of this context length can use rather than all there is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from dsengine.config import EngineConfig
from dsengine.engine.agreement import Agreement, Alone
from dsengine.engine.exchange_graphs import CleanedGraphs
from dsengine.engine.graph_runner import GraphBackend, graph_batch_sizes, operations_against_capture
from dsengine.engine.launch import DirectQueue, StepLauncher
from dsengine.engine.memory_ledger import DeviceBudget, MemoryLedger, format_bytes
from dsengine.engine.memory_probe import MemoryProbe, weigh
from dsengine.engine.memory_profile import measure_graphs, measure_steps
from dsengine.engine.model_runner import ModelRunner
from dsengine.engine.sampler import Sampler
from dsengine.engine.speculation import Speculator
from dsengine.engine.speculation_setup import largest_tree_shape, make_speculator
from dsengine.engine.step_graphs import StepGraphs, make_step_graphs, tree_sizes_of
from dsengine.kernels.fp8_kv import fp8_kv_bytes
from dsengine.kernels.registry import Kernels
from dsengine.memory.kv_cache import KVCachePool
from dsengine.model.config import ModelConfig
from dsengine.model.deepseek import DeepseekModel
from dsengine.specdec.controller import ladder

logger = logging.getLogger(__name__)

RESERVE_BYTES = 2**29
_CPU_CACHE_CONTEXTS = 8


@dataclass(frozen=True)
class CacheRow:
    """How one token's latent is stored in one layer: `width` entries of `dtype`."""

    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, kv_cache_dtype: str, config: ModelConfig, dtype: torch.dtype) -> CacheRow:
        """The row that `--kv-cache-dtype` asks for, with activations of `dtype`.

        Raises:
            ValueError: the model or the activations do not allow it.
        """
        if kv_cache_dtype == "fp8_e4m3":
            try:
                return cls(fp8_kv_bytes(config.kv_lora_rank, config.qk_rope_head_dim), torch.uint8)
            except ValueError:
                raise ValueError(
                    f"kv_cache_dtype is fp8_e4m3, but this checkpoint's kv_lora_rank is {config.kv_lora_rank}; it must "
                    "be a multiple of 128: use auto"
                ) from None
        if kv_cache_dtype == "bfloat16" and dtype != torch.bfloat16:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"kv_cache_dtype is bfloat16, but activations are {name}; use auto, or --dtype bfloat16")
        return cls(config.latent_dim, dtype)


@contextmanager
def refusing(message: str) -> Iterator[None]:
    """Turns running out of the device's memory into a `ValueError` that says what did not fit and what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(message) from error


class DeviceSetup:
    """Makes a `ModelRunner` for a loaded model.

    Args:
        others: bytes of the device that were held before the model was loaded.
        agreement: with the other ranks that run the model.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: DeepseekModel,
        kernels: Kernels,
        sampler: Sampler,
        *,
        row: CacheRow,
        context_length: int,
        others: int,
        agreement: Agreement | None = None,
    ) -> None:
        self._agreement = agreement if agreement is not None else Alone()
        self._config = config
        self._model = model
        self._block_size = config.block_size_on(model.device.type)
        self._kernels = kernels
        self._sampler = sampler
        self._row = row
        self._context_length = context_length
        self._others = others
        self._num_layers = len(model.layers) + (model.nextn is not None)
        self._token_bytes = KVCachePool.bytes_per_token(self._num_layers, row.width, row.dtype)
        self._weights = weigh(model)
        self._tree = largest_tree_shape(config) if config.speculative_algorithm is not None else None

    def on_cpu(self) -> tuple[ModelRunner, MemoryLedger]:
        """A runner on the CPU.

        Raises:
            ValueError: the cache would be too small to be of use.
        """
        config, size = self._config, self._block_size
        num_tokens = config.max_total_tokens
        if num_tokens is None:
            fits = int(available_memory() * config.mem_fraction_static) // config.local_size // self._token_bytes
            num_tokens = min(_CPU_CACHE_CONTEXTS * self._context_length, fits)
        if num_tokens < 2 * size:
            raise ValueError(
                f"the KV cache would hold {num_tokens} tokens ({self._token_bytes} bytes each), less than two blocks "
                f"of {size}; raise --mem-fraction-static (now {config.mem_fraction_static}) or --max-total-tokens"
            )
        pool = self._pool(self._agreement.blocks(num_tokens // size))
        return ModelRunner(self._model, pool, None, self._speculator(pool)), self._ledger(total_memory(), pool)

    def on_cuda(self, probe: MemoryProbe, new_backend: Callable[[], GraphBackend]) -> tuple[ModelRunner, MemoryLedger]:
        """A runner whose cache and graphs leave room for the largest step.

        Args:
            probe: of the model's device.
            new_backend: makes what captures graphs, with memory of its own.

        Raises:
            ValueError: there is not enough memory; the message says what to change.
        """
        config = self._config
        sizes = self._graph_sizes()
        activations, graph_bytes = self._measure(probe, new_backend, sizes)
        budget = DeviceBudget(
            total=probe.total(),
            free=probe.free(),
            activations=activations,
            graphs=graph_bytes,
            reserve=RESERVE_BYTES,
            static_fraction=config.mem_fraction_static,
        )
        block_bytes = self._block_size * self._token_bytes
        num_blocks = budget.num_blocks(block_bytes, self._block_size, config.max_total_tokens)
        pool = self._pool(self._agreement.blocks(num_blocks))
        runner = ModelRunner(self._model, pool, None, self._speculator(pool))
        kept = 0
        if sizes:
            before = probe.free()
            runner.capture = partial(self._capture, runner, new_backend, sizes)
            runner.capture()
            left = probe.free()
            kept = before - left
            if left < activations:
                raise ValueError(
                    f"the CUDA graphs of {len(sizes)} batch sizes took {format_bytes(kept)}, where their trial had "
                    f"shown {format_bytes(graph_bytes)}: {format_bytes(left)} are left, and the largest step needs "
                    f"{format_bytes(activations)}; lower --cuda-graph-max-bs or --mem-fraction-static"
                )
        return runner, self._ledger(probe.total(), pool, graphs=kept, activations=activations, reserve=RESERVE_BYTES)

    @torch.inference_mode()
    def _capture(self, runner: ModelRunner, new_backend: Callable[[], GraphBackend], sizes: list[int]) -> None:
        graphs = self._graphs(runner.pool, new_backend(), runner.speculator, sizes)
        with refusing(
            f"the CUDA graphs of {len(sizes)} batch sizes do not fit beside the KV cache; lower --cuda-graph-max-bs or "
            "--mem-fraction-static"
        ):
            graphs.capture()
        runner.use_graphs(graphs.plain, graphs.trees, graphs.drafter)

    @torch.inference_mode()
    def _measure(
        self, probe: MemoryProbe, new_backend: Callable[[], GraphBackend], sizes: list[int]
    ) -> tuple[int, int]:
        """Bytes of the largest step and of the graphs, tried with a cache of a single block."""
        config, pool = self._config, self._pool(1)
        speculator = self._speculator(pool)
        with refusing(
            f"the largest step does not fit beside the weights (chunked_prefill_size {config.chunked_prefill_size}, "
            f"max_running_requests {config.max_running_requests}); lower --chunked-prefill-size or "
            "--max-running-requests"
        ):
            activations = measure_steps(
                StepLauncher(ModelRunner(self._model, pool, None, speculator), self._sampler, DirectQueue()),
                probe,
                token_budget=config.chunked_prefill_size,
                max_running_requests=config.max_running_requests,
                context_length=self._context_length,
                tree=self._tree,
            )
        if not sizes:
            return activations, 0
        with refusing(f"the CUDA graph of batch size {sizes[-1]} does not fit; lower --cuda-graph-max-bs"):
            return activations, measure_graphs(
                lambda: self._graphs(pool, new_backend(), speculator, sizes), probe, len(sizes)
            )

    @property
    def _most_captured_tokens(self) -> int | None:
        """Of an attention group: up to there a step's shapes do not depend on the routing; None: whatever it is."""
        if self._config.moe_exchange in ("all_to_all", "deepep_normal"):
            return 0
        layout = self._model.slots.layout
        return None if layout.deep_ep is None else layout.deep_ep.low_latency_tokens * layout.attention.size

    def _graph_sizes(self) -> list[int]:
        config = self._config
        if config.disable_cuda_graph:
            return []
        most_tokens = self._most_captured_tokens
        if most_tokens == 0:
            logger.warning("decode runs without CUDA graphs: the host waits to learn how many tokens go to which rank")
            return []
        obstacles = operations_against_capture(self._kernels, self._weights.has_fp8)
        if obstacles:
            logger.warning("decode runs without CUDA graphs: %s may wait for the host", ", ".join(obstacles))
        # Ranks meet while they capture, so that either all do or none does.
        if not self._agreement.everywhere(not obstacles):
            if not obstacles:
                logger.warning("decode runs without CUDA graphs: operations of another rank may wait for the host")
            return []
        largest = min(config.max_running_requests, config.chunked_prefill_size)
        if most_tokens is not None:
            largest = min(largest, most_tokens)
        return graph_batch_sizes(config.cuda_graph_bs, config.cuda_graph_max_bs, largest)

    def _graphs(
        self, pool: KVCachePool, backend: GraphBackend, speculator: Speculator | None, sizes: list[int]
    ) -> StepGraphs:
        deep_ep, tree, config = self._model.slots.layout.deep_ep, self._tree, self._config
        if deep_ep is not None:
            backend = CleanedGraphs(backend, deep_ep)
        make = partial(make_step_graphs, self._model, pool, backend, context_length=self._context_length, sizes=sizes)
        if tree is None or speculator is None:
            return make()
        most_tokens = self._most_captured_tokens
        return make(
            tree_sizes=tree_sizes_of(sizes, None if most_tokens is None else most_tokens // tree.num_slots),
            # Where the tree is chosen for each step, it may be any of the ladder.
            shapes=[tree] if config.speculative_adaptive is False else ladder(tree),
            drafter=speculator.nextn,
            draws=config.speculative_acceptance == "rejection",
        )

    def _speculator(self, pool: KVCachePool) -> Speculator | None:
        return make_speculator(self._config, self._model, pool, self._sampler, self._agreement.passes)

    def _pool(self, num_blocks: int) -> KVCachePool:
        row = self._row
        return KVCachePool(
            self._num_layers,
            num_blocks,
            self._block_size,
            row.width,
            dtype=row.dtype,
            device=self._model.device,
        )

    def _ledger(
        self, total: int, pool: KVCachePool, *, graphs: int = 0, activations: int = 0, reserve: int = 0
    ) -> MemoryLedger:
        return MemoryLedger(
            device=str(self._model.device),
            total=total,
            others=self._others,
            weights=self._weights.main,
            nextn=self._weights.nextn,
            graphs=graphs,
            kv_cache=pool.num_bytes,
            kv_tokens=pool.num_tokens,
            activations=activations,
            reserve=reserve,
        )


def total_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Bytes of the machine's memory that nothing uses."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
