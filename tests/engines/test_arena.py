"""Where keys and values live, and which prefixes are worth a block of their own."""

from __future__ import annotations

import random

import torch

from burnish.engines.base import Node
from burnish.engines.local.arena import Arena, Spans
from burnish.engines.local.plans import SHARED_BYTES, SHARED_BYTES_CUDA, _similar, trunk_of

CPU = torch.device("cpu")


def test_spans_never_overlap_and_join_again() -> None:
    spans, rng, held = Spans(), random.Random(0), dict[int, int]()
    spans.extend(300)
    for _ in range(2000):
        if held and rng.random() < 0.5:
            start = rng.choice(list(held))
            spans.give(start, held.pop(start))
        else:
            length = rng.randint(1, 40)
            start = spans.take(length)
            if start is None:
                spans.extend(spans.capacity + 50)
                continue
            assert all(start + length <= s or s + n <= start for s, n in held.items())
            assert start + length <= spans.capacity
            held[start] = length
        assert spans.used == sum(held.values())
    for start, length in held.items():
        spans.give(start, length)
    assert spans.take(spans.capacity) == 0


def test_what_is_stored_survives_growth_and_moves() -> None:
    arena, generator = Arena(), torch.Generator().manual_seed(0)
    at = torch.arange(arena.allocate(250), 250)
    k, v = (torch.randn(1, 2, 250, 4, generator=generator) for _ in range(2))
    arena.store(3, at, k, v)
    later = arena.allocate(100)
    arena.store(3, torch.arange(later, later + 100), k[:, :, :100], v[:, :, :100])
    assert torch.equal(arena.nodes[3][0][:250], k[0].transpose(0, 1))
    arena.reserve(4, 20)
    arena.seat(torch.tensor([2, 0]), torch.stack([torch.arange(10, 30), torch.arange(20)]))
    keys = arena.slots[3][0]
    assert torch.equal(keys[2, :, :20], k[0, :, 10:30]) and torch.equal(keys[0, :, :20], k[0, :, :20])
    arena.move(torch.tensor([2]), torch.tensor([1]), 16)
    assert torch.equal(keys[1, :, :16], k[0, :, 10:26])
    arena.reserve(3, 40, running=3)
    grown = arena.slots[3][0]
    assert grown.shape == (3, 2, 64, 4)  # doubled, in steps of 16; fewer rows
    assert torch.equal(grown[1, :, :16], k[0, :, 10:26])
    arena.release()
    assert not arena.slots and arena.nodes


def test_a_prefix_is_shared_where_copies_would_be_large() -> None:
    root = Node("root", tuple(range(100)))
    child = Node("child", (1, 2), root)
    leaf = Node("leaf", tuple(range(50)), child)
    rows = {root: 11, child: 11, leaf: 2}  # ten copies of the root are spared by sharing it
    enough = -(-SHARED_BYTES // (10 * 100))  # bytes a token
    assert trunk_of(leaf.chain, rows, enough, CPU, spared=1) == 1
    assert trunk_of(leaf.chain, rows, enough - 1, CPU, spared=1) == 0
    assert trunk_of(leaf.chain, {**rows, leaf: 40}, enough - 1, CPU, spared=1) == 3
    assert trunk_of(leaf.chain, {**rows, child: 10_000}, enough - 1, CPU, spared=1) == 2
    much = enough * (SHARED_BYTES_CUDA // SHARED_BYTES)
    found = [trunk_of(leaf.chain, rows, size, torch.device("cuda", 0), spared=1) for size in (enough, much - 1000, much)]
    assert found == [0, 0, 1]


def test_padding_wastes_little() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 400) for _ in range(300)]
    groups = _similar(torch.tensor(lengths).numpy(), lengths)
    assert sorted(i for group in groups for i in group) == list(range(300))
    padded = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    assert padded < 1.2 * sum(lengths) and len(groups) < 20
