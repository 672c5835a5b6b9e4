"""Coefficients that adapt: the controllers are tested with their formulas, here that a setting reaches them."""

from __future__ import annotations

import json
from math import exp
from typing import Any

import pytest
import torch

from burnish.core.errors import ConfigError
from burnish.maths.controls import Coefficients
from burnish.maths.policy_gradient import Setting, needs, override
from burnish.maths.settings import POLICY_GRADIENT as NAMED


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"kl_target": 0.1}, "kl_target  it would do nothing: there is no kl_coef"),
        ({"kl_coef": 0.1, "kl_gain": 0.1}, "kl_gain  it would do nothing: there is no kl_target"),
        ({"kl_coef": 0.1, "kl_target": 0.0}, "kl_target  0.0 given, wanted a positive number"),
        ({"entropy_coef": -1.0}, "entropy_coef  -1.0 given"),
        ({"entropy_steepness": 1.0}, "there is no entropy_coef"),
        ({"entropy_step": 0.1}, "there is no entropy_target"),
        ({"entropy_coef": 0.1, "entropy_steepness": 1.0, "entropy_target": 1.0}, "not both"),
        ({"penalty_target": 0.1}, "there is no penalty_coef"),
    ],
)
def test_what_would_do_nothing_is_refused(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Setting(**axes)
    with pytest.raises(ConfigError, match=message):
        override(NAMED["dapo"], **axes)


def test_what_adapts_asks_for_its_columns() -> None:
    assert "entropy" in needs(Setting(entropy_target=1.0)) and "entropy" not in needs(Setting(entropy_coef=1.0))
    assert "ref_logprobs" in needs(Setting(kl_coef=0.1, kl_target=1.0))


def test_a_fixed_coefficient_stays() -> None:
    setting = Setting(kl_coef=0.1, entropy_coef=0.2)
    start = Coefficients.of(setting)
    assert start.after_batch(setting, kl=9.0, entropy=9.0).after_round(setting, 9.0) == start
    assert start.applied(setting) is setting
    assert start.bonus(setting, torch.zeros(2), torch.ones(2, dtype=torch.bool)) == 0.2


def test_each_controller_by_hand_and_through_json() -> None:
    setting = Setting(kl_coef=0.1, kl_target=2.0, surrogate="kl_penalty", penalty_target=1.0, entropy_target=1.0, entropy_step=0.5, entropy_largest=0.75)
    state = Coefficients.of(setting)
    assert (state.kl, state.penalty, state.entropy.applied) == (0.1, 1.0, 0.0)
    state = state.after_batch(setting, kl=2.2, entropy=0.9)
    assert state.kl == pytest.approx(0.1 * (1 + 0.1 * 0.1)) and state.entropy.applied == 0.5
    state = state.after_batch(setting, kl=200.0, entropy=0.9).after_round(setting, 1.6)
    assert state.kl == pytest.approx(0.101 * 1.02) and state.entropy.applied == 0.75 and state.penalty == 2.0
    assert Coefficients.from_json(json.loads(json.dumps(state.to_json()))) == state
    now = state.applied(setting)
    assert (now.kl_coef, now.penalty_coef) == (state.kl, 2.0)
    high = state.after_batch(setting, kl=None, entropy=1.1)
    assert high.kl == state.kl and high.entropy.applied == 0.0 and high.entropy.coef == 0.25


def test_the_bonus_falls_with_the_spread_of_known_rewards() -> None:
    setting = Setting(entropy_coef=0.4, entropy_steepness=2.0)
    reward, known = torch.tensor([0.0, 1.0, 9.0]), torch.tensor([True, True, False])
    state = Coefficients.of(setting)
    assert state.bonus(setting, reward, known) == pytest.approx(0.4 * exp(-2 * 0.25))
    assert state.bonus(setting, reward, torch.zeros(3, dtype=torch.bool)) == 0.4
