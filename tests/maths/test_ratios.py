"""Ratios and corrections: by hand, their gradients, their limits."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from burnish.core.errors import ConfigError
from burnish.maths import ratios
from burnish.maths.surrogates import clip

UNIT = torch.tensor([0, 0, 0, 4])
OLD = torch.tensor([-1.0, -2.0, -3.0, -0.5], dtype=torch.float64)
MOVED = torch.tensor([0.3, -0.6, 0.9, 0.2], dtype=torch.float64)


def slope(f, *args: Tensor) -> tuple[Tensor, Tensor]:
    """(log-ratio, d sum(i-th entry times (i + 1)) / d log-prob)."""
    lp = (OLD + MOVED).requires_grad_()
    value = f(lp, *args)
    return value.detach(), torch.autograd.grad((value * torch.arange(1, 5)).sum(), lp)[0]


def test_by_hand() -> None:
    one = torch.ones(4, dtype=torch.float64)
    value, grad = slope(ratios.none)
    assert value.tolist() == [0] * 4
    assert_close(grad, torch.arange(1, 5).double())
    value, grad = slope(ratios.token, OLD)
    assert_close(value, MOVED)
    assert_close(grad, torch.arange(1, 5).double())
    value, grad = slope(ratios.sequence, OLD, UNIT)
    assert_close(value, torch.tensor([0.2, 0.2, 0.2, 0.2], dtype=torch.float64))
    assert_close(grad, torch.tensor([2.0, 2.0, 2.0, 4.0], dtype=torch.float64))  # (1 + 2 + 3) / 3 each
    value, grad = slope(ratios.sequence_token, OLD, UNIT)
    assert_close(value, 0.2 * one)
    assert_close(grad, torch.arange(1, 5).double())


def test_gspo_and_gspo_token_have_one_loss_and_gradient_where_advantages_are_outcomes() -> None:
    advantage, weight = torch.tensor([2.0, 2.0, 2.0, -1.0]), torch.tensor([1 / 6] * 3 + [1 / 2])
    found = []
    for f in (ratios.sequence, ratios.sequence_token):
        lp = (OLD + MOVED).requires_grad_()
        loss = (weight * clip(f(lp, OLD, UNIT), advantage, clip_high=0.5, clip_low=0.5)).sum()
        found.append((loss.detach(), torch.autograd.grad(loss, lp)[0]))
    assert_close(found[0], found[1])
    assert found[0][1].abs().min() > 0.01


def test_one_token_makes_the_sequence_ratio_the_tokens() -> None:
    unit = torch.arange(4)
    assert_close(ratios.sequence(OLD + MOVED, OLD, unit), ratios.token(OLD + MOVED, OLD))


SAMPLER = OLD - torch.tensor(
    [log(3.0), log(0.25), log(1.5), log(8.0)], dtype=torch.float64
)  # old / sampler: 3, .25, 1.5, 8


def test_corrections_by_hand() -> None:
    def d(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    assert_close(ratios.uncorrected(UNIT), d(1, 1, 1, 1))
    assert_close(ratios.truncated(OLD, SAMPLER), d(2, 0.25, 1.5, 2))
    assert_close(ratios.masked(OLD, SAMPLER), d(3, 0, 1.5, 0))
    assert_close(ratios.sequence_truncated(OLD, SAMPLER, UNIT), d(1.125, 1.125, 1.125, 2))
    assert_close(ratios.sequence_masked(OLD, SAMPLER, UNIT), d(1.125, 1.125, 1.125, 0))
    assert_close(ratios.sequence_masked(OLD, SAMPLER, UNIT, correction_low=1.2, correction_high=9.0), d(0, 0, 0, 8))


@pytest.mark.parametrize("row", ["truncated", "masked", "sequence_truncated", "sequence_masked"])
def test_no_mismatch_is_no_correction_and_bounds_are_checked(row: str) -> None:
    f = ratios.CORRECTIONS[row]
    unit = (UNIT,) if row.startswith("sequence") else ()
    assert f(OLD, OLD, *unit).tolist() == [1.0] * 4
    with pytest.raises(ConfigError, match="correction_high"):
        f(OLD, OLD, *unit, correction_high=0.0)


def test_an_uncut_weight_makes_the_samplers_expectation_the_trainers() -> None:
    """Sum over a vocabulary: E_sampler[w f] = E_old[f]; cut at 1.2 it is not."""
    g = torch.Generator().manual_seed(0)
    old, sampler = torch.randn(2, 7, generator=g, dtype=torch.float64).log_softmax(1)
    f = torch.arange(7.0).double()
    free = ratios.truncated(old, sampler, correction_high=exp(20))
    assert_close((sampler.exp() * free * f).sum(), (old.exp() * f).sum())
    cut = ratios.truncated(old, sampler, correction_high=1.2)
    assert abs(float((sampler.exp() * cut * f).sum() - (old.exp() * f).sum())) > 0.01
