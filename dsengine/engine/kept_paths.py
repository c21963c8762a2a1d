"""What becomes of a tree once it is known which of its nodes are kept: in the main model's cache and in the drafter's.

The nodes of a tree lie in the slots after its context in the order of their numbers; tokens that are kept belong there
in the order of their positions. Only tensor operations of fixed shapes, so that they can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsengine.memory.kv_cache import KVCachePool


@dataclass(frozen=True)
class NewEntries:
    """Tokens whose successors are known, as `NextNDrafter.extend` takes them."""

    hidden: Tensor
    next_ids: Tensor
    positions: Tensor
    slots: Tensor
    last: Tensor


def move_kept(pool: KVCachePool, num_layers: int, nodes: Tensor, slots: Tensor) -> None:
    """Move what accepted nodes left in the first `num_layers` layers to the places of their tokens.

    Args:
        nodes: int64 [B, W], accepted nodes from the root down, -1 after the last one.
        slots: int64 [B, N], of all nodes; those of two requests are distinct, or all the same with the same nodes.
    """
    width = nodes.shape[1]
    places = torch.arange(width, device=nodes.device).expand_as(nodes)
    # Behind the end of a path everything stays where it is.
    kept = torch.where(nodes < 0, places, nodes)
    pool.move(slots.gather(1, kept[:, 1:]).flatten(), slots[:, 1:width].flatten(), num_layers)


def new_entries(
    nodes: Tensor, lengths: Tensor, tokens: Tensor, hidden: Tensor, positions: Tensor, slots: Tensor
) -> NewEntries:
    """W entries of each tree. Behind the end of a path nobody reads them before they are written again.

    Args:
        nodes: int64 [B, W], accepted nodes from the root down, -1 after the last one.
        lengths: int64 [B], how many they are.
        tokens: int64 [B, W], what follows each, -1 after the last one.
        hidden: [B · N, hidden_size], of all nodes.
        positions: int64 [B · N]; only the roots' are read.
        slots: int64 [B · N].
    """
    count, width = nodes.shape
    by_node = hidden.view(count, -1, hidden.shape[1])
    kept = by_node.gather(1, nodes.clamp(min=0)[:, :, None].expand(-1, -1, hidden.shape[1]))
    roots = positions.view(count, -1)[:, :1]
    return NewEntries(
        hidden=kept.flatten(0, 1),
        next_ids=tokens.clamp(min=0).flatten(),
        positions=(roots + torch.arange(width, device=nodes.device)).flatten(),
        slots=slots.view(count, -1)[:, :width].flatten(),
        last=torch.arange(0, count * width, width, device=nodes.device) + lengths - 1,
    )
