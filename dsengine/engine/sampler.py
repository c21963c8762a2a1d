"""From logits to tokens: what each request asked for, applied to its row.

Only rows whose request asks for a processor pay for it; a batch of greedy requests is one argmax.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dsengine.engine.messages import TokenLogprob
from dsengine.engine.request import Request
from dsengine.kernels.registry import Kernels


@dataclass(frozen=True)
class SampledToken:
    """A drawn token; `token_id` is None where the logits were not finite numbers."""

    token_id: int | None
    logprob: TokenLogprob | None


class _TokenHistory:
    """Which tokens a request has seen, kept up to date as its output grows; only requests with penalties have one."""

    def __init__(self, request: Request) -> None:
        self.prompt_ids = set(request.prompt_token_ids)
        self.output_counts: Counter[int] = Counter()
        self._num_counted = 0

    def update(self, request: Request) -> None:
        new = request.output_token_ids[self._num_counted :]
        self.output_counts.update(new)
        self._num_counted += len(new)


class Sampler:
    """Applies logit processors and draws one token per row.

    Args:
        num_valid_tokens: ids from here on are unknown to the tokenizer (DeepSeek pads its embedding) and never drawn.
    """

    def __init__(self, kernels: Kernels, num_valid_tokens: int) -> None:
        self._kernels = kernels
        self._num_valid_tokens = num_valid_tokens
        self._histories: WeakKeyDictionary[Request, _TokenHistory] = WeakKeyDictionary()

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """Draw one token for each request.

        Args:
            logits: float32 [B, vocab_size]; changed in place.
        """
        self._process_logits(logits, requests)
        params = [r.params for r in requests]

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=logits.device)

        drawn = self._kernels.sample(
            logits,
            temperature=column([p.temperature for p in params], torch.float32),
            top_k=column([max(p.top_k, 0) for p in params], torch.int64),
            top_p=column([p.top_p for p in params], torch.float32),
            min_p=column([p.min_p for p in params], torch.float32),
            seeds=column([r.seed for r in requests], torch.int64),
            positions=column([len(r.output_token_ids) for r in requests], torch.int64),
        )
        token_ids: list[int | None] = [t if t >= 0 else None for t in drawn.tolist()]
        wanted = [
            (row, t, p.logprobs) for row, (t, p) in enumerate(zip(token_ids, params, strict=True)) if t is not None
        ]
        logprobs = self._logprobs_of_rows(logits, [(row, t, n) for row, t, n in wanted if n is not None])
        return [SampledToken(t, logprobs.get(row)) for row, t in enumerate(token_ids)]

    def prompt_logprobs(self, logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
        """Log-probabilities of given tokens, one per row of `logits` (float32 [N, vocab_size], changed in place)."""
        self._forbid_unknown_tokens(logits)
        by_row = self._logprobs_of_rows(logits, [(row, token, num_top) for row, token in enumerate(token_ids)])
        return [by_row[row] for row in range(len(token_ids))]

    def _process_logits(self, logits: Tensor, requests: Sequence[Request]) -> None:
        self._forbid_unknown_tokens(logits)
        for row, request in enumerate(requests):
            params = request.params
            if params.has_penalties:
                self._apply_penalties(logits[row], request)
            if params.logit_bias:
                ids = torch.tensor(list(params.logit_bias), device=logits.device)
                bias = torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
                logits[row].index_add_(0, ids, bias)
            if len(request.output_token_ids) < params.min_tokens:
                banned = [t for t in (*request.eos_token_ids, *params.stop_token_ids) if t < logits.shape[1]]
                logits[row, banned] = -torch.inf

    def _forbid_unknown_tokens(self, logits: Tensor) -> None:
        logits[:, self._num_valid_tokens :] = -torch.inf

    def _apply_penalties(self, row: Tensor, request: Request) -> None:
        history = self._histories.get(request)
        if history is None:
            history = self._histories[request] = _TokenHistory(request)
        history.update(request)
        params = request.params
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(history.prompt_ids | history.output_counts.keys()), device=row.device)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        if history.output_counts:
            ids = torch.tensor(list(history.output_counts), device=row.device)
            counts = torch.tensor(list(history.output_counts.values()), dtype=row.dtype, device=row.device)
            row[ids] -= params.presence_penalty + params.frequency_penalty * counts

    @staticmethod
    def _logprobs_of_rows(logits: Tensor, wanted: Sequence[tuple[int, int, int]]) -> dict[int, TokenLogprob]:
        """`wanted` holds (row, token id, number of alternatives)."""
        if not wanted:
            return {}
        rows = torch.tensor([row for row, _, _ in wanted], device=logits.device)
        tokens = torch.tensor([token for _, token, _ in wanted], device=logits.device)
        logprobs = torch.log_softmax(logits[rows], dim=-1)
        chosen = logprobs.gather(1, tokens[:, None])
        ranks = (logprobs > chosen).sum(dim=1) + 1
        num_top = max(n for _, _, n in wanted)
        # A stable order on ties keeps "top" a function of the request alone.
        top_values, top_ids = torch.sort(logprobs, dim=1, descending=True, stable=True) if num_top else (None, None)
        top: list[list[tuple[int, float]]] = [[] for _ in wanted]
        if top_values is not None and top_ids is not None:
            ids, values = top_ids[:, :num_top].tolist(), top_values[:, :num_top].tolist()
            top = [list(zip(i, v, strict=True)) for i, v in zip(ids, values, strict=True)]
        result = {}
        for i, (value, rank) in enumerate(zip(chosen[:, 0].tolist(), ranks.tolist(), strict=True)):
            row, token, n = wanted[i]
            result[row] = TokenLogprob(token, value, rank, tuple(top[i][:n]))
        return result
