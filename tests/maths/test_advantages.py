"""Advantages: numbers worked by hand, enumeration, limits, and what abstaining does."""

from __future__ import annotations

from itertools import combinations
from math import sqrt

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from burnish.core.errors import ConfigError, DataError
from burnish.core.table import describe
from burnish.maths import advantages as rows
from burnish.maths.units import suffix_sum

GROUP = torch.tensor([5, 5, 5, 9, 9, 9])
KNOWN = torch.ones(6, dtype=torch.bool)
REWARD = torch.tensor([1.0, 0.0, 2.0, 4.0, 4.0, 1.0], dtype=torch.float64)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand() -> None:
    assert_close(rows.none(REWARD, KNOWN), REWARD)
    assert_close(rows.batch_mean(REWARD, KNOWN), REWARD - 2)
    assert_close(rows.group_centred(REWARD, KNOWN, GROUP), t(0, -1, 1, 1, 1, -2))
    assert_close(rows.leave_one_out(REWARD, KNOWN, GROUP), t(0, -1.5, 1.5, 1.5, 1.5, -3))
    got = rows.group_standardised(REWARD, KNOWN, GROUP, epsilon=0.0)
    assert_close(got, t(0, -1, 1, 1 / sqrt(3), 1 / sqrt(3), -2 / sqrt(3)))  # deviations 1 and sqrt(3), over n - 1
    assert_close(rows.group_standardised(REWARD, KNOWN, GROUP)[1].item(), -1 / 1.0001)
    assert_close(rows.greedy_baseline(REWARD, KNOWN, t(1, 1, 1, 2, 2, 2)), t(0, -1, 1, 2, 2, -1))
    length = torch.tensor([1, 2, 3, 2, 2, 6])  # baselines (1 + 0 + 6) / 6 and (8 + 8 + 6) / 10
    assert_close(
        rows.length_weighted_optimal(REWARD, KNOWN, GROUP, length), REWARD - t(7 / 6, 7 / 6, 7 / 6, 2.2, 2.2, 2.2)
    )
    assert_close(
        rows.length_weighted_optimal(REWARD, KNOWN, GROUP, torch.full((6,), 4)),
        rows.group_centred(REWARD, KNOWN, GROUP),
    )


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    for i in range(6):
        others = [j for j in range(6) if GROUP[j] == GROUP[i] and j != i]
        assert_close(rows.leave_one_out(REWARD, KNOWN, GROUP)[i], REWARD[i] - REWARD[others].mean())


def test_the_moving_average_is_of_earlier_batches_and_unbiased_at_the_start() -> None:
    trace = t(0, 0)
    assert_close(rows.ema(REWARD, KNOWN, trace), REWARD)
    trace = rows.next_trace(trace, REWARD, KNOWN, decay=0.9)
    assert_close(rows.ema(REWARD, KNOWN, trace), REWARD - 2.0)  # not 0.1 * 2
    trace = rows.next_trace(trace, REWARD + 10, KNOWN, decay=0.9)
    assert_close(rows.ema(REWARD, KNOWN, trace)[0].item(), 1 - (0.9 * 0.1 * 2 + 0.1 * 12) / (0.9 * 0.1 + 0.1))
    assert rows.next_trace(trace, REWARD, ~KNOWN) is trace
    with pytest.raises(ConfigError, match="decay"):
        rows.next_trace(trace, REWARD, KNOWN, decay=1.0)


GROUPED = ("leave_one_out", "group_centred", "group_standardised")


@pytest.mark.parametrize("row", GROUPED)
def test_equal_rewards_and_lone_samples_are_exactly_zero(row: str) -> None:
    f = rows.ADVANTAGES[row]
    equal = torch.full((6,), 0.9)  # the mean of three of them is not 0.9 in fp32
    assert f(equal, KNOWN, GROUP).tolist() == [0.0] * 6
    assert f(REWARD[:1], KNOWN[:1], GROUP[:1]).tolist() == [0.0]  # verl: the raw reward
    alone = torch.tensor([True, False, False, True, True, True])
    assert f(REWARD, alone, GROUP)[:3].tolist() == [0.0] * 3


@pytest.mark.parametrize("row", [*GROUPED, "none", "batch_mean"])
def test_what_is_not_known_may_be_anything_and_counts_nowhere(row: str) -> None:
    f, known = rows.ADVANTAGES[row], torch.tensor([True, True, True, True, False, True])
    nan = torch.where(known, REWARD, float("nan"))
    extra = (GROUP,) if row in GROUPED else ()
    got = f(nan, known, *extra)
    want = f(REWARD[known], KNOWN[known], *(x[known] for x in extra))
    assert got[4] == 0 and not got.isnan().any()
    assert_close(got[known], want)


def test_rewards_apart_keep_what_their_sum_loses() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64) * t(1.0, 0.01)
    known, group = torch.ones(4, 2, dtype=torch.bool), torch.zeros(4, dtype=torch.long)
    got = rows.per_reward_normalised(rewards, known, group, t(1, 1), epsilon=0.0)
    z = 0.5 / sqrt(1 / 3)  # either reward, in its own deviations
    s = t(0, 0, 2 * z, -2 * z)
    assert_close(got, s / s.std())
    summed = rows.group_standardised(rewards.sum(1), torch.ones(4, dtype=torch.bool), group)
    assert summed[2] - summed[0] < 0.02 * (summed[0] - summed[1])  # the small reward is drowned
    assert_close(
        rows.per_reward_normalised(rewards, known, group, t(1, 0), epsilon=0.0),
        t(z, -z, z, -z) / (t(z, -z, z, -z)).std(),
    )
    partly = known.clone()
    partly[0, 1] = False
    got = rows.per_reward_normalised(torch.where(partly, rewards, float("nan")), partly, group, t(1, 1))
    assert got.isfinite().all() and got.sum().abs() < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_is_the_average_over_all_subsets(k: int) -> None:
    for right in range(6):
        reward = torch.tensor([1.0] * right + [0.0] * (5 - right), dtype=torch.float64)
        known, group = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.long)
        got = rows.pass_at_k(reward, known, group, pass_k=k)
        subsets = list(combinations(range(5), k))
        best = torch.stack([reward[list(s)].max() for s in subsets])
        centred = best - best.mean()
        for i in range(5):
            mine = torch.tensor([i in s for s in subsets])
            spread = best.std(unbiased=False)
            assert_close(got[i], (centred[mine].mean() / spread) if spread > 0 else t(0)[0])


def test_pass_at_k_refuses() -> None:
    with pytest.raises(DataError, match="neither 0 nor 1"):
        rows.pass_at_k(REWARD, KNOWN, GROUP)
    with pytest.raises(ConfigError, match="smallest group has 3"):
        rows.pass_at_k((REWARD > 1).double(), KNOWN, GROUP, pass_k=4)


# ---- by token -------------------------------------------------------------------------------------------------------

UNIT = torch.tensor([0, 0, 0, 2, 3, 3])
PAID = t(0, 1, 2, 5, 0, -1)
VALUES = t(0.5, 0.25, 1, 3, 2, 4)


def test_suffix_sums_stay_in_their_unit() -> None:
    assert_close(suffix_sum(PAID, UNIT), t(3, 3, 2, 5, -1, -1))
    assert_close(suffix_sum(PAID, UNIT, 0.5), t(0.5 + 0.5, 2, 2, 5, -0.5, -1))
    assert suffix_sum(PAID[:0], UNIT[:0]).tolist() == []
    assert_close(rows.to_go(PAID, UNIT, gamma=0.5), suffix_sum(PAID, UNIT, 0.5))


def test_gae_at_its_ends_and_by_hand() -> None:
    for gamma in (1.0, 0.9):
        returns = suffix_sum(PAID, UNIT, gamma)
        assert_close(rows.gae(PAID, VALUES, UNIT, gamma=gamma, lam=1.0), returns - VALUES)
        following = t(0.25, 1, 0, 0, 4, 0)
        assert_close(rows.gae(PAID, VALUES, UNIT, gamma=gamma, lam=0.0), PAID + gamma * following - VALUES)
    got = rows.gae(PAID, VALUES, UNIT, gamma=1.0, lam=0.5)
    assert_close(got, t(-0.25 + 0.5 * (1.75 + 0.5 * 1), 1.75 + 0.5, 1, 2, 2 + 0.5 * -5, -5))


def test_gae_of_one_unit_does_not_see_the_others() -> None:
    whole = rows.gae(PAID, VALUES, UNIT)
    for unit in UNIT.unique():
        here = unit == UNIT
        assert_close(rows.gae(PAID[here], VALUES[here], UNIT[here]), whole[here])
        other = torch.where(here, VALUES, 1e6)
        assert_close(rows.gae(PAID, other, UNIT)[here], whole[here])


def test_process_credit_by_hand() -> None:
    unit, group = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0])
    ends, reward = torch.tensor([1, 2, 4]), t(1, 0, 2)  # two steps, then one; over all three: mean 1, deviation 1
    got = rows.process(reward, torch.ones(3, dtype=torch.bool), ends, group, unit, epsilon=0.0)
    assert_close(got, t(0 - 1, 0 - 1, -1, 1, 1))
    outcome = rows.process(t(3, 5), KNOWN[:2], torch.tensor([2, 4]), group, unit)
    assert_close(outcome, rows.group_standardised(t(3, 5), KNOWN[:2], group)[unit])
    with pytest.raises(DataError, match=r"outside entries 0 \.\. 4"):
        rows.process(reward, torch.ones(3, dtype=torch.bool), ends + 1, group, unit)


def test_whitening() -> None:
    counted = torch.tensor([True, True, True, False])
    got = rows.whiten(t(1, 2, 3, 100), counted, epsilon=0.0)
    assert_close(got, t(-1, 0, 1, 0))
    assert rows.whiten(torch.full((3,), 0.1), counted[:3]).tolist() == [0.0] * 3


def test_epsilon_is_one_number() -> None:
    found = {p.default for row in describe("advantage").values() for p in row.parameters if p.name == "epsilon"}
    assert found == {1e-4} == {rows.whiten.__kwdefaults__["epsilon"]}
