"""Estimators against enumeration, direct sums, coverage and published worked examples."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations, product
from math import comb, sqrt

import numpy as np
import pytest

from burnish.core.errors import DataError
from burnish.maths.estimators import (
    Estimate,
    accuracy,
    bootstrap_mean,
    mcnemar,
    paired_difference,
    paired_test,
    pass_at_k,
    wilson,
)


def table(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[int], list[int]]:
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    return a, b


# ---- pass@k ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_equals_enumeration(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(max, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not() -> None:
    p, n, k = 0.3, 6, 3
    mass = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(m * pass_at_k(n, c, k) for c, m in enumerate(mass)) == pytest.approx(truth, abs=1e-14)
    assert sum(m * (1 - (1 - c / n) ** k) for c, m in enumerate(mass)) < truth - 0.02


def test_pass_at_k_is_monotone_bounded_and_exact_at_large_n() -> None:
    values = [pass_at_k(50, 3, k) for k in range(1, 51)]
    assert values == sorted(values) and values[0] > 0 and values[-1] == 1.0
    assert pass_at_k(10, 0, 5) == 0.0
    assert pass_at_k(9, 4, 1) == pytest.approx(4 / 9)
    assert pass_at_k(100_000, 1, 1) == 1e-5  # 1 - (1 - 1e-5) in floats is not
    assert pass_at_k(3000, 1, 1500) == 0.5


@pytest.mark.parametrize("n, c, k", [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)])
def test_pass_at_k_refuses(n: int, c: int, k: int) -> None:
    with pytest.raises(DataError, match="wanted"):
        pass_at_k(n, c, k)


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_wilson_published_examples() -> None:
    # Newcombe 1998, Stat. Med. 17:857, table I, method 3
    for (successes, n), want in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(successes, n) == pytest.approx(want, abs=5e-5)


def test_wilson_limits_solve_the_score_equation() -> None:
    z = 1.6448536269514722
    for limit in wilson(7, 19, confidence=0.9):
        assert abs(7 / 19 - limit) == pytest.approx(z * sqrt(limit * (1 - limit) / 19))


def test_wilson_is_symmetric_ordered_and_inside_the_unit_interval() -> None:
    for n in (1, 5, 30):
        for s in range(n + 1):
            low, high = wilson(s, n)
            assert 0 <= low <= s / n <= high <= 1
            assert (1 - high, 1 - low) == pytest.approx(wilson(n - s, n))
            assert wilson(s, n, 0.5)[0] >= low and wilson(s, n, 0.5)[1] <= high


@pytest.mark.parametrize("n", [5, 10, 20])
def test_wilson_covers_at_small_n(n: int) -> None:
    grid = np.linspace(0.02, 0.98, 97)
    coverage = []
    for p in grid:
        inside = (s for s in range(n + 1) if wilson(s, n)[0] <= p <= wilson(s, n)[1])
        coverage.append(sum(comb(n, s) * p**s * (1 - p) ** (n - s) for s in inside))
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.015)
    assert min(coverage) > 0.83  # Brown, Cai and DasGupta 2001: dips near the ends, unlike Wald's to 0
    rng = np.random.default_rng(0)  # and by simulation, through `accuracy`
    hits = 0
    for sample in (rng.random((2000, n)) < 0.3).astype(int):
        found = accuracy(sample.tolist())
        hits += found.low <= 0.3 <= found.high
    exact = coverage[int(np.argmin(abs(grid - 0.3)))]
    assert hits / 2000 == pytest.approx(exact, abs=0.03)


def test_accuracy_is_the_share_with_its_interval() -> None:
    assert accuracy([1, 0, 1, 1]) == Estimate(0.75, *wilson(3, 4))
    with pytest.raises(DataError, match="neither 0 nor 1"):
        accuracy([1, 0.5])
    with pytest.raises(DataError, match="at least one"):
        accuracy([])


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, size=400).tolist()
    low, high = bootstrap_mean(values, seed=7)
    assert (low, high) == bootstrap_mean(values, seed=7) != bootstrap_mean(values, seed=8)
    half = 1.96 * np.std(values) / 20
    assert low == pytest.approx(np.mean(values) - half, abs=0.01)
    assert high == pytest.approx(np.mean(values) + half, abs=0.01)
    narrow = bootstrap_mean(values, seed=7, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_mean([3.0, 3.0]) == (3.0, 3.0)


def test_bootstrap_of_three_values_equals_enumeration() -> None:
    values = [0.0, 1.0, 5.0]
    means = sorted(sum(draw) / 3 for draw in product(values, repeat=3))
    low, high = bootstrap_mean(values, seed=0, draws=60_000, confidence=0.8)
    assert low == pytest.approx(means[2]) and high == pytest.approx(means[24])  # of 27: no atom straddles 10 % or 90 %


def test_intervals_refuse() -> None:
    for bad in (lambda: wilson(1, 0), lambda: wilson(3, 2), lambda: wilson(1, 2, 1.0), lambda: bootstrap_mean([])):
        with pytest.raises(DataError):
            bad()
    with pytest.raises(DataError, match="finite"):
        bootstrap_mean([1.0, float("nan")])


# ---- paired ---------------------------------------------------------------------------------------------------------


def test_mcnemar_equals_the_binomial_sum() -> None:
    for wins, losses in product(range(9), repeat=2):
        n = wins + losses
        at_least_as_extreme = [i for i in range(n + 1) if abs(i - n / 2) >= abs(wins - n / 2)]
        want = sum(comb(n, i) for i in at_least_as_extreme) / 2**n
        assert mcnemar(wins, losses) == pytest.approx(want) == mcnemar(losses, wins)


def test_paired_test_of_grades_is_mcnemar_on_the_discordant() -> None:
    assert paired_test(*table(20, 12, 2, 16)) == pytest.approx(0.0129, abs=5e-5)  # Armitage and Berry 1994, p. 127
    assert paired_test(*table(0, 12, 2, 900)) == paired_test(*table(20, 12, 2, 16))
    assert paired_test([1, 0, 1], [1, 0, 1]) == 1.0


def test_sign_flip_equals_enumeration() -> None:
    a, b = [1.5, 2.0, -0.5, 4.0, 0.0], [1.0, 0.5, 0.25, 1.0, 0.0]
    d = [x - y for x, y in zip(a, b)]
    sums = [abs(sum(s * x for s, x in zip(signs, d))) for signs in product((-1, 1), repeat=5)]
    assert paired_test(a, b) == np.mean([s >= abs(sum(d)) - 1e-12 for s in sums]) == paired_test(b, a)
    assert paired_test([0.5, 0.25], [0.5, 0.25]) == 1.0


def test_sign_flip_on_grades_agrees_with_mcnemar() -> None:
    a, b = table(3, 9, 2, 4)
    tenth = [x / 10 for x in a], [x / 10 for x in b]
    assert paired_test(*tenth) == pytest.approx(paired_test(a, b))


def test_sampled_sign_flip_is_near_the_normal_tail_seeded_and_never_zero() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=200)
    noise = (noise - noise.mean()) / np.sqrt((noise**2).mean())
    shifted = noise + 2 / sqrt(200)  # z = 2 / sqrt(1 + 4/200)
    p = paired_test(shifted.tolist(), [0.0] * 200, seed=5, draws=20_000)
    assert p == pytest.approx(0.0477, abs=0.006)
    assert p == paired_test(shifted.tolist(), [0.0] * 200, seed=5, draws=20_000)
    assert paired_test([float(i) for i in range(1, 40)], [0.0] * 39, draws=999) == 1 / 1000


def test_paired_test_keeps_its_level_under_the_null() -> None:
    rng = np.random.default_rng(2)
    p = np.array([paired_test(x, y) for x, y in zip(rng.normal(size=(400, 8)), rng.normal(size=(400, 8)))])
    assert (p <= 0.05).mean() < 0.08 and (p <= 0.5).mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    "counts, mean, low, high",
    [
        ((59, 6, 16, 80), -0.0621, -0.1186, -0.0046),  # Cavo et al. 2012 in Fagerland et al., chapter 8
        ((14, 5, 0, 22), 0.122, 0.011, 0.226),  # Altman et al. 2000, Statistics with confidence, p. 52
    ],
)
def test_newcombe_published_examples(counts: tuple[int, int, int, int], mean: float, low: float, high: float) -> None:
    digits = 5e-5 if abs(low) > 0.1 else 5e-4
    found = paired_difference(*table(*counts))
    assert (found.mean, found.low, found.high) == pytest.approx((mean, low, high), abs=digits)


def test_paired_difference_laws_for_grades() -> None:
    for counts in product(range(4), repeat=4):
        if not sum(counts):
            continue
        a, b = table(*counts)
        forward, back = paired_difference(a, b), paired_difference(b, a)
        assert -1 - 1e-12 <= forward.low <= forward.mean <= forward.high <= 1 + 1e-12
        assert (back.mean, -back.high, -back.low) == pytest.approx((-forward.mean, forward.low, forward.high))
    same = paired_difference(*table(3, 0, 0, 3))
    assert same.mean == 0 and same.low < -0.05 and same.high > 0.05  # six items that agree do not prove equality


def test_paired_difference_of_grades_covers() -> None:
    rng = np.random.default_rng(4)
    cells = np.array([0.35, 0.25, 0.1, 0.3])
    hits = 0
    for counts in rng.multinomial(30, cells, size=2000):
        found = paired_difference(*table(*counts))
        hits += found.low <= 0.15 <= found.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)


def test_paired_difference_of_values_is_the_bootstrap_of_differences() -> None:
    a, b = [0.5, 1.5, 2.0, 0.1], [0.25, 1.0, 2.5, 0.0]
    found = paired_difference(a, b, seed=3, draws=500)
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert (found.low, found.high) == bootstrap_mean([x - y for x, y in zip(a, b)], seed=3, draws=500)


def test_paired_refuses_different_items() -> None:
    for function in (paired_test, paired_difference):
        with pytest.raises(DataError, match="same ones"):
            function([1, 0], [1])


def test_statistics_and_votes_do_not_load_torch() -> None:
    code = "import sys, burnish.maths.estimators, burnish.maths.votes; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
