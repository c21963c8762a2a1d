"""The router's product and its choice for a few tokens, in C: on a CPU the twenty small operations cost the time."""

from __future__ import annotations

import torch
from torch import Tensor

from dsengine.kernels.linear.native import linear_native
from dsengine.kernels.moe_route.ref import moe_route_ref
from dsengine.kernels.native_support import Integer, Pointer, Real, c_function

MAX_TOKENS = 256  # with more, torch's threads make up for its calls
METHODS = ("greedy", "group_limited_greedy", "noaux_tc")  # numbered as in native.c

_moe_route = c_function("moe_route", *[Pointer] * 5, *[Integer] * 8, Real)


def router_logits_native(x: Tensor, weight: Tensor) -> Tensor:
    return linear_native(x.float(), weight)


def moe_route_native(
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
) -> tuple[Tensor, Tensor]:
    if logits.dim() == 3 or logits.shape[0] > MAX_TOKENS:
        return moe_route_ref(
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
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weights, ids = torch.empty((tokens, top_k)), torch.empty((tokens, top_k), dtype=torch.int64)
    scratch = torch.empty(4 * experts)
    _moe_route(
        logits.data_ptr(),
        None if bias is None else bias.data_ptr(),
        weights.data_ptr(),
        ids.data_ptr(),
        scratch.data_ptr(),
        tokens,
        experts,
        METHODS.index(method),
        scoring == "softmax",
        top_k,
        n_group,
        topk_group,
        renormalize,
        scaling,
    )
    return weights, ids
