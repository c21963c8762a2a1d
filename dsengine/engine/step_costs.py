"""What a step would cost with this or that tree: the roofline of `dsengine plan` on a GPU, a measured table on a CPU.

Only ratios matter. A CPU is measured, because no data sheet says how a few tokens fare on it; the few passes take a
fraction of a second at start-up. Whatever the costs are, they decide how fast the answer comes, never what it says.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsengine.model.config import ModelConfig
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.forward_batch import ForwardBatch
from dsengine.model.teacher_forcing import forced_batch, num_blocks
from dsengine.plan.hardware import Gpu
from dsengine.plan.layout import Layout
from dsengine.plan.roofline import Load, RankWork, total_seconds

_TOKENS = (1, 2, 4, 8, 16, 32, 64)
_ROUNDS = 3
_PATIENCE = 0.25  # seconds of one pass, past which no larger one is tried
_SHORT, _LONG = 16, 512  # contexts whose difference tells what a cached token costs


class RooflineCosts:
    """Least times of one rank.

    Args:
        cache_bytes: bytes of a cached token in one layer.
        layout: how the model is spread; by default one GPU holds it all.
    """

    def __init__(self, config: ModelConfig, gpu: Gpu, cache_bytes: int, layout: Layout | None = None) -> None:
        self._work = RankWork(config, layout or Layout(), gpu, cache_bytes)

    def main(self, tokens: int, requests: int, context: int) -> float:
        return self._work.decode_step_seconds(Load(tokens, tokens, context, requests))

    def draft(self, tokens: int, requests: int, context: int) -> float:
        work, hidden = self._work, self._work.config.hidden_size
        layer = work.decode_layer(Load(tokens, tokens, context, requests), is_moe=True)
        projection = work.linear("eh", hidden, 2 * hidden, tokens)
        return total_seconds([*layer, projection, work.head(requests)], work.gpu)

    def catch_up(self, tokens: int) -> float:
        work, config = self._work, self._work.config
        query_width = config.q_lora_rank or config.num_attention_heads * config.qk_head_dim
        products = [
            work.linear("eh", config.hidden_size, 2 * config.hidden_size, tokens),
            work.linear("qkv_a", query_width + config.latent_dim, config.hidden_size, tokens),
        ]
        return total_seconds(products, work.gpu)


class MeasuredCosts:
    """Seconds of passes tried on this machine, with straight lines between them.

    Args:
        agree: makes of a measured time the one that all ranks go by.
    """

    def __init__(
        self,
        model: DeepseekModel,
        cache_width: int,
        cache_dtype: torch.dtype,
        agree: Callable[[float], float] = lambda seconds: seconds,
    ) -> None:
        self._model = model
        self._agree = agree
        self._row = (cache_width, cache_dtype)
        self._main = self._measure(self._run_main)
        self._draft = self._measure(self._run_draft) if model.nextn is not None else [(1, 0.0)]
        self._catch_up = self._measure(self._run_catch_up) if model.nextn is not None else [(1, 0.0)]
        cached = _LONG - _SHORT
        self._per_cached = (
            max(0.0, self._time(self._run_main, 1, _LONG) - self._time(self._run_main, 1, _SHORT)) / cached
        )

    def main(self, tokens: int, requests: int, context: int) -> float:
        return _between(self._main, tokens) + self._per_cached * requests * context

    def draft(self, tokens: int, requests: int, context: int) -> float:
        share = 1 / len(self._model.layers)
        return _between(self._draft, tokens) + share * self._per_cached * requests * context

    def catch_up(self, tokens: int) -> float:
        return _between(self._catch_up, tokens)

    def _measure(self, run: Callable[[list[int], int, Tensor], object]) -> list[tuple[int, float]]:
        table: dict[int, float] = {}
        # In rounds, so that a disturbance does not fall on one size alone.
        for _ in range(_ROUNDS):
            for tokens in _TOKENS:
                table[tokens] = min(table.get(tokens, float("inf")), self._time(run, tokens, _SHORT))
                if table[tokens] > _PATIENCE:
                    break
        return sorted(table.items())

    @torch.inference_mode()
    def _time(self, run: Callable[[list[int], int, Tensor], object], tokens: int, context: int) -> float:
        """Seconds of a pass over so many different tokens of one request, the second of two."""
        length = min(context + tokens, self._model.config.max_position_embeddings)
        text = [(7 * i) % self._model.config.vocab_size for i in range(length)]
        width, dtype = self._row
        shape = (num_blocks([text]), 16, width)
        cache = torch.zeros(shape, dtype=dtype, device=self._model.device)
        # A single thread that waits for nobody is timed by itself, so that other programs do not count.
        is_alone = torch.get_num_threads() == 1 and self._model.slots.layout.is_single
        clock = time.thread_time if is_alone else time.perf_counter
        run(text, tokens, cache)
        start = clock()
        run(text, tokens, cache)
        return self._agree(clock() - start)

    def _batch(self, text: list[int], tokens: int) -> ForwardBatch:
        """The last tokens of a text, as many in every attention group."""
        model = self._model
        batch = forced_batch([text], model.device, spans=[(len(text) - tokens, len(text))], absorbed=True)
        dp_size = model.slots.layout.dp_size
        return batch if dp_size == 1 else replace(batch, rank_tokens=(tokens,) * dp_size)

    def _run_main(self, text: list[int], tokens: int, cache: Tensor) -> None:
        model = self._model
        batch = self._batch(text, tokens)
        model.compute_logits(model.forward(batch, [cache] * len(model.layers)), batch.rank_tokens)

    def _run_draft(self, text: list[int], tokens: int, cache: Tensor) -> None:
        model = self._model
        assert model.nextn is not None
        batch = self._batch(text, tokens)
        hidden = model.embed(batch.input_ids)
        model.compute_logits(model.nextn.forward(hidden, batch.input_ids, batch, cache), batch.rank_tokens)

    def _run_catch_up(self, text: list[int], tokens: int, cache: Tensor) -> None:
        model = self._model
        assert model.nextn is not None
        batch = self._batch(text, tokens)
        hidden = model.embed(batch.input_ids)
        model.nextn.store(hidden, batch.input_ids, batch.positions, batch.slot_mapping, cache)


def _between(table: Sequence[tuple[int, float]], tokens: int) -> float:
    """The table's value at `tokens`; beyond its end on the line through its last two entries."""
    if len(table) == 1:
        return table[0][1] * tokens
    index = min(max(bisect_left([count for count, _ in table], tokens), 1), len(table) - 1)
    (count, low), (next_count, high) = table[index - 1], table[index]
    return low + (high - low) * (tokens - count) / (next_count - count)
