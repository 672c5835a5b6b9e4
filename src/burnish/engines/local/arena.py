"""Where keys and values live: one row a token for nodes, one slot a running row, by layer. Nothing is concatenated.

Node tokens of one node are contiguous, so that a shared prefix is one slice; a slot holds what a row alone attends to.
Both are preallocated and double when they are full. Layers may differ in heads and widths: a layer's tensors take their
shape from the first keys it brings. The plans own this; transformers' caches are not involved.

Legend: C tokens of capacity, R slots of S keys, Hk key-value heads, D width of a key, Dv of a value.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from burnish.engines.base import Node

Pair = tuple[Tensor, Tensor]
KEYS_STEP = 16  # slots are attended to, and grow, in multiples of this many keys


@dataclass(eq=False)
class LocalNode(Node):
    """A node with its place in the arena (None: read when next needed) and the hidden row of its last token [H]."""

    at: int | None = None
    hidden: Tensor | None = None


def place_of(node: LocalNode) -> np.ndarray:
    """The token rows of the arena that hold a node that was read."""
    assert node.at is not None
    return np.arange(node.at, node.at + len(node.ids))


class Spans:
    """First-fit spans of a line of `capacity` tokens. Free neighbours are joined."""

    def __init__(self) -> None:
        self.capacity = 0
        self.used = 0
        self._free: list[tuple[int, int]] = []  # (start, length), ascending

    def take(self, length: int) -> int | None:
        """The first place for `length` tokens, or None."""
        for i, (start, room) in enumerate(self._free):
            if room >= length:
                self._free[i : i + 1] = [(start + length, room - length)] if room > length else []
                self.used += length
                return start
        return None

    def give(self, start: int, length: int) -> None:
        """Back to the free ones."""
        self.used -= length
        self._add(start, length)

    def extend(self, capacity: int) -> None:
        """A longer line."""
        self._add(self.capacity, capacity - self.capacity)
        self.capacity = capacity

    def _add(self, start: int, length: int) -> None:
        insort(self._free, (start, length))
        joined: list[tuple[int, int]] = []
        for first, room in self._free:
            if joined and sum(joined[-1]) == first:
                joined[-1] = joined[-1][0], joined[-1][1] + room
            else:
                joined.append((first, room))
        self._free = joined


class Arena:
    """nodes[layer]: k [C, Hk, D], v [C, Hk, Dv]; slots[layer]: k [R, Hk, S, D], v [R, Hk, S, Dv]."""

    def __init__(self) -> None:
        self.spans = Spans()
        self.nodes: dict[int, Pair] = {}
        self.slots: dict[int, Pair] = {}
        self.rows = 0
        self.size = 0
        self.remade = 0  # how often slots have moved: what points at them is good for one number

    def allocate(self, length: int) -> int:
        """Room for one node's tokens."""
        at = self.spans.take(length)
        while at is None:
            self.spans.extend(max(2 * self.spans.capacity, self.spans.capacity + length, 256))
            at = self.spans.take(length)
        return at

    def store(self, layer: int, at: Tensor, k: Tensor, v: Tensor) -> Pair:
        """Keep a stream's keys k [1, Hk, T, D] and values v [1, Hk, T, Dv] at token rows `at` [T]; -> the layer's pair."""
        capacity = self.spans.capacity
        held = self.nodes.get(layer)
        if held is None or len(held[0]) < capacity:
            new = tuple(x.new_zeros(capacity, x.shape[1], x.shape[3]) for x in (k, v))
            for x, old in zip(new, held or ()):
                x[: len(old)] = old
            self.nodes[layer] = held = (new[0], new[1])
        for x, y in zip(held, (k, v)):
            x.index_copy_(0, at, y[0].transpose(0, 1))
        return held

    def row_slots(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        """The layer's slots, made in the likeness of its keys and values [..., Hk, T, D] where they are not there yet.

        Zeroed, because a hidden key of weight 0 times a value that is not a number would still not be a number.
        """
        if layer not in self.slots:
            ks, vs = (x.new_zeros(self.rows, x.shape[-3], self.size, x.shape[-1]) for x in (k, v))
            self.slots[layer] = ks, vs
        return self.slots[layer]

    def reserve(self, rows: int, size: int, running: int = 0) -> None:
        """At least `rows` slots of `size` keys, keeping what the first `running` hold. A longer size doubles."""
        if rows <= self.rows and size <= self.size:
            return
        if size > self.size:
            size = -(-max(size, 2 * self.size if running else 0) // KEYS_STEP) * KEYS_STEP
        rows, size = max(rows, running), max(size, self.size)
        self.remade += 1
        for layer, pair in self.slots.items():
            new = []
            for x in pair:
                y = x.new_zeros(rows, x.shape[1], size, x.shape[3])
                y[:running, :, : self.size] = x[:running]
                new.append(y)
            self.slots[layer] = (new[0], new[1])
        self.rows, self.size = rows, size

    def seat(self, slots: Tensor, tokens: Tensor) -> None:
        """Copy paths of node tokens [m, P] to the heads of slots [m]. Where a path is shorter its tail is never seen."""
        m, length = tokens.shape
        flat = tokens.flatten()
        for layer, pair in self.nodes.items():
            likeness = (x[:1].transpose(0, 1) for x in pair)
            for x, y in zip(self.row_slots(layer, *likeness), pair):
                x[slots, :, :length] = y.index_select(0, flat).unflatten(0, (m, length)).transpose(1, 2)

    def move(self, source: Tensor, target: Tensor, size: int) -> None:
        """Slots `target` take over what `source` hold, as far as `size` keys."""
        for pair in self.slots.values():
            for x in pair:
                x[target, :, :size] = x[source, :, :size]

    def release(self) -> None:
        """Give all memory of the slots back; rows are not running between two calls."""
        self.slots.clear()
        self.rows = self.size = 0
        self.remade += 1
