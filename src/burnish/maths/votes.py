"""Voting over answers: self-consistency."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import fsum, isfinite

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
