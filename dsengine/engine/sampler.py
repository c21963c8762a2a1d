"""From logits to tokens: what each request asked for, applied to its row.

Only rows whose request asks for a processor pay for it; a batch of greedy requests is one argmax.

Drawing is split in two, so that the device need not be waited for: `draw` queues the work and leaves the tokens on the
device, where the next step finds them; `DrawnTokens.fetch` brings them to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsengine.engine.grammar import forbid
from dsengine.engine.logit_edits import LogitEditor, asks_for_edits
from dsengine.engine.messages import TokenLogprob
from dsengine.engine.request import Request
from dsengine.kernels.registry import Kernels
from dsengine.kernels.sample.ref import kept_weights
from dsengine.model.transfer import HostCopy, upload
from dsengine.specdec.drawn_tree import DrawSource
from dsengine.specdec.shape import TreeShape
from dsengine.specdec.tree import TokenTree
from dsengine.specdec.verification import AcceptedPaths, reject

# Rows whose whole vocabulary is sorted at a time, which bounds the memory for it: 0.2 GB at 129,280 tokens.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class SampledToken:
    """A drawn token; `token_id` is None where the logits were not finite numbers."""

    token_id: int | None
    logprob: TokenLogprob | None


class TokenScores:
    """Log-probabilities of one token per row, with the likeliest alternatives, on their way from the device.

    Args:
        logits: float32 [N, vocab_size], processed.
        token_ids: int64 [N], on the device.
        num_top: alternatives wanted in each row, on the host.
    """

    def __init__(self, logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> None:
        self._num_top = num_top
        widest = max(num_top, default=0)
        self._pieces = [
            HostCopy(ids, *_score(rows, ids, widest))
            for rows, ids in zip(logits.split(_ROWS_AT_ONCE), token_ids.split(_ROWS_AT_ONCE), strict=True)
            if rows.shape[0]
        ]

    def fetch(self) -> list[TokenLogprob]:
        """One entry per row; waits for the device."""
        scores: list[TokenLogprob] = []
        for piece in self._pieces:
            for token, value, rank, ids, values in zip(*(t.tolist() for t in piece.wait()), strict=True):
                top = list(zip(ids, values, strict=True))[: self._num_top[len(scores)]]
                scores.append(TokenLogprob(token, value, rank, tuple(top)))
        return scores


def _score(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probability [N], rank [N], ids [N, num_top] and log-probabilities [N, num_top] of the likeliest)."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(dim=1) + 1
    if num_top == 0:
        return chosen[:, 0], ranks, token_ids.new_empty(len(ranks), 0), chosen[:, :0]
    # A stable order on ties keeps "top" a function of the request alone.
    values, ids = torch.sort(logprobs, dim=1, descending=True, stable=True)
    return chosen[:, 0], ranks, ids[:, :num_top], values[:, :num_top]


class DrawnTokens:
    """One step's new tokens, on their way from the device.

    Attributes:
        token_ids: int64 [B], on the device; -1 where the logits were not finite numbers.
    """

    def __init__(self, token_ids: Tensor, scores: TokenScores | None, scored_rows: Sequence[int]) -> None:
        self.token_ids = token_ids
        self._copy = HostCopy(token_ids)
        self._scores = scores
        self._scored_rows = scored_rows

    def fetch(self) -> list[SampledToken]:
        """One entry per row; waits for the device."""
        [copy] = self._copy.wait()
        scores = self._scores.fetch() if self._scores is not None else []
        by_row = dict(zip(self._scored_rows, scores, strict=True))
        return [
            SampledToken(token, by_row.get(row)) if token >= 0 else SampledToken(None, None)
            for row, token in enumerate(copy.tolist())
        ]


class Sampler:
    """Applies logit processors and draws one token per row.

    Args:
        num_valid_tokens: ids from here on are unknown to the tokenizer (DeepSeek pads its embedding) and never drawn.
        agree: gives all ranks that share requests the same tokens, int64, which may be changed in place.
    """

    def __init__(
        self, kernels: Kernels, num_valid_tokens: int, agree: Callable[[Tensor], Tensor] = lambda tokens: tokens
    ) -> None:
        self._kernels = kernels
        self._agree = agree
        self._num_valid_tokens = num_valid_tokens
        self._editor = LogitEditor()
        self._wishes: dict[int, _Wishes] = {}

    @property
    def num_valid_tokens(self) -> int:
        """Ids from here on are never drawn."""
        return self._num_valid_tokens

    def draw(self, logits: Tensor, requests: Sequence[Request], num_output_tokens: Sequence[int]) -> DrawnTokens:
        """Draw one token for each request, without waiting for the device.

        Args:
            logits: float32 [B, vocab_size]; changed in place.
            num_output_tokens: output tokens each request has already, those included that the host does not know yet.
                It must know all of a request that has penalties or a grammar.
        """
        edits = self._editor.edits(requests, num_output_tokens, logits.device)
        self._kernels.process_logits(logits, self._num_valid_tokens, edits)
        forbid(logits, requests)
        positions = upload(np.array(num_output_tokens, dtype=np.int64), logits.device)
        token_ids = self._choose(logits, requests, 1, positions)
        params = [r.params for r in requests]
        scored = [row for row, p in enumerate(params) if p.logprobs is not None]
        scores = None
        if scored:
            rows = upload(np.array(scored, dtype=np.int64), logits.device)
            # A row without a token is scored for nothing: only the host can tell it from the others.
            scores = TokenScores(logits[rows], token_ids[rows].clamp(min=0), [params[r].logprobs or 0 for r in scored])
        return DrawnTokens(token_ids, scores, scored)

    def draw_trees(
        self, logits: Tensor, requests: Sequence[Request], num_output_tokens: Sequence[int], tree: TokenTree
    ) -> Tensor:
        """The token that each request would get after each node of its tree, were it the end of the text.

        Args:
            logits: float32 [B · N, vocab_size], as `process_trees` leaves them.
            num_output_tokens: output tokens each request has already, the root included.

        Returns:
            int64 [B, N], -1 where the logits were not finite numbers.
        """
        first = upload(np.array(num_output_tokens, dtype=np.int64), logits.device)
        positions = (first[:, None] + tree.depths).flatten()
        return self._choose(logits, requests, tree.num_nodes, positions).view(len(requests), tree.num_nodes)

    def reject_drafts(
        self, logits: Tensor, requests: Sequence[Request], source: DrawSource, tree: TokenTree, shape: TreeShape
    ) -> AcceptedPaths:
        """Which of the drafts that were drawn are accepted by rejection.

        Args:
            logits: float32 [B · N, vocab_size], as `process_trees` leaves them.
            source: what the drafts were drawn by.
            shape: of the trees.
        """
        assert tree.drawn is not None
        by_node = logits.view(len(requests), tree.num_nodes, -1)
        rows = torch.arange(len(requests), device=logits.device)
        filters = self._wishes_of(requests, 1, logits.device).filters
        # Without filters nothing need be sorted.
        has_filters = any(r.params.top_k > 0 or r.params.top_p < 1 or r.params.min_p > 0 for r in requests)

        def target(nodes: Tensor) -> Tensor:
            at = by_node[rows, nodes]
            highest = at.amax(dim=1, keepdim=True)
            if has_filters:
                weights = kept_weights(at, **filters)
                probs = weights / weights.sum(dim=1, keepdim=True)
            else:
                probs = ((at - highest).double() / filters["temperature"].clamp(min=1e-38)[:, None]).softmax(dim=1)
            return torch.where(highest.isfinite(), probs, 0.0)

        uniforms = source.tries(shape.max_depth, shape.topk)
        paths = reject(tree, tree.drawn, target, uniforms, shape.max_depth, shape.topk)
        agreed = self._agree(torch.cat((paths.nodes, paths.bonus[:, None]), dim=1))
        return AcceptedPaths(agreed[:, :-1], (agreed[:, :-1] >= 0).sum(dim=1), agreed[:, -1])

    def process_trees(
        self, logits: Tensor, requests: Sequence[Request], num_output_tokens: Sequence[int], tree: TokenTree
    ) -> None:
        """Apply what the requests ask for to the logits of all nodes, each as if it were the end of the text.

        Waits for the device only where a request's penalties, `min_tokens` or grammar must know the drafts.

        Args:
            logits: float32 [B · N, vocab_size]; changed in place.
            num_output_tokens: output tokens each request has already, the root included.
        """
        nodes = tree.num_nodes
        pairs = list(zip(requests, num_output_tokens, strict=True))
        edits, drafts = None, None
        if any(_follows_drafts(request, count) for request, count in pairs):
            drafts = tree.paths()
        if any(asks_for_edits(request, count) for request, count in pairs):
            rows = [request for request in requests for _ in range(nodes)]
            counts = [count for count in num_output_tokens for _ in range(nodes)]
            drafted = None if drafts is None else [path for paths in drafts for path in paths]
            edits = self._editor.edits(rows, counts, logits.device, drafted)
        self._kernels.process_logits(logits, self._num_valid_tokens, edits)
        if drafts is not None:
            forbid(logits, requests, drafts)

    def _choose(self, logits: Tensor, requests: Sequence[Request], rows_each: int, positions: Tensor) -> Tensor:
        """One token per row, int64; each request has `rows_each` rows in turn."""
        wishes = self._wishes_of(requests, rows_each, logits.device)
        return self._agree(self._kernels.sample(logits, **wishes.filters, seeds=wishes.seeds, positions=positions))

    def _wishes_of(self, requests: Sequence[Request], rows_each: int, device: torch.device) -> _Wishes:
        """From one step to the next they are mostly the same, so that nothing need be uploaded."""
        asked = [(r.params.temperature, r.params.top_k, r.params.top_p, r.params.min_p, r.seed) for r in requests]
        known = self._wishes.get(rows_each)
        if known is None or known.asked != asked or known.seeds.device != device:
            known = self._wishes[rows_each] = _Wishes.upload(asked, rows_each, device)
        return known

    def score(self, logits: Tensor, token_ids: Tensor, num_top: int) -> TokenScores:
        """Log-probabilities of given tokens, without waiting for the device.

        Args:
            logits: float32 [N, vocab_size]; changed in place.
            token_ids: int64 [N], on the same device.
            num_top: alternatives reported for each.
        """
        self._kernels.process_logits(logits, self._num_valid_tokens, None)
        return TokenScores(logits, token_ids, [num_top] * len(token_ids))


def _follows_drafts(request: Request, num_output_tokens: int) -> bool:
    """Whether what is to be changed in the logits behind a draft depends on it."""
    params = request.params
    return params.has_penalties or num_output_tokens < params.min_tokens or request.grammar is not None


@dataclass(frozen=True)
class _Wishes:
    """What the requests of a step ask of their draws, on the device; every request has as many rows, in turn.

    Attributes:
        asked: temperature, top_k, top_p, min_p and seed of each request.
        filters: the first four, a column each.
    """

    asked: list[tuple[float, int, float, float, int]]
    filters: dict[str, Tensor]
    seeds: Tensor

    @classmethod
    def upload(cls, asked: list[tuple[float, int, float, float, int]], rows_each: int, device: torch.device) -> _Wishes:
        def column(values: Sequence[float], dtype: type[np.generic]) -> Tensor:
            return upload(np.repeat(np.array(values, dtype=dtype), rows_each), device)

        temperature, top_k, top_p, min_p, seeds = zip(*asked, strict=True)
        filters = {
            "temperature": column(temperature, np.float32),
            "top_k": column([max(k, 0) for k in top_k], np.int64),
            "top_p": column(top_p, np.float32),
            "min_p": column(min_p, np.float32),
        }
        return cls(asked, filters, column(seeds, np.int64))
