"""KL estimators by enumeration: value, gradient in the loss, gradient in the reward; controllers; covariance."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from burnish.core.errors import ConfigError
from burnish.maths import divergences as kl
from burnish.maths.divergences import KLS

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
G = torch.Generator().manual_seed(0)
LOGITS = torch.randn(9, generator=G, dtype=torch.float64)
REF, OLD = torch.randn(2, 9, generator=G, dtype=torch.float64).log_softmax(1)


def exact(which: str) -> tuple[Tensor, Tensor]:
    """KL(p || ref), or KL(ref || p), and its gradient by the logits of p."""
    z = LOGITS.clone().requires_grad_()
    p = z.log_softmax(0)
    value = (p.exp() * (p - REF)).sum() if which == "reverse" else (REF.exp() * (REF - p)).sum()
    return value.detach(), torch.autograd.grad(value, z)[0]


def in_loss(row: str, sampler: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Expectation over tokens of the sampler (None: p itself) of the estimate and of its own derivative."""
    z = LOGITS.clone().requires_grad_()
    p = z.log_softmax(0)
    probability = (p.detach() if sampler is None else sampler).exp()
    extra = (p - (p.detach() if sampler is None else sampler),) if row == "k3_unbiased" else ()
    value = (probability * KLS[row](p, REF, *extra)).sum()
    return value.detach(), torch.autograd.grad(value, z)[0]


def in_reward(row: str) -> Tensor:
    """Expectation over tokens of p of estimate * d log p."""
    z = LOGITS.clone().requires_grad_()
    p = z.log_softmax(0)
    return torch.autograd.grad((p.detach().exp() * KLS[row](p, REF).detach() * p).sum(), z)[0]


def test_values() -> None:
    want = exact("reverse")[0]
    assert_close(kl.exact_kl(LOGITS.log_softmax(0)[None], REF[None])[0], want, **TIGHT)
    for row in ("k1", "k3", "k3_unbiased"):
        assert_close(in_loss(row)[0], want, **TIGHT)
    assert abs(in_loss("k2")[0] - want) > 0.05
    assert_close(in_loss("k3_unbiased", OLD)[0], want, **TIGHT)
    assert abs(in_loss("k3", OLD)[0] - want) > 0.05  # tokens of another policy, no ratio
    p = LOGITS.log_softmax(0)
    assert bool((kl.k3(p, REF) >= 0).all() and (kl.k2(p, REF) >= 0).all()) and bool((kl.k1(p, REF) < 0).any())
    assert kl.k3(torch.tensor([-1e-8]), torch.tensor([0.0])).item() >= 0  # e^x - 1 - x would be rounding


def test_what_each_pulls_to_in_the_loss() -> None:
    reverse, forward = exact("reverse")[1], exact("forward")[1]
    assert_close(in_loss("k1")[1], torch.zeros(9, dtype=torch.float64), **TIGHT)
    assert_close(in_loss("k2")[1], reverse, **TIGHT)
    assert_close(in_loss("k3")[1], forward, **TIGHT)
    assert_close(in_loss("k3_unbiased")[1], reverse, **TIGHT)
    assert_close(in_loss("k3_unbiased", OLD)[1], reverse, **TIGHT)
    assert (forward - reverse).norm() > 0.1 * reverse.norm()


def test_only_k1_belongs_in_the_reward() -> None:
    reverse = exact("reverse")[1]
    assert_close(in_reward("k1"), reverse, **TIGHT)
    for row in ("k2", "k3"):
        assert (in_reward(row) - reverse).norm() > 0.05 * reverse.norm()


def test_exact_divergences() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    q = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    assert kl.exact_kl(p, q).item() == pytest.approx(log(2)) and kl.exact_kl(q, p).item() == float("inf")
    assert kl.exact_jsd(p, q).item() == pytest.approx(kl.exact_jsd(q, p).item())
    apart = torch.eye(2, dtype=torch.float64).log()
    assert kl.exact_jsd(apart[:1], apart[1:]).item() == pytest.approx(log(2))
    assert kl.exact_jsd(p, p).item() == pytest.approx(0)


def test_placed_in_the_reward() -> None:
    unit, reward = torch.tensor([0, 0, 2]), torch.tensor([1.0, 9.0, 2.0])  # unit 1 has no labels
    assert kl.token_rewards(reward, unit).tolist() == [0, 1, 2]
    columns = {"unit": unit, "reward": reward}
    got = kl.with_kl(columns, torch.tensor([1.0, -2.0, 3.0]), 0.5)
    assert got["token_reward"].tolist() == [-0.5, 2.0, 0.5] and got["reward"].tolist() == [1.5, 9.0, 0.5]
    paid = kl.with_kl({"unit": unit, "token_reward": torch.tensor([1.0, 1.0, 1.0])}, torch.ones(3), 0.5)
    assert paid.keys() == {"token_reward"} and paid["token_reward"].tolist() == [0.5, 0.5, 0.5]


def test_controllers() -> None:
    assert kl.proportional_coef(0.2, 6.3, target=6.0) == pytest.approx(0.2 * (1 + 0.1 * 0.05))
    assert kl.proportional_coef(0.2, 60.0, target=6.0) == pytest.approx(0.2 * 1.02)
    assert kl.proportional_coef(0.2, 0.0, target=6.0) == pytest.approx(0.2 * 0.98)
    assert kl.doubling_coef(1.0, 0.016, target=0.01) == 2.0 and kl.doubling_coef(1.0, 0.006, target=0.01) == 0.5
    assert kl.doubling_coef(1.0, 0.012, target=0.01) == 1.0
    coef = 0.01
    for _ in range(2000):  # a plant whose KL falls with the coefficient: it settles at the target
        coef = kl.proportional_coef(coef, 0.5 / (1 + 10 * coef), target=0.1)
    assert 0.5 / (1 + 10 * coef) == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(ConfigError, match="positive"):
        kl.proportional_coef(0.0, 1.0, target=1.0)


def test_covariance_is_what_a_step_takes_from_the_entropy() -> None:
    """Tabular softmax: d H / d step along the *natural* gradient = - Cov(log p, A), by finite differences."""
    z, advantage = LOGITS, torch.randn(9, generator=G, dtype=torch.float64)

    def entropy(z: Tensor) -> Tensor:
        p = z.log_softmax(0)
        return -(p.exp() * p).sum()

    eps, p = 1e-6, z.log_softmax(0)
    change = (entropy(z + eps * advantage) - entropy(z - eps * advantage)) / (2 * eps)
    mean = (p.exp() * p).sum(), (p.exp() * advantage).sum()
    assert_close(change, -(p.exp() * (p - mean[0]) * (advantage - mean[1])).sum(), rtol=1e-6, atol=1e-8)


def test_the_highest_covariances_are_chosen() -> None:
    lp, a = torch.tensor([-1.0, -5.0, -1.0, -5.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert kl.covariance(lp, a).tolist() == [2.0, -2.0, -2.0, 2.0]
    assert kl.high_covariance(lp, a, cov_share=0.5).tolist() == [True, False, False, True]
    assert kl.high_covariance(lp, a, cov_share=1.0).tolist() == [True, False, False, True]  # never a negative one
    assert kl.high_covariance(lp, a, cov_share=1e-4).sum() == 1
    assert not kl.high_covariance(lp, torch.ones(4)).any()
    with pytest.raises(ConfigError, match="share"):
        kl.high_covariance(lp, a, cov_share=0.0)
