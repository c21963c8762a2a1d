"""Inputs of the start-up self-test: small, seeded, and made of slices of the checkpoint's own weights.

Real weights matter: their magnitudes, their scales and the router's bias are what a kernel will meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dsengine.engine.self_test import Probe
from dsengine.kernels.fp8_kv import fp8_kv_bytes, quantize_latents
from dsengine.kernels.logits.api import LogitEdits
from dsengine.kernels.quant_fp8_group.ref import quant_fp8_group_ref
from dsengine.model.activations import ActivationFormat
from dsengine.model.checkpoint import StoredTensor
from dsengine.model.config import LATENT_NORM_EPS, ModelConfig
from dsengine.model.loader import checked_tensors
from dsengine.model.rope import rotary_table
from dsengine.model.tensors import FP8_DTYPE, SCALE_SUFFIX, layer_prefix
from dsengine.quant.block_fp8 import dequantize_block_fp8

_BLOCK = 128
_ROWS = 256  # rows of a weight that are looked at: two blocks of scales
_TOKENS = 5
_EXPERTS = 4
_CACHE_BLOCKS, _BLOCK_SIZE = 12, 16


def _sum_of_parts(logits: Tensor) -> Tensor:
    return logits if logits.ndim == 2 else logits.sum(dim=0)


class _Slices:
    """First rows of stored tensors, in the form the model will hold them."""

    def __init__(
        self, stored: dict[str, StoredTensor], device: torch.device, dtype: torch.dtype, keep_fp8: bool
    ) -> None:
        self._stored = stored
        self._device = device
        self._dtype = dtype
        self._keep_fp8 = keep_fp8

    def is_fp8(self, name: str) -> bool:
        return self._keep_fp8 and self._stored[name].dtype == FP8_DTYPE

    def weight(self, name: str, rows: int, columns: int | None = None) -> tuple[Tensor, Tensor | None]:
        """(weight, scales or None where it is not FP8), cut to at most `rows` and `columns` (multiples of 128)."""
        tensor = self._read(name, rows, columns)
        if self._stored[name].dtype != FP8_DTYPE:
            return tensor.to(self._dtype), None
        blocks = None if columns is None else columns // _BLOCK
        scale = self._read(name + SCALE_SUFFIX, -(-tensor.shape[0] // _BLOCK), blocks).float()
        if self._keep_fp8:
            return tensor, scale
        return dequantize_block_fp8(tensor, scale, dtype=self._dtype), None

    def float32(self, name: str) -> Tensor:
        return self._read(name, None, None).float()

    def _read(self, name: str, rows: int | None, columns: int | None) -> Tensor:
        with safe_open(self._stored[name].file, framework="pt", device="cpu") as data:
            part = data.get_slice(name)
            read: Tensor = part[:rows] if len(part.get_shape()) == 1 else part[:rows, :columns]
        return read.contiguous().to(self._device)


class ProbeMaker:
    """Makes the probes of one checkpoint.

    Args:
        keep_fp8: FP8 weights stay FP8 in memory.
        activations: what their layers take as input.
        fp8_cache: the KV cache holds FP8.

    Raises:
        CheckpointError: the files do not hold what the config says.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        keep_fp8: bool,
        activations: ActivationFormat,
        fp8_cache: bool,
    ) -> None:
        self._slices = _Slices(checked_tensors(folder, config), device, dtype, keep_fp8)
        self._config = config
        self._device = device
        self._dtype = dtype
        self._activations = activations
        self._fp8_cache = fp8_cache
        self._generator = torch.Generator().manual_seed(0)
        self._attention = f"{layer_prefix(0)}self_attn."

    def probes(self) -> Iterator[Probe]:
        """All probes, in the order of a layer's operations."""
        table, _ = self._slices.weight("model.embed_tokens.weight", _ROWS)
        ids = self._integers(0, 255, 7, 7, 100, dtype=torch.int64)
        yield Probe("embed", "model.embed_tokens", (ids, table))
        yield from self._norms()
        yield from self._linear()
        yield from self._attention_probes()
        if self._config.first_k_dense_replace < self._config.num_hidden_layers:
            yield from self._moe()
        yield from self._head()

    def _random(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self._generator) * scale
        return values.to(device=self._device, dtype=dtype or self._dtype)

    def _integers(self, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _norms(self) -> Iterator[Probe]:
        config, scale_fmt = self._config, self._activations.scale_fmt
        layer = f"{layer_prefix(0)}input_layernorm"
        weight, eps = self._slices.float32(f"{layer}.weight"), config.rms_norm_eps
        x, residual = self._random(_TOKENS, config.hidden_size), self._random(_TOKENS, config.hidden_size)
        yield Probe("rms_norm", layer, (x, weight, eps))
        yield Probe("add_rms_norm", layer, (x, residual, weight, eps))
        yield Probe("rms_norm_quant", layer, (x, weight, eps), {"scale_fmt": scale_fmt})
        yield Probe("add_rms_norm_quant", layer, (x, residual, weight, eps), {"scale_fmt": scale_fmt})
        yield Probe("quant_fp8_group", layer, (x,), {"scale_fmt": scale_fmt})
        gate_up = self._random(_TOKENS, 2 * config.intermediate_size)
        yield Probe("silu_mul", f"{layer_prefix(0)}mlp", (gate_up,))
        yield Probe("silu_mul_quant", f"{layer_prefix(0)}mlp", (gate_up,), {"scale_fmt": scale_fmt})

    def _linear(self) -> Iterator[Probe]:
        head, _ = self._slices.weight("lm_head.weight", _ROWS)
        for tokens in (1, _TOKENS, 40):
            yield Probe("linear", "lm_head", (self._random(tokens, head.shape[1]), head))
        for name in (f"{self._attention}kv_a_proj_with_mqa.weight", f"{self._attention}o_proj.weight"):
            if not self._slices.is_fp8(name):
                continue
            weight, scale = self._slices.weight(name, _ROWS)
            for tokens in (1, _TOKENS, 160):
                x = self._random(tokens, weight.shape[1])
                codes, x_scale = self._quantised(x)
                yield Probe("gemm_fp8_block", name, (codes, weight, scale, x_scale), {"out_dtype": self._dtype})

    def _quantised(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self._activations.is_fp8:
            return x, None
        return quant_fp8_group_ref(x, scale_fmt=self._activations.scale_fmt, floor=1e-4)

    def _attention_probes(self) -> Iterator[Probe]:
        config, layer = self._config, f"{self._attention}kv_a_layernorm"
        rank, rope, heads = config.kv_lora_rank, config.qk_rope_head_dim, config.num_attention_heads
        table, positions = rotary_table(config, self._device), self._integers(0, 3, 17, 40, 41, dtype=torch.int64)
        q_rope = self._random(_TOKENS, heads, rope)
        yield Probe("rope", layer, (q_rope, table, positions))
        cache = self._cache(rank, rope)
        slots = self._integers(3, -1, 16, 40, 41, dtype=torch.int64)
        kv_a, weight = self._random(_TOKENS, rank + rope), self._slices.float32(f"{layer}.weight")
        arguments = (q_rope, kv_a, weight, LATENT_NORM_EPS, table, positions, slots, cache)
        yield Probe("mla_prep", layer, arguments, written=(7,))
        rows = self._integers(5, 0, 100, 33, dtype=torch.int64)
        yield Probe("gather_latents", layer, (cache, rows), {"rank": rank, "dtype": self._dtype})
        yield from self._decode(cache)
        yield from self._prefill()

    def _cache(self, rank: int, rope: int) -> Tensor:
        rows = self._random(_CACHE_BLOCKS * _BLOCK_SIZE, rank + rope)
        if not self._fp8_cache:
            return rows.view(_CACHE_BLOCKS, _BLOCK_SIZE, rank + rope)
        return quantize_latents(rows, rank).view(_CACHE_BLOCKS, _BLOCK_SIZE, fp8_kv_bytes(rank, rope))

    def _decode(self, cache: Tensor) -> Iterator[Probe]:
        config = self._config
        heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        table = torch.randperm(_CACHE_BLOCKS, generator=self._generator).view(3, 4).to(self._device, torch.int32)
        lengths, starts = self._integers(1, 37, 64), self._integers(0, 1, 2, 5)
        mask = torch.ones(5, 3, dtype=torch.bool, device=self._device)
        mask[2:] = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
        arguments = (
            self._random(5, heads, rank, scale=0.3), self._random(5, heads, rope), cache, table, lengths, starts,
            config.softmax_scale,
        )  # fmt: skip
        w_uk = self._random(heads, config.qk_nope_head_dim, rank, scale=0.1)
        w_uv = self._random(heads, config.v_head_dim, rank, scale=0.1)
        for tokens in (_TOKENS, 40):
            yield Probe("absorb_queries", self._attention, (self._random(tokens, heads, w_uk.shape[1]), w_uk))
            yield Probe("release_values", self._attention, (self._random(tokens, heads, rank), w_uv))
        for ancestors in (None, mask):
            yield Probe("mla_decode", self._attention, arguments, {"ancestor_mask": ancestors, "max_seqlen_q": 3})

    def _prefill(self) -> Iterator[Probe]:
        config = self._config
        heads, width, value_width = min(config.num_attention_heads, 8), config.qk_head_dim, config.v_head_dim
        q, k = self._random(40, heads, width), self._random(90, heads, width)
        v = self._random(90, heads, value_width)
        starts_q, starts_k = self._integers(0, 33, 40), self._integers(0, 33, 90)
        for causal in (True, False):
            arguments = (q, k, v, starts_q, starts_k, config.softmax_scale)
            yield Probe("mla_prefill", self._attention, arguments, {"causal": causal})
        lse_a, lse_b = (self._random(40, heads, dtype=torch.float32, scale=3.0) for _ in range(2))
        out_a, out_b = (self._random(40, heads, value_width) for _ in range(2))
        yield Probe("merge_attention", self._attention, (out_a, lse_a, out_b, lse_b))

    def _moe(self) -> Iterator[Probe]:
        config = self._config
        layer = f"{layer_prefix(config.first_k_dense_replace)}mlp."
        router = self._slices.float32(f"{layer}gate.weight")
        x = self._random(64, config.hidden_size)
        bias = self._slices.float32(f"{layer}gate.e_score_correction_bias") if config.has_router_bias else None
        yield Probe("router_logits", f"{layer}gate", (x, router), comparable=_sum_of_parts)
        keywords = {
            "method": config.topk_method, "scoring": config.scoring_func, "top_k": config.num_experts_per_tok,
            "n_group": config.n_group, "topk_group": config.topk_group, "bias": bias,
            "renormalize": config.norm_topk_prob, "scaling": config.routed_scaling_factor,
        }  # fmt: skip
        yield Probe("moe_route", f"{layer}gate", (x.float() @ router.T,), keywords, chooses=True)
        yield from self._experts(f"{layer}experts.")

    def _experts(self, layer: str) -> Iterator[Probe]:
        experts = range(min(_EXPERTS, self._config.n_routed_experts))
        rows = min(_ROWS, self._config.moe_intermediate_size)
        gates, ups, downs = (
            [self._slices.weight(f"{layer}{e}.{kind}_proj.weight", *shape) for e in experts]
            for kind, *shape in (("gate", rows), ("up", rows), ("down", self._config.hidden_size, rows))
        )
        w_gate_up = torch.stack([torch.cat((gate, up)) for (gate, _), (up, _) in zip(gates, ups, strict=True)])
        w_down = torch.stack([weight for weight, _ in downs])
        keywords: dict[str, Tensor | torch.dtype | str | None] = {}
        is_fp8 = self._slices.is_fp8(f"{layer}0.gate_proj.weight")
        if is_fp8:
            pairs = [torch.stack((gate, up)) for (_, gate), (_, up) in zip(gates, ups, strict=True)]  # type: ignore[arg-type]
            keywords["w_gate_up_scale"] = torch.stack(pairs)
            keywords["w_down_scale"] = torch.stack([scale for _, scale in downs if scale is not None])
        for tokens in (2, 40):
            x = self._random(tokens, self._config.hidden_size)
            codes, x_scale = self._quantised(x) if is_fp8 else (x, None)
            ids = torch.stack([torch.randperm(len(experts), generator=self._generator)[:2] for _ in range(tokens)])
            weights = torch.rand(ids.shape, generator=self._generator)
            arguments = (codes, w_gate_up, w_down, weights.to(self._device), ids.to(self._device))
            form = {
                "x_scale": x_scale,
                "out_dtype": self._dtype,
                "scale_fmt": self._activations.scale_fmt if x_scale is not None else None,
            }
            yield Probe("moe_experts", layer, arguments, keywords | form)

    def _head(self) -> Iterator[Probe]:
        rows, vocab = 16, min(self._config.vocab_size, 4096)
        logits = self._random(rows, vocab, dtype=torch.float32, scale=2.0)
        yield Probe("process_logits", "lm_head", (logits, vocab - 7, self._edits(rows)), written=(0,))
        column = self._random(rows, dtype=torch.float32).abs()
        arguments = (
            logits, column * (column > 0.3), torch.full((rows,), 50, device=self._device), 0.5 + column.clamp(max=0.5),
            column * 0.05, torch.arange(rows, device=self._device), torch.arange(rows, device=self._device) * 7,
        )  # fmt: skip
        yield Probe("sample", "lm_head", arguments, chooses=True)

    def _edits(self, rows: int) -> LogitEdits:
        """Every row has penalties on two tokens, a bias on one and a ban on another."""
        pairs = torch.arange(2 * rows, dtype=torch.int32, device=self._device)
        singles = torch.arange(rows, dtype=torch.int32, device=self._device)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=self._device)
        penalty = torch.linspace(0.5, 1.5, rows, device=self._device)
        return LogitEdits(
            repetition_penalty=penalty, presence_penalty=penalty - 1, frequency_penalty=0.1 * penalty,
            seen_starts=2 * starts, seen_ids=pairs, seen_counts=pairs % 3,
            bias_starts=starts, bias_ids=singles + 3, bias_values=penalty,
            banned_starts=starts, banned_ids=singles + 5,
        )  # fmt: skip
