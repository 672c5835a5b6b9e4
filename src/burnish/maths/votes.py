"""Choosing among answers: self-consistency, best of n."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import fsum, isfinite, log

from burnish.core.errors import DataError


def majority(keys: Sequence[Hashable | None], weights: Sequence[float] | None = None) -> Hashable | None:
    """The key with the most votes, or the most weight; None abstains, and None wins only where all abstain.

    argmax over k of sum over i of weight_i [key_i = k], weight 1 unless given      (section 2, arXiv:2203.11171)
    A tie goes to the key seen first; otherwise order does not matter (weights are summed exactly rounded).
    Raises DataError when weights are not one finite number >= 0 a key.
    """
    if weights is not None and (len(weights) != len(keys) or not all(isfinite(w) and w >= 0 for w in weights)):
        raise DataError(f"{len(keys)} keys need as many finite weights, none negative", where="majority")
    ballots: dict[Hashable, list[float]] = {}
    for key, weight in zip(keys, weights or [1.0] * len(keys), strict=True):
        if key is not None:
            ballots.setdefault(key, []).append(weight)
    return max(ballots, key=lambda key: fsum(ballots[key]), default=None)


def best(scores: Sequence[float | None]) -> int | None:
    """Where the highest score stands; a tie goes to the one seen first, None abstains and wins only where all do.

    argmax over i of score_i      (best of n, arXiv:2009.01325)
    """
    known = [(score, -i) for i, score in enumerate(scores) if score is not None]
    return -max(known)[1] if known else None


def best_of_n_kl(n: int) -> float:
    """The most that taking the best of n samples can move a policy away from itself, in nats.

    KL(best of n || policy) <= log n - (n-1)/n      (theorem 1, arXiv:2401.01879)
    Reached where no two answers have the same score and none has a probability of its own; often quoted as an equality
    (arXiv:2009.01325), which it is not for a policy over few answers. Raises DataError for n < 1.
    """
    if n < 1:
        raise DataError(f"n={n} given, wanted at least 1", where="best_of_n_kl")
    return log(n) - (n - 1) / n
