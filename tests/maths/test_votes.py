"""Majority voting and best of n: abstentions, ties, weights, order, divergence."""

from __future__ import annotations

from itertools import permutations, product
from math import log

import pytest

from burnish.core.errors import DataError
from burnish.maths.votes import best, best_of_n_kl, majority


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


def test_the_best_is_the_first_of_the_highest_and_abstentions_never_win() -> None:
    assert best([None, 1.0, 3.0, 3.0, None]) == 2
    assert best([-2.0, -1.0]) == 1 and best([0.0]) == 0
    assert best([None, None]) is None and best([]) is None


def best_of_n(policy: list[float], scores: list[float], n: int) -> list[float]:
    """The policy that takes the best of n draws, by enumerating every one of them."""
    chosen = [0.0] * len(policy)
    for drawn in product(range(len(policy)), repeat=n):
        weight = 1.0
        for answer in drawn:
            weight *= policy[answer]
        chosen[drawn[best([scores[a] for a in drawn]) or 0]] += weight
    return chosen


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * log(a / b) for a, b in zip(p, q) if a > 0)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("policy", [[0.25] * 4, [0.7, 0.2, 0.05, 0.05], [0.01, 0.01, 0.01, 0.97]])
def test_the_bound_on_the_divergence_holds_for_enumerated_policies(n: int, policy: list[float]) -> None:
    found = divergence(best_of_n(policy, [3.0, 1.0, 2.0, 0.0], n), policy)
    assert found <= best_of_n_kl(n) + 1e-12
    assert (found == pytest.approx(0)) == (n == 1) and best_of_n_kl(1) == 0


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_the_bound_is_reached_where_no_answer_has_a_probability_of_its_own(n: int) -> None:
    """M answers of equal probability and distinct scores: the k-th best of n has (k/M)^n - ((k-1)/M)^n."""
    answers = 200_000
    found = [(k / answers) ** n - ((k - 1) / answers) ** n for k in range(1, answers + 1)]
    assert divergence(found, [1 / answers] * answers) == pytest.approx(best_of_n_kl(n), abs=1e-3)
    with pytest.raises(DataError):
        best_of_n_kl(0)
