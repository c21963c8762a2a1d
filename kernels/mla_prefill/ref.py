"""Executable specification of expanded MLA attention, one request after another."""

from __future__ import annotations

import torch
from torch import Tensor


def mla_prefill_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    *,
    causal: bool,
    need_lse: bool = True,
    seqlens_q: tuple[int, ...] | None = None,
    seqlens_k: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor | None]:
    tokens, heads, _ = q.shape
    out = torch.zeros((tokens, heads, v.shape[2]), dtype=torch.float32, device=q.device)
    lse = torch.full((tokens, heads), -torch.inf, dtype=torch.float32, device=q.device)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for request in range(len(starts_q) - 1):
        queries = slice(starts_q[request], starts_q[request + 1])
        keys = slice(starts_k[request], starts_k[request + 1])
        scores = torch.einsum("qhd,khd->qhk", q[queries].float(), k[keys].float()) * softmax_scale
        if causal:
            new, total = scores.shape[0], scores.shape[2]
            visible = torch.ones((new, total), dtype=torch.bool, device=q.device).tril(diagonal=total - new)
            scores = scores.masked_fill(~visible[:, None, :], -torch.inf)
        weights, lse[queries] = softmax_with_lse(scores)
        out[queries] = torch.einsum("qhk,khd->qhd", weights, v[keys].float())
    return out.to(q.dtype), lse if need_lse else None


def softmax_with_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its log-sum-exp; a row without any finite score gives zeros and -inf."""
    lse = torch.logsumexp(scores, dim=-1)
    finite_lse = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.exp(scores - finite_lse.unsqueeze(-1)), lse
