"""Drafters: what proposes the token trees.

`NextNDrafter` uses the checkpoint's own NextN layer. Its cache is one more layer of the pool, with the same slots:
entry i is made of the main model's hidden state at position i and of token i + 1, and its output predicts token
i + 2. `extend` keeps it complete for all tokens the main model has computed, with the model's true hidden states; a
single layer's entries need no attention, so that this costs a few small products. `draft` computes the output at the
last entry and goes on with the layer's own output in place of the hidden state it cannot know, in slots after the
context that are nobody's and are overwritten later.

`NGramDrafter` needs no layer: it looks up what followed the latest tokens earlier in the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsengine.model.deepseek import DeepseekModel
from dsengine.model.forward_batch import ForwardBatch
from dsengine.specdec.drawn_tree import DrawnGrower, DrawSource
from dsengine.specdec.shape import TreeShape
from dsengine.specdec.tree import ChainGrower, Grower, TokenTree, TreeGrower


class Text(Protocol):
    """A request's tokens as a drafter reads them; the same object in every step."""

    @property
    def num_tokens(self) -> int: ...

    def token_ids(self, start: int, stop: int) -> list[int]: ...


@dataclass(frozen=True)
class DraftTargets:
    """B requests that want a tree each; their newest token, the root, is the only one without a cache entry.

    Attributes:
        texts: tokens known to the host, the root included; only for a drafter that reads them.
        roots: int64 [B], newest tokens.
        contexts: int64 [B], cached tokens of each, which is the root's position; 0: no request but padding.
        context_lens: the same on the host, or bounds of it.
        block_table: int32 [B, max_blocks], with room for `TreeShape.num_slots` entries after the context.
        rows: int64 [B], each request's row of the drafter's memory.
        draws: draw the nodes, where the drafter knows a distribution, rather than take the likeliest.
    """

    texts: Sequence[Text]
    roots: Tensor
    contexts: Tensor
    context_lens: tuple[int, ...]
    block_table: Tensor
    rows: Tensor
    draws: DrawSource | None = None


class Drafter(Protocol):
    def draft(self, targets: DraftTargets, shape: TreeShape) -> TokenTree:
        """A tree of `shape.num_nodes` nodes for each request."""
        ...


@dataclass(frozen=True)
class PassCounts:
    """Of one pass of the drafter, by attention group: its tokens, and how many of them have their logits computed."""

    tokens: tuple[int, ...]
    logits: tuple[int, ...]


Meet = Callable[[int, int], PassCounts | None]
"""Gives what every attention group has in the next pass, told this one's tokens and logits; None: there is one."""


class NextNDrafter:
    """Drafts with the NextN layer.

    Args:
        kv_cache: the layer's cache, [blocks, block_size, width].
        num_rows: requests that can be under way at once.
        num_valid_tokens: ids from here on are never proposed.
        meet: asks the other groups.

    Attributes:
        padding_row: of the drafter's memory, for what is no request; always zero.

    Raises:
        ValueError: the model has no NextN layer.
    """

    def __init__(
        self,
        model: DeepseekModel,
        kv_cache: Tensor,
        num_rows: int,
        num_valid_tokens: int,
        meet: Meet = lambda num_tokens, num_logits: None,
    ) -> None:
        if model.nextn is None:
            raise ValueError(
                "the checkpoint has no NextN layer to draft with (num_nextn_predict_layers is 0, or its tensors are "
                "missing); use the algorithm NGRAM, or none"
            )
        self._model = model
        self._nextn = model.nextn
        self._kv_cache = kv_cache
        self._num_valid_tokens = num_valid_tokens
        self._meet = meet
        # The main model's hidden state before each request's newest token: what the next drafts start from.
        self._hidden = torch.zeros((num_rows + 1, model.config.hidden_size), dtype=model.dtype, device=model.device)
        self.padding_row = num_rows

    def extend(
        self, hidden: Tensor, next_ids: Tensor, positions: Tensor, slots: Tensor, last: Tensor, rows: Tensor
    ) -> None:
        """Enter tokens that the main model has computed into the layer's cache.

        Args:
            hidden: [T, hidden_size], the main model's, after its final norm.
            next_ids: int64 [T], the token after each.
            positions, slots: int64 [T], theirs.
            last: int64 [R], for requests that can be drafted for next, the token just before their newest one.
            rows: int64 [R], their rows of the drafter's memory.
        """
        self._nextn.store(hidden, next_ids, positions, slots, self._kv_cache)
        self._hidden.index_copy_(0, rows, hidden[last])

    def draft(self, targets: DraftTargets, shape: TreeShape, meet: Meet | None = None) -> TokenTree:
        """Grow the trees a generation at a time; of those that are not drawn, keep the likeliest nodes.

        The host waits for nothing, so that it can be captured.

        Args:
            meet: what is known of the other groups without asking them.
        """
        passes = _Passes(targets, shape.num_drafter_nodes, self._kv_cache.shape[1], meet or self._meet)
        if targets.draws is not None:
            drawn = DrawnGrower(targets.roots, shape, targets.draws)
            self._grow(drawn, targets, shape, passes)
            return drawn.tree
        if shape.topk == 1:
            chain = ChainGrower(targets.roots)
            self._grow(chain, targets, shape, passes)
            return chain.tree
        grower = TreeGrower(targets.roots, shape.topk)
        self._grow(grower, targets, shape, passes)
        return grower.select(shape.num_nodes)

    def _grow(self, grower: Grower, targets: DraftTargets, shape: TreeShape, passes: _Passes) -> None:
        batch = passes.roots()
        hidden = self._run(self._hidden[targets.rows][:, None], targets.roots[:, None], batch)
        grower.expand(self._log_probs(hidden, batch))
        if shape.topk == 1:
            # All earlier nodes are seen, so that only the newest is run.
            for depth in range(1, shape.max_depth):
                newest = grower.tree.tokens[:, -1:]
                batch = passes.batch(depth - 1, torch.full_like(newest, depth), None, 1)
                hidden = self._run(hidden, newest, batch)
                grower.expand(self._log_probs(hidden, batch))
            return
        generation = _Generation.first(hidden)
        for _ in range(1, shape.steps):
            if not grower.frontier.shape[1]:
                break
            generation = generation.descend(grower)
            batch = passes.batch(0, generation.depths, generation.mask, generation.frontier.shape[1])
            generation = generation.with_outputs(self._run(generation.inputs, generation.tokens, batch))
            grower.expand(self._log_probs(generation.outputs, batch))

    def _run(self, hidden: Tensor, tokens: Tensor, batch: ForwardBatch) -> Tensor:
        """Pass nodes [B, E] through the layer, given the output [B, E, hidden_size] at their parents."""
        return self._nextn.forward(hidden.flatten(0, 1), tokens.flatten(), batch, self._kv_cache).view(hidden.shape)

    def wait_for_others(self) -> None:
        """Take part in the passes of attention groups that still draft, with no tokens."""
        while (counts := self._meet(0, 0)) is not None and any(counts.tokens):
            nothing = torch.empty(0, dtype=torch.int64, device=self._model.device)
            batch = ForwardBatch(
                input_ids=nothing,
                positions=nothing,
                slot_mapping=nothing,
                block_table=nothing.to(torch.int32).view(0, 1),
                cache_seqlens=nothing.to(torch.int32),
                cu_seqlens_q=torch.zeros(1, dtype=torch.int32, device=self._model.device),
                num_decodes=0,
                num_decode_tokens=0,
                query_lens=(),
                context_lens=(),
                logits_indices=nothing,
                rank_tokens=counts.tokens,
            )
            outputs = self._nextn.forward(self._hidden[:0], nothing, batch, self._kv_cache)
            self._model.compute_logits(outputs, counts.logits)

    def _log_probs(self, outputs: Tensor, batch: ForwardBatch) -> Tensor:
        """[B, F, hidden_size], the newest outputs of a pass → float32 [B, F, V]."""
        logits = self._model.compute_logits(outputs.flatten(0, 1), batch.rank_logits).view(*outputs.shape[:2], -1)
        logits[:, :, self._num_valid_tokens :] = -torch.inf
        return logits.log_softmax(-1)


@dataclass(frozen=True)
class _Generation:
    """Nodes that have passed, or will pass, through the NextN layer: E of them in all, the newest F last.

    Attributes:
        frontier: int64 [B, F], places of the newest in their tree.
        inputs: [B, E, hidden_size], output of the layer at each node's parent.
        tokens, depths: int64 [B, E].
        mask: bool [B, E, E], which of the nodes each one sees.
        outputs: [B, F, hidden_size], the layer's output at the newest.
    """

    frontier: Tensor
    inputs: Tensor
    tokens: Tensor
    depths: Tensor
    mask: Tensor
    outputs: Tensor

    @classmethod
    def first(cls, outputs: Tensor) -> _Generation:
        """The root, which has an entry of its own in the cache; its output [B, 1, hidden_size] is known."""
        batch, _, width = outputs.shape
        none = torch.zeros((batch, 0), dtype=torch.int64, device=outputs.device)
        return cls(
            frontier=torch.zeros((batch, 1), dtype=torch.int64, device=outputs.device),
            inputs=outputs.new_empty((batch, 0, width)),
            tokens=none,
            depths=none,
            mask=torch.zeros((batch, 0, 0), dtype=torch.bool, device=outputs.device),
            outputs=outputs,
        )

    def descend(self, grower: Grower) -> _Generation:
        """The grower's frontier, still without outputs."""
        tree, frontier = grower.tree, grower.frontier
        parents = tree.parents.gather(1, frontier)
        among = (parents[:, :, None] == self.frontier[:, None, :]).to(torch.int8).argmax(dim=2)
        inputs = self.outputs.gather(1, among[:, :, None].expand(-1, -1, self.outputs.shape[2]))
        before, count = self.tokens.shape[1], frontier.shape[1]
        mask = torch.zeros((len(frontier), before + count, before + count), dtype=torch.bool, device=frontier.device)
        mask[:, :before, :before] = self.mask
        if before:
            parent_rows = self.mask[:, -self.frontier.shape[1] :]
            mask[:, before:, :before] = parent_rows.gather(1, among[:, :, None].expand(-1, -1, before))
        mask[:, before:, before:] = torch.eye(count, dtype=torch.bool, device=frontier.device)
        return _Generation(
            frontier=frontier,
            inputs=torch.cat((self.inputs, inputs), dim=1),
            tokens=torch.cat((self.tokens, tree.tokens.gather(1, frontier)), dim=1),
            depths=torch.cat((self.depths, tree.depths.gather(1, frontier)), dim=1),
            mask=mask,
            outputs=inputs[:, :0],
        )

    def with_outputs(self, outputs: Tensor) -> _Generation:
        """With the layer's outputs at the last nodes, at least the newest generation's."""
        newest = outputs[:, -self.frontier.shape[1] :]
        return _Generation(self.frontier, self.inputs, self.tokens, self.depths, self.mask, newest)


class _Passes:
    """The NextN layer's batches, in the cache slots after each target's context. Padding stores and sees nothing.

    Args:
        count: slots of each.
    """

    def __init__(self, targets: DraftTargets, count: int, block_size: int, meet: Meet) -> None:
        self._targets = targets
        self._meet = meet
        self._context = targets.contexts[:, None]
        self._is_padding = self._context == 0
        positions = self._context + torch.arange(count, device=self._context.device)
        slots = targets.block_table.long().gather(1, positions // block_size) * block_size + positions % block_size
        self._slots = slots.masked_fill(self._is_padding, -1)

    def roots(self) -> ForwardBatch:
        """The roots, which stand at the layer's last entries and are not stored again."""
        return self._batch(-1, torch.full_like(self._context, -1), (self._context - 1).clamp(min=0), None, 1)

    def batch(self, first: int, depths: Tensor, mask: Tensor | None, newest: int) -> ForwardBatch:
        """Nodes of these depths [B, E], in the slots from `first` on; all of them see the nodes in the slots before.
        The logits of the `newest` of each request are computed."""
        # A root has depth 0.
        slots = self._slots[:, first : first + depths.shape[1]]
        return self._batch(first, slots, self._context + depths - 1, mask, newest)

    def _batch(self, first: int, slots: Tensor, positions: Tensor, mask: Tensor | None, newest: int) -> ForwardBatch:
        """Tokens [B, E] whose first one's entry is number `first` after the context."""
        targets = self._targets
        batch, count = slots.shape
        counts = self._meet(batch * count, batch * newest)
        slots = slots.flatten()
        seqlens = (self._context + (first + count)).masked_fill(self._is_padding, 0)
        return ForwardBatch(
            input_ids=slots,
            positions=positions.flatten(),
            slot_mapping=slots,
            block_table=targets.block_table,
            cache_seqlens=seqlens[:, 0].to(torch.int32),
            cu_seqlens_q=torch.arange(0, batch * count + 1, count, dtype=torch.int32, device=slots.device),
            num_decodes=batch,
            num_decode_tokens=batch * count,
            query_lens=(count,) * batch,
            context_lens=tuple(length + first for length in targets.context_lens),
            logits_indices=slots,
            tree_mask=None if mask is None else mask.masked_fill(self._is_padding[:, :, None], False).flatten(0, 1),
            rank_tokens=None if counts is None else counts.tokens,
            rank_logits=None if counts is None else counts.logits,
        )
