"""What a set of graded answers says about the system that gave them: estimates, intervals, paired tests. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from burnish.core.errors import DataError

DRAWS = 10_000
_EXACT_SIGNS = 14  # differences whose 2^k sign patterns are enumerated; more are sampled
_BLOCK = 2_000_000  # random numbers held at once


@dataclass(frozen=True)
class Estimate:
    """A mean (or a difference of means) and the interval around it."""

    mean: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that one of k samples is correct, from n samples of which c are: 1 - C(n-c, k) / C(n, k).

    (eq. 1, arXiv:2107.03374.) In whole numbers and rounded once, so neither large n nor small c loses digits; beside
    1 - (1 - c/n)^k, which is biased low. Raises DataError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise DataError(f"n={n}, c={c}, k={k} given, wanted 0 <= c <= n and 1 <= k <= n", where="pass@k")
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval for a proportion: the p that |p^ - p| <= z sqrt(p (1-p) / n) does not reject.

    (p^ + z^2/2n -+ z sqrt(p^(1-p^)/n + z^2/4n^2)) / (1 + z^2/n), p^ = successes / n      (Wilson 1927, JASA 22:209)
    Beside p^ -+ 1.96 standard errors: keeps its coverage at small n and never leaves [0, 1].
    Raises DataError unless 0 <= successes <= n, n >= 1 and confidence is in (0, 1).
    """
    if not (0 <= successes <= n and n >= 1):
        raise DataError(f"{successes} of {n} given, wanted 0 <= successes <= n and n >= 1", where="wilson")
    z = _z(confidence)
    p, centre = successes / n, (successes + z * z / 2) / (n + z * z)
    half = z * sqrt(n * p * (1 - p) + z * z / 4) / (n + z * z)
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def accuracy(correct: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Share of correct answers and its Wilson interval. Raises DataError when there are none, or one is not 0 or 1."""
    values = _values(correct, "accuracy")
    if not _binary(values):
        raise DataError("a grade is neither 0 nor 1", where="accuracy", remedy="use bootstrap_mean for partial credit")
    return Estimate(float(values.mean()), *wilson(int(values.sum()), len(values), confidence))


def bootstrap_mean(
    values: Sequence[float], *, seed: int = 0, draws: int = DRAWS, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over items drawn with replacement (Efron 1979, Ann. Stat. 7:1).

    The same seed gives the same interval. Raises DataError when there are no values or one is not finite.
    """
    data = _values(values, "bootstrap_mean")
    tail = (1 - _checked(confidence)) / 2
    rng, means = np.random.default_rng(seed), np.empty(draws)
    step = max(1, _BLOCK // len(data))
    for start in range(0, draws, step):
        block = means[start : start + step]
        block[:] = data[rng.integers(len(data), size=(len(block), len(data)))].mean(axis=1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_test(a: Sequence[float], b: Sequence[float], *, seed: int = 0, draws: int = DRAWS) -> float:
    """Two-sided p-value that a and b, graded on the same items in the same order, have the same mean.

    0/1 grades: exact McNemar, of n discordant items either side wins Binomial(n, 1/2):
        p = min(1, 2 P[X <= min(wins_a, wins_b)])      (McNemar 1947, Psychometrika 12:153)
    other values: sign-flip permutation of the differences, p = share of sign patterns with |sum| >= the observed; all
    of them up to 14 differences, else `draws` samples and p = (hits + 1) / (draws + 1), never 0    (arXiv:1603.05766)
    Raises DataError when lengths differ, there are no items, or a value is not finite.
    """
    first, second = _pair(a, b)
    if _binary(first) and _binary(second):
        return mcnemar(int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum()))
    difference = first - second
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    observed = abs(difference.sum()) * (1 - 1e-12)  # a pattern equal but for rounding counts as equal
    if len(difference) <= _EXACT_SIGNS:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(difference))))
        return float((np.abs(signs @ difference) >= observed).mean())
    rng, hits = np.random.default_rng(seed), 0
    step = max(1, _BLOCK // len(difference))
    for start in range(0, draws, step):
        signs = rng.integers(0, 2, size=(min(step, draws - start), len(difference)), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ difference) >= observed).sum())
    return (hits + 1) / (draws + 1)


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p-value of `wins` against `losses` on the items where two systems disagree (`paired_test`)."""
    n = wins + losses
    return min(1.0, 2 * sum(comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n)


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95, seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """mean(a) - mean(b) over the same items in the same order, and its interval.

    0/1 grades: Wilson limits squared and added, less the correlation of the pairs:
        d - sqrt(x^2 - 2 phi x y + y^2), x = p_a - low_a, y = high_b - p_b, the upper limit likewise; phi's numerator is
        shrunk by n/2 towards 0 when positive      (method 10 of Newcombe 1998, Stat. Med. 17:2635)
    so the interval has width even where a and b never disagree. Other values: `bootstrap_mean` of the differences.
    Raises DataError as `paired_test`.
    """
    first, second = _pair(a, b)
    difference = first - second
    mean = float(difference.mean())
    if not (_binary(first) and _binary(second)):
        return Estimate(mean, *bootstrap_mean(difference.tolist(), seed=seed, draws=draws, confidence=confidence))
    n, won_a, won_b = len(first), int(first.sum()), int(second.sum())
    both = int((first * second).sum())
    neither, only_a, only_b = n - won_a - won_b + both, won_a - both, won_b - both
    excess = both * neither - only_a * only_b
    excess = max(excess - n / 2, 0) if excess > 0 else excess
    spread = won_a * (n - won_a) * won_b * (n - won_b)
    phi = excess / sqrt(spread) if spread else 0.0
    (low_a, high_a), (low_b, high_b) = wilson(won_a, n, confidence), wilson(won_b, n, confidence)
    p_a, p_b = won_a / n, won_b / n
    down = _add(p_a - low_a, high_b - p_b, phi)
    up = _add(high_a - p_a, p_b - low_b, phi)
    return Estimate(mean, mean - down, mean + up)


def _add(x: float, y: float, phi: float) -> float:
    return sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + _checked(confidence)) / 2)


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise DataError(f"{confidence} given, wanted a number between 0 and 1", where="confidence")
    return confidence


def _values(values: Sequence[float], where: str) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data) or not bool(np.isfinite(data).all()):
        raise DataError("wanted a flat list of finite numbers, at least one", where=where, remedy="drop abstentions")
    return data


def _pair(a: Sequence[float], b: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _values(a, "a"), _values(b, "b")
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} items: a paired comparison needs the same ones", where="a, b")
    return first, second


def _binary(values: NDArray[np.float64]) -> bool:
    return bool(((values == 0) | (values == 1)).all())
