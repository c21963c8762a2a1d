"""Which part of every weight a rank holds: heads, intermediate channels, experts and vocabulary.

World = attention-DP x attention-TP. The ranks of one attention-TP group share the heads, the shared experts and the
embedding of the same tokens; the groups have tokens of their own. Routed experts lie on all ranks of the world, whole
or cut. Dense layers and the lm_head are shared by either: by a group without further exchanges, or by the world, each
rank holding as much less.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from dsengine.parallel.collectives import Group, SingleProcess
from dsengine.parallel.deep_ep import DeepEp

MoeExchange = Literal["gather", "all_to_all", "deepep", "deepep_normal"]


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks; `Layout()` is one process that holds everything.

    Attributes:
        world: all ranks, numbered dp_rank · attention.size + attention.rank.
        attention: the ranks that share this rank's tokens.
        experts_whole: routed experts are dealt out whole (expert parallelism) rather than cut along their intermediate
            dimension (tensor parallelism).
        moe_exchange: how tokens come to routed experts on other ranks: "gather" brings all to all, "all_to_all" each to
            where its experts are (experts must be whole), as does DeepEP, with its low-latency kernels or without.
        redundant_experts: further copies of experts that the world holds, so that busy ones lie on several ranks.
        balances_experts: tokens are counted by expert, and experts may move (they must be whole).
        dense_over_world, lm_head_over_world: all ranks share the dense layers, or the lm_head, rather than those of an
            attention group.
    """

    world: Group = field(default_factory=SingleProcess)
    attention: Group = field(default_factory=SingleProcess)
    experts_whole: bool = False
    moe_exchange: MoeExchange = "gather"
    redundant_experts: int = 0
    balances_experts: bool = False
    dense_over_world: bool = False
    lm_head_over_world: bool = False

    @property
    def is_single(self) -> bool:
        return self.world.size == 1

    @property
    def dp_size(self) -> int:
        """Groups of ranks that have tokens of their own."""
        return self.world.size // self.attention.size

    @property
    def dp_rank(self) -> int:
        """This rank's group."""
        return self.world.rank // self.attention.size

    @cached_property
    def deep_ep(self) -> DeepEp | None:
        """What carries the tokens of all layers, where that is DeepEP.

        Raises:
            ValueError: the package cannot be used.
        """
        if self.is_single or self.moe_exchange not in ("deepep", "deepep_normal"):
            return None
        return DeepEp(self.world, low_latency=self.moe_exchange == "deepep")

    @property
    def dense(self) -> Group:
        """The ranks that share the dense layers; `attention` itself where that is the same."""
        return self.world if self.dense_over_world and self.dp_size > 1 else self.attention

    @property
    def lm_head(self) -> Group:
        """The ranks that share the lm_head; `attention` itself where that is the same."""
        return self.world if self.lm_head_over_world and self.dp_size > 1 else self.attention

    def part(self, extent: int, group: Group | None = None) -> slice:
        """This rank's of the equal parts of a dimension that the ranks of `group` share, by default the attention
        group; `extent` must be divisible."""
        return _part(group or self.attention, extent)

    def expert_channels(self, extent: int) -> slice:
        """This rank's channels of every routed expert."""
        return slice(0, extent) if self.experts_whole else _part(self.world, extent)

    def expert_placement(self, count: int) -> list[int]:
        """The expert, of `count`, in each place of the world before any has moved: the copies are of the first."""
        return [place % count for place in range(count + self.redundant_experts)]

    def expert_ids(self, count: int) -> list[int]:
        """The routed experts, of `count`, in this rank's places before any has moved."""
        if not self.experts_whole:
            return list(range(count))
        return self.expert_placement(count)[_part(self.world, count + self.redundant_experts)]

    def padded_part(self, extent: int, group: Group | None = None) -> tuple[slice, int]:
        """(this rank's part, width of every rank's part with its padding) of a dimension of any extent, cut over
        `group`, by default the attention group: the last ranks' parts may be shorter, or empty."""
        group = group or self.attention
        width = -(-extent // group.size)
        start = min(group.rank * width, extent)
        return slice(start, min(start + width, extent)), width


def _part(group: Group, extent: int) -> slice:
    width = extent // group.size
    assert width * group.size == extent, f"{extent} cannot be cut into {group.size} equal parts"
    return slice(group.rank * width, (group.rank + 1) * width)
