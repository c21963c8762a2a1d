"""Which experts a token goes to, and with what weight: the router's product and DeepSeek's three routing methods."""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from dsengine.kernels.backend import Backend, Operation
from dsengine.kernels.checks import FLOATS, check_device, check_dtype, check_shape
from dsengine.kernels.moe_route.ref import moe_route_ref, router_logits_ref
from dsengine.kernels.native_support import needs_compiler

RoutingMethod = Literal["greedy", "group_limited_greedy", "noaux_tc"]
ScoringFunction = Literal["softmax", "sigmoid"]


class RouterLogits(Protocol):
    def __call__(self, x: Tensor, weight: Tensor) -> Tensor: ...


class MoeRoute(Protocol):
    def __call__(
        self,
        logits: Tensor,
        *,
        method: str,
        scoring: str,
        top_k: int,
        n_group: int = 1,
        topk_group: int = 1,
        bias: Tensor | None = None,
        renormalize: bool = False,
        scaling: float = 1.0,
    ) -> tuple[Tensor, Tensor]: ...


def router_logits(x: Tensor, weight: Tensor, *, backend: RouterLogits = router_logits_ref) -> Tensor:
    """x · weightᵀ in float32: the bias of the selection separates experts by less than bfloat16 resolves.

    Args:
        x: float [T, h].
        weight: float32 [E, h].

    Returns:
        float32 [T, E]; or its parts, [P, T, E], to be added up in order. `moe_route` takes either.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check_shape("x", x, None, None)
    check_dtype("x", x, *FLOATS)
    check_shape("weight", weight, None, x.shape[1])
    check_dtype("weight", weight, torch.float32)
    check_device(x.device, weight=weight)
    if x.shape[0] == 0:
        return torch.zeros((0, weight.shape[0]), dtype=torch.float32, device=x.device)
    return backend(x, weight)


def moe_route(
    logits: Tensor,
    *,
    method: str,
    scoring: str,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    bias: Tensor | None = None,
    renormalize: bool = False,
    scaling: float = 1.0,
    backend: MoeRoute = moe_route_ref,
) -> tuple[Tensor, Tensor]:
    """Chooses `top_k` of E experts per token, by methods named as in `config.json`'s `topk_method`.

    - "greedy" (V2-Lite): the largest scores.
    - "group_limited_greedy" (V2): experts form `n_group` equal groups of neighbouring ids; a group's score is its
      largest score; the largest scores within the `topk_group` best groups are chosen.
    - "noaux_tc" (V3, R1, Kimi-K2, Moonlight): as before, but chosen by score + bias, and a group's score is the sum of
      its two largest biased scores; the weights are the scores without bias.

    With one group the groups play no part. Excluded experts count as -inf, never as 0: biased scores may be negative.
    Among equal values the lower id (of an expert or of a group) wins.

    Args:
        logits: float32 [T, E], the router's output; or [P, T, E], its parts, which are added up in order.
        method: "greedy", "group_limited_greedy" or "noaux_tc".
        scoring: "softmax" or "sigmoid", `config.json`'s `scoring_func`.
        top_k: experts per token.
        n_group: groups of experts; divides E.
        topk_group: groups a token may use.
        bias: float32 [E], e_score_correction_bias; only with "noaux_tc" (None: no bias).
        renormalize: `norm_topk_prob`; divides the weights by their sum + 1e-20. With "noaux_tc" the result is scaled
            as well; with the two V2 methods it replaces the scaling (as in DeepSeek's V2 code).
        scaling: `routed_scaling_factor`.

    Returns:
        (topk_weights float32 [T, top_k], topk_ids int64 [T, top_k]), the largest choice first.

    Raises:
        ValueError: an argument is out of range, or a shape, dtype or device does not fit.
    """
    if logits.dim() == 3:
        check_shape("logits", logits, None, None, None)
    else:
        check_shape("logits", logits, None, None)
    check_dtype("logits", logits, torch.float32)
    tokens, experts = logits.shape[-2:]
    if method not in get_args(RoutingMethod):
        raise ValueError(f"method is {method!r}; expected one of {', '.join(get_args(RoutingMethod))}")
    if scoring not in get_args(ScoringFunction):
        raise ValueError(f"scoring is {scoring!r}; expected one of {', '.join(get_args(ScoringFunction))}")
    _check_groups(experts, method, top_k, n_group, topk_group)
    if bias is not None:
        if method != "noaux_tc":
            raise ValueError(f"bias is given, but method {method!r} has none; only 'noaux_tc' does")
        check_shape("bias", bias, experts)
        check_dtype("bias", bias, torch.float32)
        check_device(logits.device, bias=bias)
    if tokens == 0:
        return logits.new_empty((0, top_k)), logits.new_empty((0, top_k), dtype=torch.int64)
    return backend(
        logits,
        method=method,
        scoring=scoring,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        bias=bias,
        renormalize=renormalize,
        scaling=scaling,
    )


def _check_groups(experts: int, method: str, top_k: int, n_group: int, topk_group: int) -> None:
    if n_group < 1 or experts % n_group:
        raise ValueError(f"n_group is {n_group}; it must divide the number of experts, {experts}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group is {topk_group}; it must lie in [1, n_group = {n_group}]")
    group_size = experts // n_group
    if method == "noaux_tc" and n_group > 1 and group_size < 2:
        raise ValueError(f"n_group is {n_group} for {experts} experts; 'noaux_tc' sums two scores of every group")
    reachable = experts if method == "greedy" else group_size * topk_group
    if not 1 <= top_k <= reachable:
        raise ValueError(f"top_k is {top_k}; a token can reach {reachable} of the {experts} experts")


ROUTER_LOGITS = Operation(
    "router_logits",
    router_logits,
    (
        Backend("triton", "dsengine.kernels.moe_route.triton_gemm:router_logits_triton", ("cuda",), ("triton",)),
        Backend("native", "dsengine.kernels.moe_route.native:router_logits_native", ("cpu",), probe=needs_compiler),
        Backend("ref", "dsengine.kernels.moe_route.ref:router_logits_ref"),
    ),
)
MOE_ROUTE = Operation(
    "moe_route",
    moe_route,
    (
        Backend("triton", "dsengine.kernels.moe_route.triton:moe_route_triton", ("cuda",), ("triton",)),
        Backend("native", "dsengine.kernels.moe_route.native:moe_route_native", ("cpu",), probe=needs_compiler),
        Backend("ref", "dsengine.kernels.moe_route.ref:moe_route_ref"),
    ),
)
