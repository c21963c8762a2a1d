"""FP8 activations and the FP8 cache: the model quantises where its layers read, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fp8_checkpoints import ALIGNED, RAGGED, fp8_config
from tiny_checkpoints import TINY_CONFIGS, Session, cpu_kernels, load_tiny
from torch import Tensor

from dsengine.kernels.gemm_fp8_block.ref import dequantize_groups
from dsengine.kernels.registry import Kernels
from dsengine.model.random_checkpoint import write_random_checkpoint

TOKENS = torch.randint(0, 320, (50,), generator=torch.Generator().manual_seed(0)).tolist()


def quantising_each_input(scale_fmt: str | None) -> Kernels:
    """Kernels whose FP8 products quantise their own float input: what a model that quantises anywhere must equal."""
    kernels = cpu_kernels()

    def gemm(
        x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor | None = None, *, out_dtype: torch.dtype
    ) -> Tensor:
        assert x_scale is None
        codes, groups = kernels.quant_fp8_group(x, scale_fmt=scale_fmt)  # type: ignore[arg-type]
        return kernels.gemm_fp8_block(
            dequantize_groups(codes, groups).to(x.dtype), weight, weight_scale, out_dtype=out_dtype
        )

    def experts(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        assert keywords["x_scale"] is None
        codes, groups = kernels.quant_fp8_group(x, scale_fmt=scale_fmt)  # type: ignore[arg-type]
        return kernels.moe_experts(codes, *arguments, **keywords | {"x_scale": groups, "scale_fmt": scale_fmt})

    return replace(kernels, gemm_fp8_block=gemm, moe_experts=experts)


def logits_of(folder: Path, **options: Any) -> Tensor:
    session = Session(load_tiny(folder, weight_format="fp8", **options), max_tokens=64, num_requests=1)
    return torch.cat([session.run([(0, TOKENS[:30])])[0], session.run([(0, TOKENS[30:])], num_decodes=1)[0]])


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize(("name", "sizes"), [("v2_lite", RAGGED), ("v3", RAGGED), ("v3", ALIGNED)])
def test_layers_get_their_input_quantised(
    tmp_path: Path, name: str, sizes: dict[str, Any], scale_fmt: str | None
) -> None:
    write_random_checkpoint(tmp_path, fp8_config(name, sizes, scale_fmt), seed=1)
    ours = logits_of(tmp_path, activation_format="fp8")
    expected = logits_of(tmp_path, activation_format="float", kernels=quantising_each_input(scale_fmt))
    exact = logits_of(tmp_path, activation_format="float")
    scale = exact.abs().max()
    # Means: a value on the edge between two codes, or a token between two experts, may fall either way.
    assert (ours - expected).abs().mean() / scale < 1e-3
    assert 2e-3 < (ours - exact).abs().mean() / scale < 0.05


def test_dequantised_weights_take_float_activations(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, fp8_config("v3", ALIGNED), seed=1)
    for activation_format in ("auto", "fp8", "float"):
        model = load_tiny(tmp_path, weight_format="dequantized", activation_format=activation_format)
        assert not any(layer.attention.takes_fp8 or layer.mlp.takes_fp8 for layer in model.layers)
    model = load_tiny(tmp_path, weight_format="fp8", activation_format="auto")  # a CPU does not compute in FP8
    assert not any(layer.attention.takes_fp8 or layer.mlp.takes_fp8 for layer in model.layers)


@pytest.mark.parametrize("name", ["v2_lite", "v3"])
def test_fp8_cache_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    write_random_checkpoint(tmp_path, TINY_CONFIGS[name] | {"kv_lora_rank": 128}, seed=2)
    model = load_tiny(tmp_path)

    def run(chunks: list[int], num_decodes: int, fp8_cache: bool) -> Tensor:
        session = Session(model, max_tokens=64, num_requests=1, fp8_cache=fp8_cache)
        rows, start = [], 0
        for size in chunks:
            rows.append(session.run([(0, TOKENS[start : start + size])], num_decodes=num_decodes)[0])
            start += size
        return torch.cat(rows)

    exact = run([50], 0, fp8_cache=False)
    whole = run([50], 0, fp8_cache=True)
    scale = exact.abs().max()
    assert 1e-4 < (whole - exact).abs().max() / scale < 0.2
    for chunks, num_decodes in (([20, 17, 13], 0), ([1] * 50, 1), ([30, 20], 1)):
        assert (run(chunks, num_decodes, fp8_cache=True) - whole).abs().max() / scale < 2e-2
