"""Surrogates: by hand, on both sides of their limits, for both signs of the advantage."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from burnish.core.errors import ConfigError
from burnish.maths import surrogates as rows
from burnish.maths.surrogates import SURROGATES


def at(
    f, ratio: list[float], advantage: list[float], *extra: Tensor, **options: float
) -> tuple[list[float], list[float]]:
    """(loss, d loss / d log-ratio)."""
    log_ratio = torch.tensor([log(r) for r in ratio], dtype=torch.float64, requires_grad=True)
    loss = f(log_ratio, torch.tensor(advantage, dtype=torch.float64), *extra, **options)
    return loss.tolist(), torch.autograd.grad(loss.sum(), log_ratio)[0].tolist()


def test_clip_keeps_the_gradient_that_leads_back() -> None:
    loss, grad = at(rows.clip, [1.1, 1.5, 0.5, 1.5, 0.5], [1, 1, 1, -1, -1], clip_low=0.2, clip_high=0.3)
    assert loss == pytest.approx([-1.1, -1.3, -0.5, 1.5, 0.8])
    assert grad == pytest.approx([-1.1, 0, -0.5, 1.5, 0])
    _, grad = at(rows.clip, [1.25], [1], clip_low=0.2, clip_high=0.28)
    assert grad == pytest.approx([-1.25])  # clip-higher: still free


def test_dual_clip_bounds_what_a_bad_token_costs() -> None:
    loss, grad = at(rows.dual_clip, [2.0, 5.0, 5.0], [-1, -1, 1], dual_clip=3.0)
    assert loss == pytest.approx([2, 3, -1.2]) and grad == pytest.approx([2, 0, 0])
    ratio, advantage = [0.3, 0.9, 1.1, 4.0] * 2, [1.0] * 4 + [-2.0] * 4
    assert at(rows.dual_clip, ratio, advantage, dual_clip=1e9) == at(rows.clip, ratio, advantage)


def test_cispo_keeps_every_gradient() -> None:
    lp = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    old = lp.detach() - torch.tensor([0.0, log(3.0), log(50.0)], dtype=torch.float64)
    loss = rows.cispo(lp - old, torch.tensor([1.0, -2.0, 1.0]), lp, ratio_max=5.0)
    assert loss.tolist() == pytest.approx([1, -12, 15])
    assert torch.autograd.grad(loss.sum(), lp)[0].tolist() == pytest.approx([-1, 6, -5])


def test_sapo_by_hand() -> None:
    loss, grad = at(rows.sapo, [1.0, 2.0, 2.0], [1, 1, -1])
    gate = [1 / (1 + exp(-t)) for t in (0.0, 1.0, 1.05)]
    assert loss == pytest.approx([-4 * gate[0], -4 * gate[1], 4 / 1.05 * gate[2]])
    assert grad == pytest.approx([-1, -8 * gate[1] * (1 - gate[1]), 8 * gate[2] * (1 - gate[2])])


def test_gmpo_by_hand() -> None:
    unit = torch.tensor([0, 0, 1, 1])
    loss, grad = at(rows.gmpo, [exp(0.2), exp(0.8), exp(0.8), exp(-0.8)], [2, 2, -1, -1], unit)
    up, down = exp((0.2 + 0.4) / 2), exp((0.8 - 0.4) / 2)
    assert loss == pytest.approx([-2 * up] * 2 + [down] * 2)
    assert grad == pytest.approx([-2 * up, 0, down, 0])  # summed over two entries, each with half
    plain = at(rows.gmpo, [1.2, 1.3, 0.9, 0.8], [2, 2, -1, -1], unit, log_clip=9.0)[0]
    assert plain == pytest.approx([-2 * (1.2 * 1.3) ** 0.5] * 2 + [(0.9 * 0.8) ** 0.5] * 2)


def test_vespo_is_a_gamma_curve_with_its_maximum_at_shape_over_rate() -> None:
    lp, unit = torch.zeros(1, dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.long)

    def weight(w: float) -> float:
        loss = rows.vespo(torch.tensor([log(w)]).double(), torch.ones(1), lp, unit)
        return -torch.autograd.grad(loss.sum(), lp)[0].item()

    assert weight(1.0) == pytest.approx(1.0) and weight(0.5) == pytest.approx(0.5**2 * exp(1.5))
    assert weight(2 / 3) > max(weight(2 / 3 - 0.01), weight(2 / 3 + 0.01))


def test_penalties_by_hand() -> None:
    loss, grad = at(rows.kl_penalty, [2.0, 1.0], [1, 1], penalty_coef=0.5)
    assert loss == pytest.approx([-2 + 0.5 * (1 - log(2)), -1]) and grad == pytest.approx([-2 + 0.5, -1])
    chosen = torch.tensor([True, False, True])
    loss, grad = at(rows.kl_cov, [2.0, 2.0, 1.0], [1, 1, 1], chosen, cov_penalty=3.0)
    assert loss == pytest.approx([-2 + 3 * log(2), -2, -1]) and grad == pytest.approx([-2 + 3, -2, -1])


def test_the_penalty_is_the_exact_kl_in_value_and_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    old, z = torch.randn(2, 6, generator=g, dtype=torch.float64)
    old, z = old.log_softmax(0), z.requires_grad_()
    estimate = (old.exp() * rows.kl_penalty(z.log_softmax(0) - old, torch.zeros(6))).sum()
    exact = (old.exp() * (old - z.log_softmax(0))).sum()
    assert_close(estimate, exact)
    assert_close(torch.autograd.grad(estimate, z)[0], torch.autograd.grad(exact, z)[0])


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ("clip", {"clip_low": 1.5}),
        ("clip", {"clip_high": -0.1}),
        ("dual_clip", {"dual_clip": 1.1}),
        ("cispo", {"ratio_max": 0.0}),
        ("sapo", {"tau_negative": 0.0}),
        ("gmpo", {"log_clip": 0.0}),
    ],
)
def test_what_cannot_be_meant_is_refused(row: str, options: dict[str, float]) -> None:
    x, unit = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    extra = {"cispo": (x,), "gmpo": (unit,)}.get(row, ())
    with pytest.raises(ConfigError):
        SURROGATES[row](x, x, *extra, **options)


def test_the_surveys_ratio_to_the_reference_is_not_ppo() -> None:
    """Printed with the reference below, the first step is clipped already; against the old policy it cannot be."""
    lp, ref = torch.tensor([-1.0], requires_grad=True), torch.tensor([-2.0])
    right = torch.autograd.grad(rows.clip(lp - lp.detach(), torch.ones(1)).sum(), lp)[0]
    printed = torch.autograd.grad(rows.clip(lp - ref, torch.ones(1)).sum(), lp)[0]
    assert right.item() == -1.0 and printed.item() == 0.0
