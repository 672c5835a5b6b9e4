"""Filters: which sequences and tokens are left out, by hand; the soft overlong penalty; a critic's losses."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from burnish.core.errors import ConfigError
from burnish.maths import filters, values
from burnish.maths.divergences import covariance


def test_dead_groups() -> None:
    group = torch.tensor([0, 0, 0, 1, 1, 2])
    reward = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, 1.0])
    known = torch.ones(6, dtype=torch.bool)
    assert filters.dead_groups(reward, known, group).tolist() == [False] * 3 + [True] * 2 + [False]
    known[4] = False
    assert not filters.dead_groups(reward, known, group).any()


def test_truncated_completions() -> None:
    assert filters.truncated(torch.tensor([True, False])).tolist() == [True, False]


def test_off_policy_drops_bad_sequences_the_policy_has_left() -> None:
    unit = torch.tensor([0, 0, 1, 1, 2, 2])
    sampler = torch.full((6,), -1.0)
    moved = sampler - torch.tensor([0.9, 0.3, 0.9, 0.3, 0.9, 0.0])  # mean gaps 0.6, 0.6, 0.45
    advantage = torch.tensor([-1.0, -1, 1, 1, -1, -1])
    got = filters.off_policy(moved.requires_grad_(), sampler, advantage, unit)
    assert got.tolist() == [False, False, True, True, True, True]
    with pytest.raises(ConfigError, match="off_policy_limit"):
        filters.off_policy(moved, sampler, advantage, unit, off_policy_limit=0.0)


def test_clip_cov_drops_a_share_of_those_in_the_interval_and_only_those() -> None:
    g = torch.Generator().manual_seed(0)
    old, advantage, noise = (
        torch.randn(1000, generator=g),
        torch.randn(1000, generator=g),
        torch.rand(1000, generator=g),
    )
    found = covariance(old, advantage)
    inside = (found > 1) & (found < 5)
    dropped = ~filters.clip_cov(old, advantage, noise, cov_share=0.02)
    assert int(dropped.sum()) == 20 and bool(inside[dropped].all())
    assert noise[dropped].max() < noise[inside & ~dropped].min()
    assert int((~filters.clip_cov(old, advantage, noise)).sum()) == 1
    assert bool((~filters.clip_cov(old, advantage, noise, cov_share=1.0) == inside).all())
    assert filters.clip_cov(old, torch.ones(1000), noise).all()
    with pytest.raises(ConfigError, match="holds nothing"):
        filters.clip_cov(old, advantage, noise, cov_low=5.0, cov_high=1.0)


def test_soft_overlong_by_hand() -> None:
    length = torch.tensor([1, 80, 85, 100, 101, 900])
    got = filters.soft_overlong(length, longest=100, cushion=20)
    assert_close(got, torch.tensor([0.0, 0.0, -0.25, -1.0, -1.0, -1.0]))
    with pytest.raises(ConfigError, match="cushion"):
        filters.soft_overlong(length, longest=10, cushion=20)


def test_a_critics_losses() -> None:
    value = torch.tensor([1.0, 1.5, 0.0], requires_grad=True)
    old, target = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 3.0, 3.0])
    assert_close(values.squared(value, target), torch.tensor([0.5, 1.125, 4.5]))
    loss = values.clipped(value, old, target)
    assert_close(loss, torch.tensor([0.5, 1.8**2 / 2, 4.5]))  # 1.5 gains nothing over 1.2; 0.0 moved the wrong way
    assert torch.autograd.grad(loss.sum(), value)[0].tolist() == pytest.approx([-1.0, 0.0, -3.0])
    with pytest.raises(ConfigError, match="value_clip"):
        values.clipped(value, old, target, value_clip=0.0)
