"""Layouts and loss views against definitions written token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import DataError
from burnish.forest.stream import Layout, LossView, Stream, Tree, Unit
from tests.forest.trees import bounded, random_trees


def test_a_layout_by_hand():
    #  0: 3 tokens          5: 2 tokens
    #  |- 1: 2 tokens       `- 6: 1 token
    #  |  |- 2: 1 token
    #  |  `- 3: 4 tokens
    #  `- 4: 2 tokens
    layout = Layout((3, 2, 1, 4, 2, 2, 1), (-1, 0, 1, 1, 0, -1, 5))
    assert layout.size == 15
    assert layout.start == (0, 3, 5, 6, 10, 12, 14)
    assert layout.first_position == (0, 3, 5, 5, 3, 0, 2)
    assert layout.position.tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 3, 4, 0, 1, 2]
    assert layout.root == (0, 0, 0, 0, 0, 5, 5)
    assert layout.ancestors(3) == [1, 0]
    assert layout.ancestors(5) == []
    assert [layout.subtree_end(i) for i in range(7)] == [12, 10, 6, 10, 12, 15, 15]
    assert layout.leaves == (2, 3, 4, 6)
    assert layout.longest == 9
    assert layout.rows(3).tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert layout.rows(6).tolist() == [12, 13, 14]


@bounded
@given(st.data())
def test_a_layout_is_what_its_trees_say(data: st.DataObject):
    trees = data.draw(random_trees())
    stream = Stream.of(trees)
    layout, at = stream.layout, 0
    for tree in trees:
        base = layout.start.index(at)
        for i, tokens in enumerate(tree.tokens):
            path, j = [i], tree.parent[i]
            while j >= 0:
                path.append(j)
                j = tree.parent[j]
            assert layout.ancestors(base + i) == [base + j for j in path[1:]]
            spelled = [t for j in reversed(path) for t in tree.tokens[j]]
            assert stream.tokens[layout.rows(base + i)].tolist() == spelled
            assert layout.position[layout.rows(base + i)].tolist() == list(range(len(spelled)))
            below = [j for j in range(len(tree.tokens)) if base + i in [base + j, *layout.ancestors(base + j)]]
            assert layout.subtree_end(base + i) == layout.start[base + max(below)] + layout.length[base + max(below)]
            assert layout.root[base + i] == base
            assert len(tokens) == layout.length[base + i]
            copies = sum(base + i in [leaf, *layout.ancestors(leaf)] for leaf in layout.leaves)
            rows = slice(layout.start[base + i], layout.start[base + i] + len(tokens))
            assert layout.paths[rows].tolist() == [copies] * len(tokens)
        at += tree.size
    assert at == layout.size == len(stream.tokens)


@pytest.mark.parametrize(
    ("length", "parent", "said"),
    [
        ((1, 1, 1, 1), (-1, 0, 0, 1), "segment 3  has parent 1, which is not on the path open before it"),
        ((1, 1), (-1, 1), "segment 1  has parent 1"),
        ((1, 1), (-1, 5), "segment 1  has parent 5"),
        ((1, 1), (-1, -2), "segment 1  has parent -2"),
        ((1, 1, 1), (-1, -1, 0), "segment 2  has parent 0"),
        ((2, 0), (-1, 0), "segment 1  is empty"),
        ((2, 1), (-1,), "2 segments, 1 parents"),
        ((), (), "0 segments"),
    ],
)
def test_segments_out_of_order_are_refused(length: tuple[int, ...], parent: tuple[int, ...], said: str):
    with pytest.raises(DataError, match=said):
        Layout(length, parent)


@pytest.mark.parametrize(
    ("parent", "unit", "said"),
    [
        ((-1, 0), Unit(1, (0,)), "token 0 has no predictor"),
        ((-1, 0), Unit(1, (4,)), r"1\.\.3"),
        ((-1, 0), Unit(0, (2,)), r"1\.\.1"),
        ((-1, 0), Unit(1, (2, 2)), "ascend"),
        ((-1, 0), Unit(1, (3, 2)), "ascend"),
        ((-1, 0), Unit(2, ()), "leaf 2"),
        ((-1, 0), Unit(-1, ()), "leaf -1"),
        ((-1, -1), Unit(1, ()), "one root"),
    ],
)
def test_a_tree_that_cannot_be_meant_is_refused(parent: tuple[int, ...], unit: Unit, said: str):
    with pytest.raises(DataError, match=said):
        Tree(((5, 6), (7, 8)), parent, (unit,))


def test_a_row_never_learns_its_first_token():
    row = Tree.row([4, 5, 6, 7], [True, False, True, True])
    assert row == Tree(((4, 5, 6, 7),), (-1,), (Unit(0, (2, 3)),))
    assert row.size == 4
    with pytest.raises(DataError, match="3 flags for 4 tokens"):
        Tree.row([4, 5, 6, 7], [True, False, True])


def test_the_first_token_of_a_child_is_predicted_by_the_last_row_of_its_parent():
    # a pair whose answers stand far from the end of the prompt
    pair = Tree(((10, 11, 12), (20, 21), (30, 31)), (-1, 0, 0), (Unit(1, (3, 4)), Unit(2, (3, 4))))
    view = LossView.of([Tree.row([1, 2], [True, True]), pair])
    assert view.source.tolist() == [0, 4, 5, 4, 7]  # row 4 is the prompt's last, after two rows of another tree
    assert view.label.tolist() == [2, 20, 21, 30, 31]
    assert view.index.tolist() == [0, 1, 2, 3, 4]
    assert view.unit.tolist() == [0, 1, 1, 2, 2]


def test_a_label_shared_by_several_units_is_one_row():
    # the segment (20, 21) is learned by both leaves below it
    tree = Tree(((10,), (20, 21), (30,), (31,)), (-1, 0, 1, 1), (Unit(2, (1, 2, 3)), Unit(3, (1, 2, 3))))
    view = LossView.of([tree])
    assert view.source.tolist() == [0, 1, 2, 2]
    assert view.label.tolist() == [20, 21, 30, 31]
    assert view.index.tolist() == [0, 1, 2, 0, 1, 3]
    assert view.unit.tolist() == [0, 0, 0, 1, 1, 1]


def test_siblings_that_start_with_one_token_share_its_row_and_no_other():
    tree = Tree(((10,), (20, 21), (20, 21)), (-1, 0, 0), (Unit(1, (1, 2)), Unit(2, (1, 2))))
    view = LossView.of([tree])
    assert view.source.tolist() == [0, 1, 3]
    assert view.label.tolist() == [20, 21, 21]
    assert view.index.tolist() == [0, 1, 0, 2]


def test_a_view_may_be_empty():
    view = LossView.of([Tree.row([1, 2], [False, False])])
    assert [len(x) for x in (view.source, view.label, view.index, view.unit)] == [0, 0, 0, 0]
    assert view.index.dtype == torch.int64


@bounded
@given(st.data())
def test_a_view_is_the_same_as_reading_every_path(data: st.DataObject):
    trees = data.draw(random_trees())
    stream, view = Stream.of(trees), LossView.of(trees)
    rows: dict[tuple[int, int], int] = {}
    index: list[int] = []
    units: list[int] = []
    base = unit_number = 0
    for tree in trees:
        for unit in tree.units:
            path = stream.layout.rows(base + unit.leaf).tolist()
            for offset in unit.labels:
                key = path[offset - 1], int(stream.tokens[path[offset]])
                index.append(rows.setdefault(key, len(rows)))
                units.append(unit_number)
            unit_number += 1
        base += len(tree.tokens)
    assert list(zip(view.source.tolist(), view.label.tolist())) == list(rows)
    assert view.index.tolist() == index
    assert view.unit.tolist() == units


def test_many_roots_and_a_deep_chain_are_laid_out_in_linear_time():
    roots = Layout((3,) * 20_000, (-1,) * 20_000)
    assert roots.size == len(roots.position) == 60_000
    chain = Layout((1,) * 20_000, tuple(range(-1, 19_999)))
    assert chain.position.tolist() == list(range(20_000))
    assert chain.subtree_end(0) == 20_000 == len(chain.rows(19_999))
