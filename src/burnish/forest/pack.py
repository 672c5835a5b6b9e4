"""An optimiser batch of trees, cut into micro-batches by a token budget.

Trees are never split, so a micro-batch holds whole pairs and groups. Weights, groups and captured columns belong to the
*batch* and are indexed by its entries and units: a micro-batch says which of them are its own (`items`, `units`), and
how the batch was cut cannot change a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from burnish.core.errors import ConfigError, DataError
from burnish.forest.stream import LossView, Stream, Tree


@dataclass(frozen=True, eq=False)
class Micro:
    """One forward and backward: a stream, its loss view, and where its entries and units stand in the batch.

    items [M]  the batch's entry for each entry of `view`, ascending
    units [U]  the batch's unit for each unit of this micro-batch, ascending (one without labels is listed too)
    share      its part of the batch's tokens, each counted once for every sequence it is in; the shares add up to 1
    """

    stream: Stream
    view: LossView
    items: Tensor
    units: Tensor
    share: float = 1.0


class Batch:
    """One optimiser batch. Entries are ordered by tree, unit, label; units are numbered over the trees in order.

    `group[u]` names the pair or group of unit u; by default every unit is its own. Raises DataError where there are no
    trees, or where `group` has another length than there are units.
    """

    def __init__(self, trees: Sequence[Tree], group: Sequence[int] | None = None) -> None:
        if not trees:
            raise DataError("a batch needs at least one tree", where="Batch")
        self.trees = tuple(trees)
        labels = [len(unit.labels) for tree in self.trees for unit in tree.units]
        if group is not None and len(group) != len(labels):
            raise DataError(f"{len(group)} group ids for {len(labels)} units", where="Batch")
        self.group = torch.arange(len(labels)) if group is None else torch.tensor(list(group), dtype=torch.long)
        self.unit = torch.arange(len(labels)).repeat_interleave(torch.tensor(labels, dtype=torch.long))

    @property
    def entries(self) -> int:
        """M of the whole batch."""
        return len(self.unit)

    def split(self, token_budget: int, label_budget: int | None = None) -> list[Micro]:
        """Micro-batches of at most `token_budget` stream tokens and, where given, `label_budget` labels (an upper bound
        of head rows: those that units share are counted once each), by first-fit decreasing over whole trees.

        A tree larger than a budget is a micro-batch of its own. Within one, trees keep the order of the batch.
        Deterministic, O(n log n) for tokens alone. Raises ConfigError where a budget is not positive.
        """
        for name, budget in (("token_budget", token_budget), ("label_budget", label_budget)):
            if budget is not None and budget < 1:
                raise ConfigError(f"{budget} {name[:5]}s hold nothing", where=name, remedy="give at least 1")
        first_unit, first_entry = [0], [0]
        for tree in self.trees:
            first_unit.append(first_unit[-1] + len(tree.units))
            first_entry.append(first_entry[-1] + sum(len(unit.labels) for unit in tree.units))
        size = [tree.size for tree in self.trees]
        labels = [b - a for a, b in pairwise(first_entry)] if label_budget is not None else [0] * len(size)
        streams: list[tuple[Stream, list[int]]] = []
        for members in _first_fit_decreasing(size, token_budget, labels, label_budget or 0):
            streams.append((Stream.of([self.trees[i] for i in members]), members))
        counted = [int(stream.layout.paths.sum()) for stream, _ in streams]
        micros: list[Micro] = []
        for (stream, members), tokens in zip(streams, counted):
            view = LossView.of([self.trees[i] for i in members])
            items = [torch.arange(first_entry[i], first_entry[i + 1]) for i in members]
            units = [torch.arange(first_unit[i], first_unit[i + 1]) for i in members]
            micros.append(Micro(stream, view, torch.cat(items), torch.cat(units), tokens / sum(counted)))
        return micros


def _first_fit_decreasing(size: Sequence[int], budget: int, labels: Sequence[int], label_budget: int) -> list[list[int]]:
    """Bins of indices, ascending within a bin, bins ordered by their first member.

    A tournament tree holds the most free tokens and the most free labels below each node. With one budget its leftmost
    bin that fits is found in O(log n); with two, both maxima may promise what no bin below keeps, and the search returns.
    """
    leaves = 1 << (len(size) - 1).bit_length()
    free, spare = [budget] * (2 * leaves), [label_budget] * (2 * leaves)
    bins: dict[int, list[int]] = {}
    for item in sorted(range(len(size)), key=lambda i: (-size[i], -labels[i], i)):
        if size[item] > budget or labels[item] > label_budget:
            bins[-1 - item] = [item]
            continue
        open_nodes = [1]
        while True:  # a bin that is still empty fits: there is one for each item
            node = open_nodes.pop()
            if free[node] < size[item] or spare[node] < labels[item]:
                continue
            if node >= leaves:
                break
            open_nodes += (2 * node + 1, 2 * node)
        bins.setdefault(node, []).append(item)
        free[node] -= size[item]
        spare[node] -= labels[item]
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
            spare[node] = max(spare[2 * node], spare[2 * node + 1])
    return sorted(sorted(members) for members in bins.values())
