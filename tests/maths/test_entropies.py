"""Entropy and its gradient in fp64; the two adaptive bonuses; which tokens are forks."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch.testing import assert_close

from burnish.core.errors import ConfigError, DataError
from burnish.maths.entropies import EntropyControl, d_entropy, entropy, next_control, top_entropy, variance_coef

LOGITS = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def test_entropy_by_hand_and_at_its_ends() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [0.0, 0.0, -float("inf"), -float("inf")]])
    assert entropy(logits).tolist() == pytest.approx([log(4), 0, log(2)], abs=1e-6)
    assert_close(entropy(torch.tensor([[log(1.0), log(3.0)]])).item(), 0.25 * log(4) + 0.75 * log(4 / 3))
    assert_close(entropy(LOGITS + 1e6), entropy(LOGITS), rtol=1e-8, atol=1e-8)
    large = (torch.tensor([[0.5, 0.0]]) + 4000).bfloat16()  # logsumexp - sum p z would lose all digits
    assert entropy(large).dtype == torch.float32 and entropy(large).item() == pytest.approx(log(2), abs=1e-3)


def test_the_gradient_is_that_of_autograd_and_of_finite_differences() -> None:
    z = LOGITS.clone().requires_grad_()
    weight = torch.arange(1.0, 6.0, dtype=torch.float64)
    want = torch.autograd.grad((weight * entropy(z)).sum(), z)[0]
    got = weight[:, None] * d_entropy(LOGITS, LOGITS.softmax(1), entropy(LOGITS))
    assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(entropy, (z,))
    step = 1e-6 * torch.eye(7, dtype=torch.float64)
    slope = torch.stack([(entropy(LOGITS + e) - entropy(LOGITS - e)) / 2e-6 for e in step], 1)
    assert_close(slope * weight[:, None], got, rtol=1e-6, atol=1e-8)
    masked = torch.tensor([[0.0, 1.0, -float("inf")]], dtype=torch.float64)
    assert d_entropy(masked, masked.softmax(1), entropy(masked)).isfinite().all()


def test_the_sampled_tokens_log_prob_has_no_gradient_of_the_entropy() -> None:
    z = LOGITS[:1].clone().requires_grad_()
    p = z.log_softmax(1)
    estimate = torch.autograd.grad((p.detach().exp() * -p).sum(), z)[0]  # its expectation, differentiated as it stands
    assert estimate.abs().max() < 1e-12 < d_entropy(LOGITS[:1], LOGITS[:1].softmax(1), entropy(LOGITS[:1])).abs().max()


def test_the_bonus_shrinks_with_the_variance_of_rewards() -> None:
    known = torch.tensor([True, True, False])
    reward = torch.tensor([0.0, 2.0, float("nan")])
    assert variance_coef(reward, known, largest=0.1, steepness=0.5) == pytest.approx(0.1 * exp(-0.5 * 1.0))
    assert variance_coef(torch.ones(3), torch.ones(3, dtype=torch.bool), largest=0.1) == 0.1
    with pytest.raises(DataError, match="no reward is known"):
        variance_coef(reward, torch.zeros(3, dtype=torch.bool))


def test_the_target_controller() -> None:
    options = {"target": 0.2, "step": 0.005, "smallest": 0.0, "largest": 0.012}
    state = EntropyControl()
    seen = []
    for measured in (0.1, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.1):
        state = next_control(state, measured, **options)
        seen.append((round(state.coef, 4), round(state.applied, 4)))
    assert seen == [
        (0.005, 0.005),
        (0.01, 0.01),
        (0.012, 0.012),
        (0.007, 0),
        (0.002, 0),
        (0, 0),
        (0, 0),
        (0.005, 0.005),
    ]
    with pytest.raises(ConfigError, match="wanted step > 0"):
        next_control(state, 0.1, smallest=1.0, largest=0.0)


def test_the_forks_are_the_top_share_and_ties_stay_together() -> None:
    h = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.2, 0.3, 0.0, 0.0, 0.0, 0.0])
    assert top_entropy(h).nonzero()[:, 0].tolist() == [1, 3]
    assert top_entropy(h, entropy_share=0.1).nonzero()[:, 0].tolist() == [1, 3]
    assert top_entropy(h, entropy_share=0.3).nonzero()[:, 0].tolist() == [1, 2, 3]
    assert top_entropy(h, entropy_share=1.0).all() and top_entropy(h[:1], entropy_share=0.01).all()
    with pytest.raises(ConfigError, match="share"):
        top_entropy(h, entropy_share=0.0)
