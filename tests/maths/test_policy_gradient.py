"""The grid: what is refused, what an override keeps, what is asked for, and that the head carries it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from burnish.core.errors import ConfigError
from burnish.core.table import bind, describe_row, differences
from burnish.maths.head import head_loss
from burnish.maths.logprobs import label_logprobs
from burnish.maths.policy_gradient import Setting, couples_sequences, needs, objective_of, override, prepare
from burnish.maths.settings import POLICY_GRADIENT as NAMED


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"surrogate": "reinforce", "clip_low": 0.1},
            r"clip_low  nothing chosen here takes it: surrogate: clip, surrogate: dual_clip",
        ),
        ({"gamma": 0.9}, "gamma  nothing chosen here takes it: advantage: to_go, advantage: gae would"),
        ({"kl": "k1", "kl_coef": 0.1}, "expectation 0"),
        ({"kl": "k3_unbiased", "kl_coef": 0.1, "kl_placement": "reward"}, "in a reward there is no ratio"),
        ({"kl_coef": -0.1}, "wanted 0"),
        ({"advantage": "grpo"}, "Did you mean 'group_standardised'"),
        ({"token_filters": ("top_entropi",)}, "Did you mean 'top_entropy'"),
    ],
)
def test_what_would_do_nothing_or_cannot_be_meant_is_refused(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Setting(**axes)


def test_an_override_keeps_what_still_counts() -> None:
    dapo = NAMED["dapo"]
    assert override(dapo, weights="sequence_mean").clip_high == 0.28
    assert override(dapo, surrogate="cispo").clip_high is None
    assert override(NAMED["grpo"], surrogate="cispo", ratio_max=3.0).ratio_max == 3.0
    assert override(dapo) == dapo
    with pytest.raises(ConfigError, match="clip_high  nothing chosen"):
        override(dapo, surrogate="cispo", clip_high=0.3)
    with pytest.raises(ConfigError, match="there is no KL"):
        override(dapo, kl="k2")
    assert override(dapo, kl="k2", kl_coef=0.1).kl == "k2" and override(dapo, kl="k3") == dapo


def test_a_recipe_line_is_bound_like_that_of_any_row() -> None:
    row = describe_row("method", "grpo")
    given = {"weights": "token_mean", "token_filters": ["top_entropy"], "clip_high": 0.28}
    values = bind(row, given)
    assert override(NAMED["grpo"], **{name: values[name] for name in given}).token_filters == ("top_entropy",)
    for wrong, message in (
        ({"weights": "token_meen"}, "Did you mean 'token_mean'"),
        ({"token_filters": ["top"]}, "'top' is not a token_filters"),
        ({"clip_high": "a"}, "a number or null"),
        ({"clip": 0.2}, "has no parameter 'clip'"),
        ({"kl_placement": "critic"}, "one of loss, reward"),
    ):
        with pytest.raises(ConfigError, match=message):
            bind(row, wrong)
    dapo = describe_row("method", "dapo")
    assert set(differences(dapo, row)) == {"weights", "kl_coef", "sequence_filters", "clip_high"}


def test_a_users_own_row_is_a_point_of_the_grid(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def square(log_ratio, advantage):\n    'Mine.'\n    return -(1 + log_ratio) ** 2 * advantage\n")
    assert needs(Setting(surrogate=f"{own}:square")) == needs(Setting())


def test_only_what_is_taken_is_asked_for() -> None:
    base = {"unit", "known"}
    assert needs(NAMED["dr_grpo"]) == base | {"reward", "group", "old_logprobs"}
    assert needs(NAMED["grpo"]) == base | {"reward", "group", "old_logprobs", "ref_logprobs"}
    assert needs(override(NAMED["grpo"], kl_coef=0.0)) == needs(NAMED["dr_grpo"])
    assert needs(NAMED["remax"]) == base | {"reward", "greedy_reward"}
    assert needs(NAMED["a2c"]) == base | {"reward", "value"}
    assert needs(NAMED["ppo"]) == base | {"reward", "value", "old_logprobs", "ref_logprobs"}
    assert needs(NAMED["rloo"]) == base | {"reward", "group", "old_logprobs", "ref_logprobs"}
    assert needs(NAMED["gdpo"]) == base | {"rewards", "rewards_known", "component_weight", "group", "old_logprobs"}
    assert needs(override(NAMED["opo"], correction="masked")) >= {"sampler_logprobs", "old_logprobs"}
    assert "entropy" in needs(override(NAMED["dapo"], token_filters=("top_entropy",)))
    assert {name for name in NAMED if couples_sequences(NAMED[name])} == {"gspo", "gspo_token", "gmpo"}


UNIT = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    old, sampler, ref = -torch.rand(3, 8, generator=g, dtype=torch.float64)
    return {
        "unit": UNIT,
        "known": torch.ones(4, dtype=torch.bool),
        "reward": torch.tensor([1.0, 0.0, 1.0, 3.0], dtype=torch.float64),
        "group": torch.tensor([0, 0, 1, 1]),
        "finished": torch.tensor([True, False, True, True]),
        "old_logprobs": old,
        "sampler_logprobs": sampler,
        "ref_logprobs": ref,
        "entropy": torch.arange(8.0),
    }


def test_filters_and_corrections_act_where_they_say() -> None:
    columns = batch()
    plain = prepare(NAMED["dr_grpo"], columns)
    cut = prepare(override(NAMED["dr_grpo"], sequence_filters=("truncated",)), columns)
    assert cut["weight"].tolist() == [w * (u != 1) for w, u in zip(plain["weight"].tolist(), UNIT.tolist())]
    forks = prepare(override(NAMED["dr_grpo"], token_filters=("top_entropy",), entropy_share=0.5), columns)
    assert forks["policy_weight"].tolist() == [0.0] * 4 + [1.0] * 4
    mended = prepare(override(NAMED["dr_grpo"], correction="truncated", correction_high=1.1), columns)
    want = (columns["old_logprobs"] - columns["sampler_logprobs"]).exp().clamp(max=1.1)
    assert_close(mended["policy_weight"], want)
    far = override(NAMED["grpo"], token_filters=("off_policy",), off_policy_limit=0.1)
    small = (columns["old_logprobs"] - 2).requires_grad_()
    loss = objective_of(far, columns | prepare(far, columns))(small, slice(0, 8))
    grad = torch.autograd.grad(loss, small)[0]
    bad = prepare(far, columns)["advantage"] < 0
    weight = prepare(far, columns)["weight"]
    kl = -0.04 * torch.expm1(columns["ref_logprobs"] - small.detach()) * weight
    assert_close(grad[bad], kl[bad])  # the policy term is gone, the KL to the reference stays
    assert bool((grad[~bad] != kl[~bad]).all())


def test_whitening_units_of_a_row_that_credits_tokens_is_refused() -> None:
    setting = Setting(advantage="to_go", whiten="units")
    with pytest.raises(ConfigError, match="use whiten: tokens"):
        prepare(setting, batch())
    units = prepare(Setting(advantage="none", whiten="units", epsilon=0.0), batch())["advantage"]
    r = batch()["reward"]
    assert_close(units, ((r - r.mean()) / r.std())[UNIT])


@pytest.mark.parametrize("row", ["grpo", "gspo", "gmpo", "cispo", "ppo_kl"])
def test_the_head_carries_every_kind_of_coupling(row: str) -> None:
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(8, 5, generator=g), torch.randn(11, 5, generator=g)
    label, columns = torch.randint(0, 11, (8,), generator=g), batch()
    setting = override(NAMED[row], advantage="group_standardised", kl_coef=0.0, whiten="none")
    columns["old_logprobs"] = label_logprobs(hidden @ weight.T, label).double() + 0.2 * torch.randn(8, generator=g)
    objective = objective_of(setting, columns | prepare(setting, columns))
    found = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            couple = UNIT if couples_sequences(setting) else None
            loss = head_loss(h, w, label, objective, couple=couple, rows=3)[0]
        else:
            loss = objective(label_logprobs(h @ w.T, label), slice(0, 8))
        found.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
    for a, b in zip(*found):
        assert_close(a, b, rtol=1e-5, atol=1e-6)
