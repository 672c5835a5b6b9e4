"""Every named row is another one at a limit of its own: both gradients on the same batch, and that away from the limit they differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from burnish.maths.policy_gradient import Setting, override
from burnish.maths.settings import POLICY_GRADIENT
from tests.laws.enumerated import LENGTH
from tests.laws.test_policy_gradient import GROUPED, MIXED, columns_of, gradient, off_policy, without_kl

OPEN = {"clip_low": 1.0, "clip_high": 1e9}  # a clip that never binds
LONG = tuple(i for i, n in enumerate(LENGTH.tolist()) if n == 3)
SAME_LENGTH = tuple((LONG * 12)[:12])
ONE_TOKEN = (0,) * 12  # the only completion of a single token


def plain(**changes: Any) -> Setting:
    """r log p, nothing else, but for these axes."""
    return override(POLICY_GRADIENT["reinforce"], **({"advantage": "none"} | changes))


def unclipped(**changes: Any) -> Setting:
    """rho A with GRPO's advantage."""
    return override(without_kl("grpo"), **OPEN, **changes)


@dataclass(frozen=True)
class Limit:
    """`row` with `changes`, on `columns` changed so, is `other`, up to `scale` (None: up to a positive number).

    at_old  only where the policy is still the one that sampled
    """

    row: str
    other: Setting
    changes: dict[str, Any] = field(default_factory=dict[str, Any])
    columns: dict[str, Any] = field(default_factory=dict[str, Any])
    drawn: tuple[int, ...] = MIXED
    scale: float | None = 1.0
    at_old: bool = False
    close: float = 1e-9


BLIND = {"value": torch.zeros_like}
BY_STEP = {"whiten": "none", "kl_coef": 0.0}
LIMITS = [
    Limit("reinforce", plain(), columns={"reward_trace": torch.zeros_like}),
    Limit("remax", plain(), columns={"greedy_reward": torch.zeros_like}),
    Limit("a2c", plain(), columns=BLIND),
    Limit("rloo", plain(advantage="group_centred"), {"kl_coef": 0.0}, scale=3 / 2),  # groups of three
    Limit("opo", plain(advantage="group_centred"), drawn=SAME_LENGTH),
    Limit("dr_grpo", plain(advantage="group_centred"), {"length": 1}, at_old=True),
    Limit("reinforce_pp", plain(), BY_STEP | {"weights": "sequence_sum"}, at_old=True),
    Limit("ppo", override(POLICY_GRADIENT["reinforce_pp"], **BY_STEP), BY_STEP | {"lam": 1.0}, BLIND),
    Limit("ppo_kl", override(POLICY_GRADIENT["ppo"], **BY_STEP, **OPEN), BY_STEP | {"penalty_coef": 1e-13}),
    Limit("grpo", POLICY_GRADIENT["dapo"], {"kl_coef": 0.0, "weights": "token_mean", "clip_high": 0.28}),
    Limit("grpo_process", without_kl("grpo"), {"kl_coef": 0.0}),  # a step a completion
    Limit("dapo", override(without_kl("grpo"), weights="token_mean"), {"clip_high": 0.2}),
    Limit("gspo", override(without_kl("grpo"), clip_low=3e-4, clip_high=4e-4), drawn=ONE_TOKEN),
    Limit("gspo_token", POLICY_GRADIENT["gspo"]),  # advantages are one a completion here
    Limit("cispo", unclipped(weights="token_mean"), {"ratio_max": 1e9}),
    Limit("gmpo", unclipped(), {"log_clip": 1e3}, drawn=ONE_TOKEN),
    Limit("sapo", unclipped(), {"tau_positive": 1e-6, "tau_negative": 1e-6}, close=1e-5),
    Limit("gdpo", without_kl("grpo"), {"epsilon": 0.0}, columns={"rewards": lambda x: x.sum(1, keepdim=True), "rewards_known": lambda x: x[:, :1],
          "component_weight": lambda x: x[:1]}, scale=None),
    Limit("kl_cov", unclipped(weights="token_mean"), {"cov_penalty": 1e-13}),
    Limit("clip_cov", override(without_kl("grpo"), weights="token_mean"), {"cov_low": 1e6, "cov_high": 2e6}),
]  # fmt: skip


def batch(limit: Limit) -> dict[str, Tensor]:
    columns = columns_of(limit.drawn, GROUPED)
    columns["reward"] = torch.rand(12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    columns["step_reward"] = columns["reward"]
    columns["rewards"] = torch.stack([0.3 * columns["reward"], 0.7 * columns["reward"]], 1)
    return columns | {name: change(columns[name]) for name, change in limit.columns.items()}


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.row)
def test_at_its_limit_it_is_its_neighbour(limit: Limit) -> None:
    columns = batch(limit)
    setting = override(POLICY_GRADIENT[limit.row], **limit.changes)
    other = override(limit.other, epsilon=0.0) if limit.row == "gdpo" else limit.other
    for there in [columns["old_logprobs"]] + ([] if limit.at_old else [off_policy(columns)]):
        a, b = gradient(setting, columns, there), gradient(other, columns, there)
        assert float(b.abs().max()) > 1e-3
        scale = float((a @ b) / (b @ b)) if limit.scale is None else limit.scale
        assert scale > 0
        assert_close(a, scale * b, rtol=limit.close, atol=limit.close * float(b.abs().max()))


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.row)
def test_away_from_it_they_differ(limit: Limit) -> None:
    """The row as it is, on a batch as it comes."""
    if limit.row == "gspo_token":
        pytest.skip("with one advantage a completion it is gspo anywhere")
    columns, apart = columns_of(MIXED, GROUPED), 0.0
    for scale in (0.2, 0.7, 2.0):
        there = off_policy(columns, scale)
        a, b = gradient(POLICY_GRADIENT[limit.row], columns, there), gradient(limit.other, columns, there)
        apart = max(apart, float((a - (a @ b) / (b @ b) * b).norm() / a.norm()))
    assert apart > 1e-3


def test_every_row_has_a_neighbour() -> None:
    assert {limit.row for limit in LIMITS} == set(POLICY_GRADIENT)
