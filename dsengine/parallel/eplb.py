"""Where routed experts should lie: copies for the busiest, and ranks that have about the same to do.

Pure functions of measured loads, the same on every rank. The method is DeepSeek's EPLB: groups of experts are packed
onto nodes (their routing sends a token to few groups, and so to few nodes), the busiest experts of a node get the spare
places, and what each place then has to do is packed onto the node's ranks; always the largest first, to where least
is. Swaps afterwards even out what the greedy order left.

A placement is a list: the expert in each place, places counted over all ranks. Every rank has equally many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace


def place_experts(loads: Sequence[float], *, ranks: int, places: int, nodes: int = 1, groups: int = 1) -> list[int]:
    """A placement that evens out the ranks.

    Args:
        loads: of each expert: how many tokens went to it.
        ranks: over which experts lie.
        places: in all, at least as many as experts, a multiple of `ranks`; at most `ranks` per expert.
        nodes: machines with equally many ranks each.
        groups: of neighbouring experts that routing treats as one (`n_group`); kept together on a node if `nodes`
            divides them, else they play no part.

    Returns:
        [places]; every expert occurs, none twice on a rank.

    Raises:
        ValueError: the numbers do not fit.
    """
    experts = len(loads)
    if not experts <= places <= experts * ranks or places % ranks:
        raise ValueError(
            f"places is {places}; it must be a multiple of the {ranks} ranks and from {experts} (experts) to "
            f"{experts * ranks} (a copy on every rank)"
        )
    if ranks % nodes:
        raise ValueError(f"nodes is {nodes}; it must divide the number of ranks, {ranks}")
    by_node = _experts_by_node(loads, nodes, groups)
    room, per_node = places // len(by_node), ranks // len(by_node)
    if not len(by_node[0]) <= room <= len(by_node[0]) * per_node:
        by_node, room, per_node = [list(range(experts))], places, ranks
    found: list[int] = []
    for mine in by_node:
        copies = _copies([loads[e] for e in mine], room, per_node)
        parts = [(loads[e] / count, e) for e, count in zip(mine, copies, strict=True) for _ in range(count)]
        for rank in _pack(parts, per_node):
            found.extend(rank)
    return found


def rank_loads(loads: Sequence[float], placement: Sequence[int], ranks: int) -> list[float]:
    """What each rank has to do when the copies of an expert share its load evenly."""
    copies = [0] * len(loads)
    for expert in placement:
        copies[expert] += 1
    per_rank = len(placement) // ranks
    return [
        sum(loads[e] / copies[e] for e in placement[rank * per_rank : (rank + 1) * per_rank]) for rank in range(ranks)
    ]


def imbalance(loads: Sequence[float], placement: Sequence[int], ranks: int) -> float:
    """The largest load of a rank over the mean: 1 is even."""
    each = rank_loads(loads, placement, ranks)
    return max(each) * ranks / sum(each) if any(each) else 1.0


def _experts_by_node(loads: Sequence[float], nodes: int, groups: int) -> list[list[int]]:
    experts = len(loads)
    if nodes == 1 or groups % nodes or experts % groups:
        return [list(range(experts))]
    size = experts // groups
    parts = [(sum(loads[g * size : (g + 1) * size]), g) for g in range(groups)]
    return [[g * size + i for g in sorted(node) for i in range(size)] for node in _pack(parts, nodes)]


def _copies(loads: Sequence[float], places: int, ranks: int) -> list[int]:
    """How many places each expert gets: one each, then always one more to where a copy has most to do."""
    copies = [1] * len(loads)
    busiest = [(-load, e) for e, load in enumerate(loads)]
    heapify(busiest)
    for _ in range(places - len(loads)):
        _, e = busiest[0]
        copies[e] += 1
        if copies[e] == ranks:
            heappop(busiest)
        else:
            heapreplace(busiest, (-loads[e] / copies[e], e))
    return copies


def _pack(parts: Sequence[tuple[float, int]], bins: int) -> list[list[int]]:
    """Deal (load, name) into bins of equally many, no name twice in one, so that their sums are about even."""
    room = len(parts) // bins
    found: list[list[tuple[float, int]]] = [[] for _ in range(bins)]
    least = [(0.0, b) for b in range(bins)]
    for part in sorted(parts, key=lambda part: (-part[0], part[1])):
        passed = []
        while least and any(part[1] == name for _, name in found[least[0][1]]):
            passed.append(heappop(least))
        if least:
            total, b = heappop(least)
            found[b].append(part)
            if len(found[b]) < room:
                heappush(least, (total + part[0], b))
        else:
            _make_room(part, found, [b for _, b in passed], room)
            passed = [(sum(load for load, _ in found[b]), b) for _, b in passed if len(found[b]) < room]
        for entry in passed:
            heappush(least, entry)
    _even_out(found)
    return [[name for _, name in one] for one in found]


def _make_room(
    part: tuple[float, int], found: list[list[tuple[float, int]]], open_bins: Sequence[int], room: int
) -> None:
    """Only bins that hold the name already have room left: another part moves there."""
    target = open_bins[0]
    names = {name for _, name in found[target]}
    for other in found:
        if len(other) == room and all(name != part[1] for _, name in other):
            for i, (_, name) in enumerate(other):
                if name not in names:
                    found[target].append(other[i])
                    other[i] = part
                    return
    raise AssertionError("no expert has more copies than there are bins, so one can always move")


def _even_out(bins: list[list[tuple[float, int]]], rounds: int = 64) -> None:
    """Swap parts of the fullest bin for smaller ones elsewhere while that lowers the larger of the two sums."""
    sums = [sum(load for load, _ in one) for one in bins]
    for _ in range(rounds):
        fullest = max(range(len(bins)), key=lambda b: sums[b])
        best = max(
            (swap for b in range(len(bins)) if b != fullest for swap in _swaps(bins, sums, fullest, b)),
            default=None,
        )
        if best is None or best[0] <= 1e-9 * sums[fullest]:
            return
        _, b, i, j = best
        difference = bins[fullest][i][0] - bins[b][j][0]
        bins[fullest][i], bins[b][j] = bins[b][j], bins[fullest][i]
        sums[fullest] -= difference
        sums[b] += difference


def _swaps(
    bins: list[list[tuple[float, int]]], sums: list[float], full: int, other: int
) -> list[tuple[float, int, int, int]]:
    """(by how much the larger sum falls, the other bin, the part of either) of the swaps that may be."""
    gap, found = sums[full] - sums[other], []
    names, other_names = {name for _, name in bins[full]}, {name for _, name in bins[other]}
    for i, (large, name) in enumerate(bins[full]):
        for j, (small, other_name) in enumerate(bins[other]):
            if 0 < large - small < gap and name not in other_names and other_name not in names:
                found.append((min(large - small, gap - (large - small)), other, i, j))
    return found


@dataclass(frozen=True)
class Move:
    """The expert in one place goes to another."""

    source: int
    target: int


def keep_places(old: Sequence[int], new: Sequence[int], ranks: int) -> list[int]:
    """`new` with each rank's experts reordered so that those it has already stay where they are."""
    per_rank = len(new) // ranks
    kept: list[int] = []
    for rank in range(ranks):
        here = slice(rank * per_rank, (rank + 1) * per_rank)
        arriving = [e for e in new[here] if e not in old[here]]
        kept.extend(e if e in new[here] else arriving.pop() for e in old[here])
    return kept


def plan_moves(old: Sequence[int], new: Sequence[int], ranks: int, nodes: int = 1) -> list[Move]:
    """What has to move: each expert from a place on the same rank if it has one, else on the same node, else anywhere;
    sources that are equally near take turns."""
    per_rank = len(old) // ranks
    per_node = len(old) // nodes
    given = [0] * len(old)
    moves = []
    for target, expert in enumerate(new):
        if old[target] == expert:
            continue
        sources = [place for place, e in enumerate(old) if e == expert]
        source = min(
            sources,
            key=lambda p: (p // per_rank != target // per_rank, p // per_node != target // per_node, given[p]),
        )
        given[source] += 1
        moves.append(Move(source, target))
    return moves
