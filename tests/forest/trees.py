"""Random trees for hypothesis, and how many of them a test looks at."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from burnish.forest.stream import Tree, Unit

bounded = settings(max_examples=40, deadline=None)  # shared machines are slow now and then


@st.composite
def random_trees(draw: st.DrawFn, most: int = 5, longest: int = 6) -> list[Tree]:
    """Up to `most` trees of up to six segments and any shape, with units on any segment, over few distinct tokens."""
    trees: list[Tree] = []
    for _ in range(draw(st.integers(1, most))):
        tokens: list[tuple[int, ...]] = []
        parent: list[int] = []
        open_path: list[int] = []
        for i in range(draw(st.integers(1, 6))):
            depth = draw(st.integers(1, len(open_path))) if open_path else 0
            open_path = open_path[:depth]
            parent.append(open_path[-1] if open_path else -1)
            tokens.append(tuple(draw(st.lists(st.integers(3, 6), min_size=1, max_size=longest))))
            open_path.append(i)
        units: list[Unit] = []
        for leaf in draw(st.lists(st.integers(0, len(tokens) - 1), max_size=4)):
            end, j = 0, leaf
            while j >= 0:
                end, j = end + len(tokens[j]), parent[j]
            chosen = draw(st.sets(st.integers(1, end - 1), max_size=8)) if end > 1 else set[int]()
            units.append(Unit(leaf, tuple(sorted(chosen))))
        trees.append(Tree(tuple(tokens), tuple(parent), tuple(units)))
    return trees
