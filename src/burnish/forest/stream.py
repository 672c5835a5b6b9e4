"""Trees of token segments, the packed stream they become, and the view of it that a loss needs.

A segment is a run of tokens below a parent segment. A supervised row is one root, a preference pair a root with two
children, a group of rollouts a root with many. Segments stand in depth-first pre-order, so that everything below a
segment is one contiguous slice of the stream. A token is predicted by the row before it *on its path*: the first token
of a child by its parent's last row, however far away that stands.

Legend: T tokens of the stream, S segments, N head rows, M entries (a label of a unit), U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import DataError


@dataclass(frozen=True)
class Unit:
    """One sequence from the root to segment `leaf`, and which of its tokens are learned.

    `labels` are offsets into the tokens of the path, ascending, each at least 1: nothing predicts token 0.
    """

    leaf: int
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """One tree of segments as ids on the host: `parent[i] < i`, depth-first pre-order, one root, no empty segment.

    Raises DataError where the segments or the units cannot be meant.
    """

    tokens: tuple[tuple[int, ...], ...]
    parent: tuple[int, ...]
    units: tuple[Unit, ...]

    def __post_init__(self) -> None:
        length = tuple(map(len, self.tokens))
        _check_segments(length, self.parent)
        if self.parent.count(-1) != 1:
            raise DataError("a tree has one root", where=f"parent={self.parent}", remedy="make one Tree of each root")
        end: list[int] = []
        for n, p in zip(length, self.parent):
            end.append(n + (end[p] if p >= 0 else 0))
        for u, unit in enumerate(self.units):
            if not 0 <= unit.leaf < len(length):
                raise DataError(f"leaf {unit.leaf} is not one of {len(length)} segments", where=f"unit {u}")
            given = unit.labels
            if given and (given[0] < 1 or given[-1] >= end[unit.leaf] or any(a >= b for a, b in pairwise(given))):
                raise DataError(
                    f"labels must ascend within 1..{end[unit.leaf] - 1} (token 0 has no predictor)",
                    where=f"unit {u} of leaf {unit.leaf}",
                )

    @staticmethod
    def row(ids: Sequence[int], trained: Sequence[bool]) -> Tree:
        """One segment with one unit. The first token has no predictor and is never a label, trained or not."""
        if len(ids) != len(trained):
            raise DataError(f"{len(trained)} flags for {len(ids)} tokens", where="Tree.row")
        labels = tuple(i for i, wanted in enumerate(trained) if wanted and i)
        return Tree((tuple(ids),), (-1,), (Unit(0, labels),))

    @cached_property
    def size(self) -> int:
        """Tokens this tree puts into a stream."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the segments of many trees stand: `parent[i] < i`, -1 for a root, depth-first pre-order (checked).

    start           [S] stream row of a segment's first token
    first_position  [S] its position in its own sequence: where its parent's tokens end
    root            [S] the segment at the top of its tree
    """

    length: tuple[int, ...]
    parent: tuple[int, ...]
    start: tuple[int, ...] = field(init=False, repr=False)
    first_position: tuple[int, ...] = field(init=False, repr=False)
    root: tuple[int, ...] = field(init=False, repr=False)
    _end: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_segments(self.length, self.parent)
        first: list[int] = []
        root: list[int] = []
        for i, p in enumerate(self.parent):
            first.append(0 if p < 0 else first[p] + self.length[p])
            root.append(i if p < 0 else root[p])
        start = [0, *accumulate(self.length)]
        end = start[1:]
        for i in range(len(self.parent) - 1, -1, -1):
            p = self.parent[i]
            if p >= 0:
                end[p] = max(end[p], end[i])
        for name, value in (("start", start[:-1]), ("first_position", first), ("root", root), ("_end", end)):
            object.__setattr__(self, name, tuple(value))

    @property
    def size(self) -> int:
        """T, the tokens of the stream."""
        return self.start[-1] + self.length[-1]

    @cached_property
    def position(self) -> Tensor:
        """[T] position of each row in its own sequence."""
        ahead = torch.tensor(self.start) - torch.tensor(self.first_position)
        return torch.arange(self.size) - ahead.repeat_interleave(torch.tensor(self.length))

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Segments without children; their paths together cover every segment."""
        inner = set(self.parent)
        return tuple(i for i in range(len(self.parent)) if i not in inner)

    @cached_property
    def paths(self) -> Tensor:
        """[T] how many root-to-leaf sequences run through each row: the copies that separate rows would make of it."""
        below = [0] * len(self.parent)
        for leaf in self.leaves:
            below[leaf] = 1
        for i in range(len(self.parent) - 1, -1, -1):
            if (p := self.parent[i]) >= 0:
                below[p] += below[i]
        return torch.tensor(below).repeat_interleave(torch.tensor(self.length))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence, root to leaf."""
        return max(f + n for f, n in zip(self.first_position, self.length))

    def ancestors(self, i: int) -> list[int]:
        """The segments above segment i, nearest first."""
        above: list[int] = []
        while (i := self.parent[i]) >= 0:
            above.append(i)
        return above

    def subtree_end(self, i: int) -> int:
        """The stream row after the last token at or below segment i."""
        return self._end[i]

    def rows(self, i: int) -> Tensor:
        """Stream rows of the sequence from the root to the end of segment i, in reading order."""
        path = [*reversed(self.ancestors(i)), i]
        return torch.cat([torch.arange(self.start[s], self.start[s] + self.length[s]) for s in path])


@dataclass(frozen=True, eq=False)
class Stream:
    """What the body reads: tokens [T] int64 and where their segments stand."""

    tokens: Tensor
    layout: Layout

    @staticmethod
    def of(trees: Sequence[Tree]) -> Stream:
        """The trees side by side, in the order given. Raises DataError where there is none."""
        if not trees:
            raise DataError("a stream needs at least one tree", where="Stream.of")
        length: list[int] = []
        parent: list[int] = []
        for tree in trees:
            base = len(length)
            parent.extend(p if p < 0 else p + base for p in tree.parent)
            length.extend(map(len, tree.tokens))
        return Stream(torch.as_tensor(_flat(trees)), Layout(tuple(length), tuple(parent)))

    def to(self, device: torch.device | str) -> Stream:
        """The same stream with its tokens on `device`."""
        return Stream(self.tokens.to(device), self.layout)


@dataclass(frozen=True, eq=False)
class LossView:
    """Which hidden rows predict which labels: N head rows, deduplicated, and M >= N entries that point at them.

    source [N]  stream row whose hidden state predicts
    label  [N]  the token predicted
    index  [M]  the head row of an entry; rows are numbered by first appearance
    unit   [M]  the unit of an entry, numbered within this view, non-decreasing
    last   [U]  stream row of the last token of each unit's sequence: its state sees all of it
    """

    source: Tensor
    label: Tensor
    index: Tensor
    unit: Tensor
    last: Tensor

    @staticmethod
    def of(trees: Sequence[Tree]) -> LossView:
        """Entries in the order tree, unit, label. One (source, label) is one row, however many units share it."""
        nothing = np.zeros(0, np.int64)
        tokens = _flat(trees) if trees else nothing
        sources, targets, units = [nothing], [nothing], [nothing]
        last: list[int] = []
        base = seen = 0
        for tree in trees:
            starts = list(accumulate(map(len, tree.tokens), initial=base))
            for unit in tree.units:
                offsets = np.asarray(unit.labels, np.int64)
                rows = _path_rows(tree, starts, unit.leaf)
                last.append(int(rows[-1]))
                sources.append(rows[offsets - 1])
                targets.append(rows[offsets])
                units.append(np.full(len(offsets), seen, np.int64))
                seen += 1
            base += tree.size
        source, label = np.concatenate(sources), tokens[np.concatenate(targets)]
        key = source * (int(label.max(initial=0)) + 1) + label
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        order = np.argsort(first)
        number = np.empty_like(order)
        number[order] = np.arange(len(order))
        kept = first[order]
        columns = (source[kept], label[kept], number[inverse], np.concatenate(units), np.asarray(last, np.int64))
        return LossView(*map(torch.as_tensor, columns))

    def to(self, device: torch.device | str) -> LossView:
        """The same view on `device`."""
        return LossView(*(x.to(device) for x in (self.source, self.label, self.index, self.unit, self.last)))


def _flat(trees: Sequence[Tree]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.fromiter(chain.from_iterable(chain.from_iterable(t.tokens for t in trees)), np.int64)


def _path_rows(tree: Tree, starts: Sequence[int], leaf: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    path: list[int] = []
    while leaf >= 0:
        path.append(leaf)
        leaf = tree.parent[leaf]
    return np.concatenate([np.arange(starts[s], starts[s] + len(tree.tokens[s])) for s in reversed(path)])


def _check_segments(length: Sequence[int], parent: Sequence[int]) -> None:
    """Raises DataError unless no segment is empty and each parent is on the path open where its child starts."""
    if not length or len(length) != len(parent):
        raise DataError(f"{len(length)} segments, {len(parent)} parents; wanted one parent each", where="segments")
    open_path: list[int] = []
    for i, (n, p) in enumerate(zip(length, parent)):
        if n < 1:
            raise DataError("is empty", where=f"segment {i}", remedy="leave empty segments out")
        while open_path and open_path[-1] != p:
            open_path.pop()
        if p != -1 and not open_path:
            raise DataError(
                f"has parent {p}, which is not on the path open before it",
                where=f"segment {i}",
                remedy="order segments depth first: a segment, then all that stands below it, then the next",
            )
        open_path.append(i)
