"""Feed-forward part of a decoder layer: one gated MLP in dense layers, routed and shared experts in the others.

Source: DeepSeek-V2 (section 2.2) and DeepSeek-V3 (section 2.1.2); routing methods are named as in the config.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsengine.kernels.registry import Kernels
from dsengine.model.activations import Activation
from dsengine.model.config import ModelConfig
from dsengine.model.linear import Linear
from dsengine.model.side_stream import SideStream
from dsengine.model.token_exchange import ExpertExchange, exchange_of, local_places
from dsengine.model.weights import Slot, WeightSlots
from dsengine.parallel.collectives import Group
from dsengine.parallel.exchange import RoutedTokens, TokenShares, group_tokens, sum_over_group, token_shares
from dsengine.parallel.expert_places import ExpertPlaces

# Tokens up to which the shared experts run beside the routed ones: with more, either fills a GPU by itself.
_BESIDE_TOKENS = 256


class GatedMLP:
    """down(silu(gate(x)) · up(x)), gate and up in one product; with several ranks, this one's share of the sum.

    Args:
        over: the ranks that share it; None: those of the attention group.
    """

    def __init__(
        self,
        slots: WeightSlots,
        kernels: Kernels,
        prefix: str,
        hidden_size: int,
        intermediate: int,
        over: Group | None = None,
    ) -> None:
        self._kernels = kernels
        self._scale_fmt = slots.activations.scale_fmt
        gate, up = f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"
        widths = {gate: intermediate, up: intermediate}
        self.gate_up = Linear(slots, kernels, hidden_size, widths, cut_rows=(gate, up), over=over)
        down = {f"{prefix}down_proj.weight": hidden_size}
        self.down = Linear(slots, kernels, intermediate, down, cut_columns=True, over=over)

    @property
    def takes_fp8(self) -> bool:
        """Whether the input is wanted in FP8 too."""
        return self.gate_up.takes_fp8

    def __call__(self, x: Activation) -> Tensor:
        """[T, hidden_size] → the same."""
        return self._activate(self.gate_up(x))

    def multiply_fp8(self, codes: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        """The same for an input that exists in FP8 only; `takes_fp8` must hold."""
        return self._activate(self.gate_up.multiply_fp8(codes, scale, out_dtype))

    def _activate(self, gate_up: Tensor) -> Tensor:
        if not self.down.takes_fp8:
            return self.down(self._kernels.silu_mul(gate_up))
        codes, scale = self._kernels.silu_mul_quant(gate_up, scale_fmt=self._scale_fmt)
        return self.down.multiply_fp8(codes, scale, gate_up.dtype)


class Router:
    """Chooses experts and their weights. Logits, scores and the selection bias are float32 whatever the model's dtype:
    the bias separates experts by less than bfloat16 resolves."""

    def __init__(self, slots: WeightSlots, kernels: Kernels, config: ModelConfig, prefix: str) -> None:
        self._kernels = kernels
        self._config = config
        experts = config.n_routed_experts
        self.weight = slots.tensor(f"{prefix}weight", experts, config.hidden_size, dtype=torch.float32)
        self.bias: Tensor | None = None
        if config.has_router_bias:
            self.bias = slots.tensor(f"{prefix}e_score_correction_bias", experts, dtype=torch.float32)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, hidden_size] → (topk_weights float32 [T, K], scaling included; topk_ids int64 [T, K])."""
        config = self._config
        return self._kernels.moe_route(
            self._kernels.router_logits(x, self.weight),
            method=config.topk_method,
            scoring=config.scoring_func,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            bias=self.bias,
            renormalize=config.norm_topk_prob,
            scaling=config.routed_scaling_factor,
        )


class MixtureOfExperts:
    """Routed experts, scaled once by their router, plus the shared experts, unscaled.

    Where every rank has all tokens, each computes its own experts, or its own channels of all experts, and the results
    are summed. Where attention groups have tokens of their own, or tokens are to be sent only where their experts are,
    each rank routes its share of the tokens and an exchange brings them to the experts.
    """

    def __init__(self, slots: WeightSlots, kernels: Kernels, config: ModelConfig, prefix: str) -> None:
        self._kernels = kernels
        self._activations = slots.activations
        self._layout = slots.layout
        self.router = Router(slots, kernels, config, f"{prefix}gate.")
        self.w_gate_up_scale: Tensor | None = None
        self.w_down_scale: Tensor | None = None
        self._beside = SideStream(slots.device)
        self._allocate_experts(slots, config, f"{prefix}experts.")
        self.shared_experts: GatedMLP | None = None
        if config.n_shared_experts:
            self.shared_experts = GatedMLP(
                slots, kernels, f"{prefix}shared_experts.", config.hidden_size, config.shared_intermediate_size
            )
        self._exchange = exchange_of(slots, config, self._first_place, len(self.w_down), self._experts_take_fp8)
        self.places = _places_of(slots, config.n_routed_experts, self._exchange)

    def _allocate_experts(self, slots: WeightSlots, config: ModelConfig, prefix: str) -> None:
        layout, hidden, inter = slots.layout, config.hidden_size, config.moe_intermediate_size
        here, channels = layout.expert_ids(config.n_routed_experts), layout.expert_channels(inter)
        self._first_place = layout.world.rank * len(here) if layout.experts_whole else 0
        experts, inter = len(here), channels.stop - channels.start
        kinds = ("gate", "up", "down")
        names = [[f"{prefix}{e}.{kind}_proj.weight" for kind in kinds] for e in range(config.n_routed_experts)]
        self._expert_names, self._slots = names, slots
        if slots.keeps_fp8([name for expert in names for name in expert]):
            self.w_gate_up = slots.empty_fp8(experts, 2 * inter, hidden)
            self.w_down = slots.empty_fp8(experts, hidden, inter)
            self.w_gate_up_scale = slots.empty_scales(experts, 2, rows=inter, columns=hidden)
            self.w_down_scale = slots.empty_scales(experts, rows=hidden, columns=inter)
        else:
            self.w_gate_up = slots.empty(experts, 2 * inter, hidden)
            self.w_down = slots.empty(experts, hidden, inter)
        is_cut = not layout.is_single and not layout.experts_whole
        cuts = ((channels,), (channels,), (slice(0, hidden), channels)) if is_cut else (None, None, None)
        elsewhere = set(range(config.n_routed_experts)).difference(here)
        slots.leave(*(name for expert in elsewhere for name in names[expert]))
        for place, expert in enumerate(here):
            for name, slot, cut in zip(names[expert], self._slots_in(place), cuts, strict=True):
                slots.add(name, replace(slot, cut=cut))

    def _slots_in(self, place: int) -> tuple[Slot, Slot, Slot]:
        """Where gate, up and down of the expert in one of this rank's places lie."""
        gate_up, down, inter = self.w_gate_up[place], self.w_down[place], self.w_gate_up.shape[1] // 2
        if self.w_gate_up_scale is None or self.w_down_scale is None:
            return Slot(gate_up[:inter]), Slot(gate_up[inter:]), Slot(down)
        gate_scale, up_scale = self.w_gate_up_scale[place]
        return Slot(gate_up[:inter], gate_scale), Slot(gate_up[inter:], up_scale), Slot(down, self.w_down_scale[place])

    def rearrange(self, placement: Sequence[int]) -> None:
        """Experts lie elsewhere from now on, as in `ExpertPlaces.update`; their weights have gone there already."""
        assert self.places is not None, "the experts of this layer do not move"
        self.places.update(placement)
        here = placement[self._first_place : self._first_place + len(self.w_down)]
        mine = {
            name: slot
            for place, expert in enumerate(here)
            for name, slot in zip(self._expert_names[expert], self._slots_in(place), strict=True)
        }
        self._slots.move(mine, {name for names in self._expert_names for name in names if name not in mine})

    @property
    def expert_weights(self) -> list[Tensor]:
        """What routed experts are made of, [places here, ...] each."""
        parts = (self.w_gate_up, self.w_down, self.w_gate_up_scale, self.w_down_scale)
        return [part for part in parts if part is not None]

    @property
    def takes_fp8(self) -> bool:
        """Whether the input is wanted in FP8 too."""
        return self._experts_take_fp8 or (self.shared_experts is not None and self.shared_experts.takes_fp8)

    @property
    def _experts_take_fp8(self) -> bool:
        return self.w_gate_up_scale is not None and self._activations.is_fp8

    def __call__(self, x: Activation, rank_tokens: tuple[int, ...] | None = None) -> Tensor:
        """[T, hidden_size] → the same, summed over all ranks.

        Args:
            rank_tokens: of the pass, as in `ForwardBatch`.
        """
        layout, num_tokens = self._layout, x.value.shape[0]
        if self._exchange is None:
            shared = self._start_shared(x) if num_tokens <= _BESIDE_TOKENS else None
            routed = self._all_routed(x)
            if shared is None:
                shared = self._start_shared(x)
            return layout.attention.all_reduce(routed + shared() if shared is not None else routed)
        tokens = group_tokens(num_tokens, rank_tokens, layout.dp_size, layout.dp_rank)
        shares = token_shares(tokens, layout.attention.size, layout.world.rank)
        shared = self._start_shared(x)  # it overlaps with the exchange
        routed = self._exchanged(self._exchange, x.rows(shares.own), shares)
        return sum_over_group(layout.attention, shared() if shared is not None else None, routed, num_tokens, shares)

    def _start_shared(self, x: Activation) -> Callable[[], Tensor] | None:
        shared_experts = self.shared_experts
        return None if shared_experts is None else self._beside.start(lambda: shared_experts(x))

    def _all_routed(self, x: Activation) -> Tensor:
        """This rank's part of the sum over the ranks, for tokens that all ranks have."""
        weights, places = self._route(x.value)
        places = local_places(self._layout, places, self._first_place, len(self.w_down))
        if not self._experts_take_fp8:
            return self._compute(RoutedTokens(x.value, None, weights, places), x.value.dtype)
        assert x.codes is not None, "the norm before FP8 experts quantises"
        return self._compute(RoutedTokens(x.codes, x.scale, weights, places), x.value.dtype)

    def _exchanged(self, exchange: ExpertExchange, x: Activation, shares: TokenShares) -> Tensor:
        """The complete sums for the tokens that this rank brings."""
        weights, places = self._route(x.value)
        tokens, combine = exchange.dispatch(x, weights, places, shares)
        return combine(self._compute(tokens, x.value.dtype))

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(weights float32 [T, K]; the places of the experts, counted over all ranks, int64 [T, K])."""
        weights, expert_ids = self.router(x)
        return weights, expert_ids if self.places is None else self.places(expert_ids)

    def _compute(self, tokens: RoutedTokens, dtype: torch.dtype) -> Tensor:
        """[n, hidden_size] of `dtype`: what the experts here add up to; places are counted from this rank's first."""
        is_fp8 = tokens.x_scale is not None
        return self._kernels.moe_experts(
            tokens.x,
            self.w_gate_up,
            self.w_down,
            tokens.weights,
            tokens.places,
            w_gate_up_scale=self.w_gate_up_scale,
            w_down_scale=self.w_down_scale,
            x_scale=tokens.x_scale,
            out_dtype=dtype,
            scale_fmt=self._activations.scale_fmt if is_fp8 else None,
        )


def _places_of(slots: WeightSlots, num_experts: int, exchange: ExpertExchange | None) -> ExpertPlaces | None:
    layout = slots.layout
    if not (layout.redundant_experts or layout.balances_experts):
        return None
    assert layout.experts_whole, "parts of experts do not move"
    copies = min(layout.world.size, 1 + layout.redundant_experts)
    turn = 0 if exchange is None else layout.world.rank
    return ExpertPlaces(num_experts, layout.expert_placement(num_experts), copies, turn, slots.device)
