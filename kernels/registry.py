"""Chooses one backend per operation, once, at start-up; the model is handed the result and asks no further.

No state is kept here: `select_kernels` returns a frozen `Kernels`, which is passed to whoever computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsengine.kernels.backend import Operation
from dsengine.kernels.embed.api import EMBED, Embed
from dsengine.kernels.gather_latents.api import GATHER_LATENTS, GatherLatents
from dsengine.kernels.gemm_fp8_block.api import GEMM_FP8_BLOCK, GemmFp8Block
from dsengine.kernels.linear.api import LINEAR, Linear
from dsengine.kernels.logits.api import PROCESS_LOGITS, ProcessLogits
from dsengine.kernels.merge_attention.api import MERGE_ATTENTION, MergeAttention
from dsengine.kernels.mla_absorb.api import ABSORB_QUERIES, RELEASE_VALUES, AbsorbQueries, ReleaseValues
from dsengine.kernels.mla_decode.api import MLA_DECODE, MlaDecode
from dsengine.kernels.mla_prefill.api import MLA_PREFILL, MlaPrefill
from dsengine.kernels.mla_prep.api import MLA_PREP, MlaPrep
from dsengine.kernels.moe_experts.api import MOE_EXPERTS, MoeExperts
from dsengine.kernels.moe_route.api import MOE_ROUTE, ROUTER_LOGITS, MoeRoute, RouterLogits
from dsengine.kernels.quant_fp8_group.api import QUANT_FP8_GROUP, QuantFp8Group
from dsengine.kernels.rms_norm.api import (
    ADD_RMS_NORM,
    ADD_RMS_NORM_QUANT,
    RMS_NORM,
    RMS_NORM_QUANT,
    AddRmsNorm,
    AddRmsNormQuant,
    RmsNorm,
    RmsNormQuant,
)
from dsengine.kernels.rope.api import ROPE, Rope
from dsengine.kernels.sample.api import SAMPLE, Sample
from dsengine.kernels.silu_mul.api import SILU_MUL, SILU_MUL_QUANT, SiluMul, SiluMulQuant

OPERATIONS: tuple[Operation, ...] = (
    EMBED,
    LINEAR,
    RMS_NORM,
    ADD_RMS_NORM,
    RMS_NORM_QUANT,
    ADD_RMS_NORM_QUANT,
    ROPE,
    MLA_PREP,
    GATHER_LATENTS,
    ABSORB_QUERIES,
    MLA_DECODE,
    RELEASE_VALUES,
    MLA_PREFILL,
    MERGE_ATTENTION,
    ROUTER_LOGITS,
    MOE_ROUTE,
    MOE_EXPERTS,
    GEMM_FP8_BLOCK,
    QUANT_FP8_GROUP,
    SILU_MUL,
    SILU_MUL_QUANT,
    PROCESS_LOGITS,
    SAMPLE,
)


@dataclass(frozen=True)
class Choice:
    """The backend that serves an operation, and why it and not another."""

    operation: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Kernels:
    """Every operation with its backend filled in; a field has the signature of the operation's function in `api.py`."""

    embed: Embed
    linear: Linear
    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    rms_norm_quant: RmsNormQuant
    add_rms_norm_quant: AddRmsNormQuant
    rope: Rope
    mla_prep: MlaPrep
    gather_latents: GatherLatents
    absorb_queries: AbsorbQueries
    mla_decode: MlaDecode
    release_values: ReleaseValues
    mla_prefill: MlaPrefill
    merge_attention: MergeAttention
    router_logits: RouterLogits
    moe_route: MoeRoute
    moe_experts: MoeExperts
    gemm_fp8_block: GemmFp8Block
    quant_fp8_group: QuantFp8Group
    silu_mul: SiluMul
    silu_mul_quant: SiluMulQuant
    process_logits: ProcessLogits
    sample: Sample
    choices: tuple[Choice, ...]

    def table(self) -> dict[str, str]:
        """Name of the backend of each operation."""
        return {choice.operation: choice.backend for choice in self.choices}

    def explain(self) -> list[tuple[str, str, str]]:
        """(operation, backend, reason) of each operation."""
        return [(choice.operation, choice.backend, choice.reason) for choice in self.choices]


def select_kernels(
    device: torch.device,
    forced: Mapping[str, str] | None = None,
    rejected: Mapping[str, Mapping[str, str]] | None = None,
) -> Kernels:
    """Takes the first available backend of each operation, or the forced one.

    Args:
        device: where the model runs.
        forced: backend name by operation name, as from `--kernel mla_decode=ref`.
        rejected: by operation name, backends that must not be taken, and why ("failed the self-test").

    Raises:
        ValueError: an operation or backend name is unknown, or the forced backend cannot run on the device.
    """
    forced = dict(forced or {})
    unknown = forced.keys() - {operation.name for operation in OPERATIONS}
    if unknown:
        known = ", ".join(operation.name for operation in OPERATIONS)
        raise ValueError(f"no operation is called {sorted(unknown)[0]!r}; there are {known}")
    functions: dict[str, Any] = {}
    choices = []
    for operation in OPERATIONS:
        choice = _choose(operation, device, forced.get(operation.name), (rejected or {}).get(operation.name, {}))
        functions[operation.name] = operation.bind(operation.backend(choice.backend))
        choices.append(choice)
    return Kernels(**functions, choices=tuple(choices))


def _choose(operation: Operation, device: torch.device, forced: str | None, rejected: Mapping[str, str]) -> Choice:
    if forced is not None:
        available, reason = operation.backend(forced).is_available(device)
        if not available:
            raise ValueError(f"backend {forced!r} of {operation.name} was asked for, but it {reason}")
        return Choice(operation.name, forced, "forced")
    refused: list[str] = []
    for backend in operation.backends:
        available, reason = backend.is_available(device)
        if backend.name in rejected:
            available, reason = False, rejected[backend.name]
        if available:
            return Choice(operation.name, backend.name, "; ".join([reason, *refused]))
        refused.append(f"{backend.name} {reason}")
    raise AssertionError(f"{operation.name} has no backend for {device}: {refused}")
