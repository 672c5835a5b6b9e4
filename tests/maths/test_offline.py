"""OREO on a two-step tree whose soft optimum is known, A*-PO at its optimum, minimum risk by enumeration, MIXER."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from burnish.core.errors import ConfigError
from burnish.maths import offline

TIGHT = {"rtol": 1e-9, "atol": 1e-12}
BETA = 0.3
REWARD = torch.tensor([[1.0, 0.0], [0.2, 0.7]], dtype=torch.float64)  # of first and second token


def tree() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(reference, soft-optimal policy) log-probs and soft values, by backward induction.

    Four completions of two tokens; each [4, 2] is of label, values of the state before it; rewards [4].
    """
    g = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(2, generator=g).double().log_softmax(0),
        torch.randn(2, 2, generator=g).double().log_softmax(1),
    )
    v1 = BETA * (second + REWARD / BETA).logsumexp(1)
    v0 = BETA * (first + v1 / BETA).logsumexp(0)
    best1, best0 = second + (REWARD - v1[:, None]) / BETA, first + (v1 - v0) / BETA
    a, b = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    ref, best = torch.stack([first[a], second[a, b]], 1), torch.stack([best0[a], best1[a, b]], 1)
    return ref.flatten(), best.flatten(), torch.stack([v0.expand(4), v1[a]], 1).flatten(), REWARD[a, b]


UNIT = torch.arange(4).repeat_interleave(2)
TOKENS = torch.arange(8)


def test_the_tree_is_a_distribution_and_its_value_the_partition_function() -> None:
    ref, best, value, reward = tree()
    assert_close(best.view(4, 2).sum(1).exp().sum().item(), 1.0)
    total = BETA * (ref.view(4, 2).sum(1) + reward / BETA).logsumexp(0)
    assert_close(value[0], total)


def test_oreo_is_zero_at_the_soft_optimum_at_every_level() -> None:
    ref, best, value, reward = tree()
    for f in (offline.oreo_policy, offline.oreo_value):
        token = f(best, ref, value, reward, TOKENS, UNIT, kl_coef=BETA)
        response = f(best, ref, value[::2], reward, UNIT, torch.arange(4), kl_coef=BETA)
        assert_close(token, torch.zeros(8, dtype=torch.float64), **TIGHT)
        assert_close(response, torch.zeros(4, dtype=torch.float64), **TIGHT)
        assert f(best, ref, value + 0.1, reward, TOKENS, UNIT, kl_coef=BETA).min() > 0.009


def test_oreo_as_a_survey_prints_it_is_not_zero_there() -> None:
    ref, best, value, reward = tree()
    printed = (value - reward[UNIT] + BETA * (best - ref)) ** 2  # without sg[beta sum_(i > t)]
    assert printed.max() > 0.01
    assert_close(printed[1::2], torch.zeros(4, dtype=torch.float64), **TIGHT)  # the last token has no future


def test_oreo_gradients_go_where_they_should() -> None:
    ref, best, value, reward = tree()
    lp, v = (best + 0.1).requires_grad_(), (value + 0.2).requires_grad_()
    policy = offline.oreo_policy(lp, ref, v, reward, TOKENS, UNIT, kl_coef=BETA)
    got_lp, got_v = torch.autograd.grad(policy.sum(), (lp, v), allow_unused=True)
    residual = torch.tensor([0.2 + BETA * 0.2, 0.2 + BETA * 0.1] * 4, dtype=torch.float64)
    assert got_v is None
    assert_close(got_lp, 2 * BETA * residual, **TIGHT)  # each action's own log-prob: the future is held still
    critic = offline.oreo_value(lp, ref, v, reward, TOKENS, UNIT, kl_coef=BETA)
    assert_close(critic, policy)
    got_lp, got_v = torch.autograd.grad(critic.sum(), (lp, v), allow_unused=True)
    assert got_lp is None
    assert_close(got_v, 2 * residual, **TIGHT)


def test_oreo_by_steps_sums_the_tokens_of_a_step() -> None:
    lp, ref = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    action, action_unit = torch.tensor([0, 0, 1]), torch.tensor([0, 0])
    value, reward = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    got = offline.oreo_policy(lp, ref, value, reward, action, action_unit, kl_coef=0.1)
    assert_close(got, torch.tensor([(0.5 - 0.6) ** 2, (1.5 - 0.3) ** 2], dtype=torch.float64))


def test_a_star_is_zero_at_its_optimum_and_only_there() -> None:
    ref, best, value, reward = tree()
    ref, best = ref.view(4, 2).sum(1), best.view(4, 2).sum(1)
    v = offline.soft_value(
        torch.tensor([0.2, 1.0, 0.0, 3.0]),
        torch.tensor([True, True, False, True]),
        torch.tensor([0, 0, 0, 1]),
        value_coef=0.5,
    )
    want = 0.5 * log((2.718281828459045**0.4 + 2.718281828459045**2) / 2)
    assert v.tolist() == pytest.approx([want, want, want, 3.0])
    assert_close(
        offline.a_star(best, ref, reward, value[::2], kl_coef=BETA), torch.zeros(4, dtype=torch.float64), **TIGHT
    )
    assert offline.a_star(ref, ref, reward, value[::2], kl_coef=BETA).max() > 0.01
    many = offline.soft_value(
        torch.tensor([1000.0, 0.0]), torch.tensor([True, True]), torch.tensor([0, 0]), value_coef=0.5
    )
    assert many.tolist() == pytest.approx([1000 - 0.5 * log(2)] * 2)
    assert offline.soft_value(
        torch.ones(1), torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    ).tolist() == [0.0]
    with pytest.raises(ConfigError, match="value_coef"):
        offline.soft_value(reward, reward > 0, UNIT[:4], value_coef=0.0)


def test_minimum_risk_over_every_completion_is_the_expected_cost() -> None:
    z = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    cost, group = torch.arange(5.0).double(), torch.zeros(5, dtype=torch.long)
    risk = offline.minimum_risk(z.log_softmax(0), cost, group, sharpness=1.0).sum()
    exact = (z.softmax(0) * cost).sum()
    assert_close(risk, exact)
    assert_close(torch.autograd.grad(risk, z)[0], torch.autograd.grad(exact, z)[0])


def test_minimum_risk_by_hand() -> None:
    lp = torch.tensor([log(0.1), log(0.4), log(0.2)], dtype=torch.float64)
    got = offline.minimum_risk(lp, torch.tensor([3.0, 6.0, 5.0]).double(), torch.tensor([0, 0, 8]), sharpness=0.5)
    assert_close(got, torch.tensor([1.0, 4.0, 5.0], dtype=torch.float64))  # sqrt(0.1) to sqrt(0.4) is 1 to 2
    far = offline.minimum_risk(
        torch.tensor([-9e4, -9e4]), torch.ones(2), torch.zeros(2, dtype=torch.long), sharpness=1.0
    )
    assert far.tolist() == [0.5, 0.5]


def test_mixer() -> None:
    unit = torch.tensor([0, 0, 0, 3, 3, 7])
    assert offline.mixer(unit, supervised_tokens=2).tolist() == [True, True, False, True, True, True]
    assert (
        not offline.mixer(unit, supervised_tokens=0).any()
        and offline.mixer(unit[:0], supervised_tokens=1).tolist() == []
    )
    seen = [offline.mixer_tokens(s, longest=5, warmup=2, period=3, fewer=2) for s in range(10)]
    assert seen == [5, 5, 3, 3, 3, 1, 1, 1, 0, 0]
    with pytest.raises(ConfigError, match="supervised_tokens"):
        offline.mixer(unit, supervised_tokens=-1)
