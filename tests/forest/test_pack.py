"""Micro-batches: every entry once, inside the budget, and nothing that depends on how the batch was cut."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import ConfigError, DataError
from burnish.forest.pack import Batch
from burnish.forest.stream import LossView, Stream, Tree
from tests.forest.trees import bounded, random_trees


def predictions(stream: Stream, view: LossView) -> list[tuple[list[int], int]]:
    """For each entry, all tokens its prediction sees and its label: what a loss is a function of."""
    layout = stream.layout
    segment = torch.arange(len(layout.length)).repeat_interleave(torch.tensor(layout.length))
    out: list[tuple[list[int], int]] = []
    for row in view.index.tolist():
        source = int(view.source[row])
        path = layout.rows(int(segment[source]))
        out.append((stream.tokens[path[path <= source]].tolist(), int(view.label[row])))
    return out


@bounded
@given(st.data(), st.integers(1, 60))
def test_every_entry_is_in_one_micro_batch_with_what_it_predicts_from(data: st.DataObject, budget: int):
    trees = data.draw(random_trees())
    batch = Batch(trees)
    micros = batch.split(budget)
    whole = predictions(Stream.of(trees), LossView.of(trees))
    assert batch.entries == len(whole)

    items = torch.cat([m.items for m in micros])
    assert sorted(items.tolist()) == list(range(batch.entries))
    units = torch.cat([m.units for m in micros])
    assert sorted(units.tolist()) == list(range(len(batch.group)))
    for micro in micros:
        assert micro.items.tolist() == sorted(micro.items.tolist())
        assert predictions(micro.stream, micro.view) == [whole[i] for i in micro.items.tolist()]
        assert torch.equal(micro.units[micro.view.unit], batch.unit[micro.items])
        assert micro.view.unit.tolist() == sorted(micro.view.unit.tolist())
        roots = micro.stream.layout.parent.count(-1)
        assert micro.stream.layout.size <= budget or roots == 1


@bounded
@given(st.data(), st.integers(1, 60))
def test_weights_add_up_over_micro_batches(data: st.DataObject, budget: int):
    batch = Batch(data.draw(random_trees()))
    weight = torch.rand(batch.entries, dtype=torch.float64)
    value = torch.rand(batch.entries, dtype=torch.float64)
    split = sum(float((weight[m.items] * value[m.items]).sum()) for m in batch.split(budget))
    assert split == pytest.approx(float((weight * value).sum()), rel=1e-12)


@bounded
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 40))
def test_it_is_first_fit_decreasing(sizes: list[int], budget: int):
    batch = Batch([Tree.row([n] * n, [False] * n) for n in sizes])
    bins: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for members in bins:
            if sizes[i] <= budget and sum(sizes[j] for j in members) + sizes[i] <= budget:
                members.append(i)
                break
        else:
            bins.append([i])
    assert [m.units.tolist() for m in batch.split(budget)] == sorted(sorted(members) for members in bins)


@bounded
@given(st.data(), st.integers(1, 60), st.randoms(use_true_random=False))
def test_the_order_of_the_trees_does_not_change_how_full_the_micro_batches_are(
    data: st.DataObject, budget: int, rng: random.Random
):
    trees = data.draw(random_trees())
    shuffled = list(trees)
    rng.shuffle(shuffled)

    def fill(batch: Batch) -> list[list[int]]:
        bins: list[list[int]] = []
        for micro in batch.split(budget):
            layout = micro.stream.layout
            starts = [s for s, p in zip(layout.start, layout.parent) if p < 0]
            bins.append(sorted(b - a for a, b in pairwise([*starts, layout.size])))
        return sorted(bins)

    assert fill(Batch(trees)) == fill(Batch(shuffled))


def test_a_budget_for_all_keeps_the_order_of_the_batch():
    trees = [Tree.row(range(3, 3 + n), [True] * n) for n in (5, 2, 9, 2)]
    (micro,) = Batch(trees).split(18)
    assert micro.items.tolist() == list(range(14))
    assert micro.units.tolist() == [0, 1, 2, 3]
    assert micro.stream.tokens.tolist() == [*range(3, 8), 3, 4, *range(3, 12), 3, 4]


def test_a_tree_larger_than_the_budget_stands_alone_and_the_others_still_share():
    trees = [Tree.row([7] * n, [True] * n) for n in (2, 9, 2)]
    assert [m.stream.layout.length for m in Batch(trees).split(4)] == [(2, 2), (9,)]


def test_units_without_labels_are_listed_and_groups_default_to_units():
    batch = Batch([Tree.row([1, 2], [False, False]), Tree.row([1, 2], [False, True])])
    (micro,) = batch.split(100)
    assert micro.units.tolist() == [0, 1]
    assert micro.view.unit.tolist() == [1]
    assert batch.unit.tolist() == [1]
    assert batch.group.tolist() == [0, 1]
    assert Batch(batch.trees, group=[7, 7]).group.tolist() == [7, 7]


def test_what_cannot_be_cut_is_refused():
    row = Tree.row([1, 2], [True, True])
    with pytest.raises(DataError, match="at least one tree"):
        Batch([])
    with pytest.raises(DataError, match="2 group ids for 1 units"):
        Batch([row], group=[0, 1])
    with pytest.raises(ConfigError, match="token_budget"):
        Batch([row]).split(0)


def test_thousands_of_trees_are_cut_into_nearly_full_micro_batches():
    sizes = [1 + (i * 7919) % 400 for i in range(3_000)]
    micros = Batch([Tree.row([5] * n, [False] * n) for n in sizes]).split(4096)
    assert sum(m.stream.layout.size for m in micros) == sum(sizes)
    assert len(micros) <= 1.02 * sum(sizes) / 4096 + 1


@bounded
@given(st.lists(st.tuples(st.integers(2, 30), st.integers(0, 29)), min_size=1, max_size=40), st.integers(1, 40), st.integers(1, 40))
def test_two_budgets_are_first_fit_decreasing_too(rows: list[tuple[int, int]], budget: int, labels: int):
    """Against the plain loop over bins; and no bin is over either budget unless its tree is alone."""
    trees = [Tree.row(range(n), [i >= n - min(k, n - 1) for i in range(n)]) for n, k in rows]
    size, count = [t.size for t in trees], [len(t.units[0].labels) for t in trees]
    bins: list[list[int]] = []
    for i in sorted(range(len(trees)), key=lambda i: (-size[i], -count[i], i)):
        for members in bins:
            if sum(size[j] for j in members) + size[i] <= budget and sum(count[j] for j in members) + count[i] <= labels:
                members.append(i)
                break
        else:
            bins.append([i])
    want = sorted(sorted(members) for members in bins)
    batch = Batch(trees)
    got = [m.units.tolist() for m in batch.split(budget, labels)]
    assert got == want
    for members in got:
        assert len(members) == 1 or (sum(size[i] for i in members) <= budget and sum(count[i] for i in members) <= labels)


def test_a_label_budget_that_never_binds_changes_nothing():
    dice = random.Random(0)
    sizes = [dice.randrange(2, 60) for _ in range(200)]
    batch = Batch([Tree.row(range(n), [True] * n) for n in sizes])
    alone, both = batch.split(256), batch.split(256, 10_000)
    assert [m.items.tolist() for m in alone] == [m.items.tolist() for m in both]
    with pytest.raises(ConfigError, match="0 labels hold nothing"):
        batch.split(256, 0)
