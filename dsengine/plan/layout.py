"""How a model may be spread over GPUs, and what share of it one of them holds.

World = attention-DP × attention-TP: within an attention-TP group the ranks split the heads of the same tokens, groups
have requests of their own. Routed experts are split over the whole world, by experts (EP) or within each expert (TP).
The latent cache has one head, so that every rank of an attention-TP group holds all of its group's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsengine.model.config import ModelConfig

ExpertSplit = Literal["ep", "tp"]

_FP8_BLOCK = 128


@dataclass(frozen=True)
class Layout:
    """One way to spread a model; `Layout()` is a single GPU.

    Attributes:
        attn_tp: ranks that share the heads, the shared experts and the embedding.
        attn_dp: groups of such ranks, each with requests and a cache of its own.
        experts: "ep": each rank holds E / world whole experts; "tp": a slice of every expert.
        redundant: further copies of experts that the world holds, so that busy ones lie on several ranks.
        dense_over_world, lm_head_over_world: all ranks share the dense layers, or the lm_head, rather than those of a
            group.
    """

    attn_tp: int = 1
    attn_dp: int = 1
    experts: ExpertSplit = "tp"
    redundant: int = 0
    dense_over_world: bool = False
    lm_head_over_world: bool = False

    @property
    def dense_ranks(self) -> int:
        """That share the dense layers."""
        return self.world if self.dense_over_world else self.attn_tp

    @property
    def lm_head_ranks(self) -> int:
        """That share the lm_head."""
        return self.world if self.lm_head_over_world else self.attn_tp

    @property
    def world(self) -> int:
        return self.attn_tp * self.attn_dp

    @property
    def name(self) -> str:
        """As in "TP8", "DP8 EP8", "DP2 TP4 EP8", with redundant experts "DP72 EP72+32", or "DP8 EP8 dense8 head8" where
        all ranks share the dense layers and the lm_head."""
        if self.world == 1:
            return "one GPU"
        parts = [f"DP{self.attn_dp}"] if self.attn_dp > 1 else []
        parts += [f"TP{self.attn_tp}"] if self.attn_tp > 1 else []
        extra = f"+{self.redundant}" if self.redundant else ""
        parts += [f"EP{self.world}{extra}"] if self.experts == "ep" else []
        parts += [f"dense{self.world}"] if self.dense_ranks > self.attn_tp else []
        parts += [f"head{self.world}"] if self.lm_head_ranks > self.attn_tp else []
        return " ".join(parts)

    def problem(self, config: ModelConfig) -> str | None:
        """Why the model cannot be cut this way, or None."""
        heads, experts, inter = config.num_attention_heads, config.n_routed_experts, config.moe_intermediate_size
        if heads % self.attn_tp:
            return f"{heads} heads do not divide by {self.attn_tp}"
        if self.experts == "ep" and (experts + self.redundant) % self.world:
            return f"{experts + self.redundant} experts do not divide by {self.world}"
        if self.experts == "tp" and (self.attn_dp > 1 or inter % self.world):
            return f"a slice of every expert on {self.world} ranks needs one TP group, and {inter} to divide"
        if self.experts == "tp" and config.quantization is not None and inter // self.world % _FP8_BLOCK:
            return f"{inter} / {self.world} columns of an expert are no whole FP8 blocks of {_FP8_BLOCK}"
        for name, width, ranks in (
            ("a dense layer", config.intermediate_size, self.dense_ranks),
            ("shared experts", config.shared_intermediate_size, self.attn_tp),
        ):
            unit = _FP8_BLOCK if config.quantization is not None and ranks > 1 else 1
            if width % (ranks * unit):
                return f"{width} columns of {name} do not divide by {ranks} in whole blocks of {unit}"
        return None


def layouts(
    config: ModelConfig, num_gpus: int, *, dense_over_world: bool = False, lm_head_over_world: bool = False
) -> list[Layout]:
    """All layouts of the model on `num_gpus`: from pure tensor parallelism to pure data parallelism with EP.

    Args:
        dense_over_world, lm_head_over_world: as in `Layout`, of those with several groups.
    """
    if num_gpus == 1:
        return [Layout()]
    found = []
    for attn_tp in range(num_gpus, 0, -1):
        if num_gpus % attn_tp == 0:
            for experts in ("tp", "ep"):
                attn_dp = num_gpus // attn_tp
                shared = (dense_over_world and attn_dp > 1, lm_head_over_world and attn_dp > 1)
                layout = Layout(attn_tp, attn_dp, experts, 0, *shared)
                if layout.problem(config) is None:
                    found.append(layout)
    return found
