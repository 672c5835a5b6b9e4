"""Majority voting: abstentions, ties, weights, order."""

from __future__ import annotations

from itertools import permutations

import pytest

from burnish.core.errors import DataError
from burnish.maths.votes import majority


def test_most_votes_win() -> None:
    assert majority(["a", "b", "b", "c"]) == "b"
    assert majority(["7"]) == "7"  # one sample is plain chain of thought


def test_abstentions_never_win_unless_alone() -> None:
    assert majority([None, None, None, "a"]) == "a"
    assert majority([None, None]) is None
    assert majority([]) is None


def test_ties_go_to_the_first_seen() -> None:
    assert majority(["b", "a", "a", "b"]) == "b"
    assert majority([None, "c", "a", "b"]) == "c"


def test_order_matters_only_in_a_tie() -> None:
    assert {majority(p) for p in permutations(["a", "a", "a", "b", "b", None])} == {"a"}
    for p in set(permutations(["a", "a", "b", "b", "c"])):
        assert majority(p) == next(k for k in p if k in ("a", "b"))


def test_weights_decide_and_sum_the_same_in_any_order() -> None:
    assert majority(["a", "b", "b"], [1.0, 0.4, 0.4]) == "a"
    assert majority(["a", "b", "b"], [1.0, 0.6, 0.6]) == "b"
    tenths = [0.1] * 10 + [1.0]
    keys = ["many"] * 10 + ["one"]
    assert majority(keys, tenths) == "many" and majority(keys[::-1], tenths[::-1]) == "one"  # an exact tie
    assert majority([None, "a"], [100.0, 0.0]) == "a"


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")]])
def test_weights_that_cannot_be_meant(weights: list[float]) -> None:
    with pytest.raises(DataError, match="weights"):
        majority(["a", "b"], weights)
