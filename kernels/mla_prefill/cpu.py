"""Expanded MLA attention on a CPU through torch's flash-attention kernel, the operator behind its public SDPA.

The operator itself is called because SDPA hides the log-sum-exp, refuses values narrower than keys (it then computes
all scores of a head at once, two to three times slower at 2048 tokens) and aligns its causal mask to the start of the
keys. tests/kernels/test_mla_prefill.py pins what is relied on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsengine.kernels.merge_attention.cpu import merge_attention_cpu


def mla_prefill_cpu(
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
    tokens, heads, width = q.shape
    value_width = v.shape[2]
    out = torch.zeros((tokens, heads, value_width), dtype=q.dtype)
    lse = torch.full((tokens, heads), -torch.inf, dtype=torch.float32)
    padded = F.pad(v, (0, width - value_width)) if value_width < width else v
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for request in range(len(starts_q) - 1):
        first, last = starts_q[request], starts_q[request + 1]
        keys = slice(starts_k[request], starts_k[request + 1])
        total = keys.stop - keys.start
        if causal and last - first > total:
            first = last - total  # earlier queries stand before the first key
        if first == last or total == 0:
            continue
        part, part_lse = _request(q[first:last], k[keys], padded[keys], softmax_scale, causal)
        out[first:last] = part[..., :value_width]
        lse[first:last] = part_lse
    return out, lse if need_lse else None


def _request(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of one request; with `causal` the keys before the last len(q) ones are seen by all queries."""
    earlier = k.shape[0] - q.shape[0]
    if not causal or q.shape[0] == 1:
        return _flash(q, k, v, softmax_scale, causal=False)
    recent = _flash(q, k[earlier:], v[earlier:], softmax_scale, causal=True)
    if earlier == 0:
        return recent
    return merge_attention_cpu(*_flash(q, k[:earlier], v[:earlier], softmax_scale, causal=False), *recent)


def _flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(out [n, H, D], lse float32 [n, H]) of q [n, H, D], k and v [m, H, D], n and m at least 1."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v)), 0.0, causal, scale=softmax_scale
    )
    return out.squeeze(0).transpose(0, 1), lse.view(q.shape[1], -1).T.float()
