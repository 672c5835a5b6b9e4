"""Laws every named setting of the policy-gradient grid obeys, on a policy whose completions can all be written down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from burnish.core.errors import ConfigError
from burnish.core.table import describe, load_table
from burnish.maths.advantages import ADVANTAGES
from burnish.maths.policy_gradient import (
    AXES,
    FILTERS,
    PARAMETERS,
    Setting,
    advantages_of,
    couples_sequences,
    keywords,
    needs,
    objective_of,
    override,
    prepare,
    takes,
)
from burnish.maths.settings import POLICY_GRADIENT
from tests.laws import enumerated
from tests.laws.enumerated import COMPLETIONS, LENGTH

ROWS = pytest.mark.parametrize("row", list(POLICY_GRADIENT))
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
POLICY, REFERENCE = enumerated.table(0), enumerated.table(1).detach()
REWARD = torch.rand(len(COMPLETIONS), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
SHARE = torch.rand(len(COMPLETIONS), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
VALUE = torch.rand(len(enumerated.TOKEN), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
MIXED = (3, 0, 7, 14, 1, 2, 9, 9, 4, 11, 6, 0)  # completions of a batch of four groups
GROUPED = torch.arange(4).repeat_interleave(3)


def columns_of(drawn: tuple[int, ...], group: Tensor | None = None, reward: Tensor = REWARD) -> dict[str, Tensor]:
    """Every column there is, of a batch of these completions. The critic's value belongs to the state, as it must."""
    label, unit = enumerated.entries(drawn)
    chosen = list(drawn)
    r, known = reward[chosen], torch.ones(len(drawn), dtype=torch.bool)
    last = torch.cat([unit[1:] != unit[:-1], torch.tensor([True])]).nonzero()[:, 0]
    with torch.no_grad():
        old = enumerated.label_logprobs(POLICY)[label]
        ref = enumerated.label_logprobs(REFERENCE)[label]
    noise = torch.rand(len(label), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return {
        "unit": unit,
        "group": torch.zeros(len(drawn), dtype=torch.long) if group is None else group,
        "reward": r,
        "known": known,
        "finished": torch.ones(len(drawn), dtype=torch.bool),
        "old_logprobs": old,
        "sampler_logprobs": old,
        "ref_logprobs": ref,
        "value": VALUE[enumerated.STATE[label]],
        "entropy": noise,
        "noise": noise,
        "greedy_reward": torch.full_like(r, 0.37),
        "reward_trace": torch.tensor([0.3, 0.6], dtype=torch.float64),
        "rewards": torch.stack([SHARE[chosen] * r, (1 - SHARE[chosen]) * r], 1),
        "rewards_known": known[:, None].expand(-1, 2),
        "component_weight": torch.ones(2, dtype=torch.float64),
        "step_reward": r,
        "step_known": known,
        "step_end": last,
    }


def gradient(setting: Setting, columns: dict[str, Tensor], logprobs: Tensor | None = None) -> Tensor:
    """d loss / d log-prob of every entry, where the policy is `logprobs` (by default: the old policy)."""
    small = (columns["old_logprobs"] if logprobs is None else logprobs).clone().requires_grad_()
    objective = objective_of(setting, columns | prepare(setting, columns))
    return torch.autograd.grad(objective(small, slice(0, len(small))), small)[0]


def off_policy(columns: dict[str, Tensor], scale: float = 0.7) -> Tensor:
    old = columns["old_logprobs"]
    return old + scale * torch.randn(old.shape, generator=torch.Generator().manual_seed(6), dtype=old.dtype)


def without_kl(row: str) -> Setting:
    return override(POLICY_GRADIENT[row], kl_coef=0.0)


def by_group(row: str) -> bool:
    """Whether the advantage compares a prompt's completions with each other alone."""
    return "group" in takes(ADVANTAGES[POLICY_GRADIENT[row].advantage])


# ---- bias, as declared ----------------------------------------------------------------------------------------------


@ROWS
def test_the_expected_gradient_is_exact_where_the_row_says_so_and_only_there(row: str) -> None:
    setting = POLICY_GRADIENT[row]
    got = enumerated.expected_gradient(POLICY, 2, lambda drawn: gradient(setting, columns_of(drawn)))
    with torch.no_grad():
        kl = enumerated.completion_logprobs(POLICY) - enumerated.completion_logprobs(REFERENCE)
    want = -enumerated.exact_gradient(POLICY, REWARD - setting.kl_coef * kl)  # E[d log p] = 0: k1 needs no further term
    if describe("method")[row].about.bias == "none":
        assert_close(got, want, **TIGHT)
    else:
        assert (got - want).norm() > 0.01 * want.norm()


def test_dr_grpo_is_exact_but_for_its_scale_and_grpo_is_not() -> None:
    want = -enumerated.exact_gradient(POLICY, REWARD)
    dr_grpo = override(POLICY_GRADIENT["dr_grpo"], length=7)
    got = enumerated.expected_gradient(POLICY, 2, lambda drawn: gradient(dr_grpo, columns_of(drawn)))
    assert_close(got, want * (2 - 1) / 2 / 7, **TIGHT)
    grpo = enumerated.expected_gradient(POLICY, 2, lambda drawn: gradient(without_kl("grpo"), columns_of(drawn)))
    cosine = torch.cosine_similarity(grpo.flatten(), want.flatten(), 0)
    assert 0.3 < cosine < 0.999  # the survey's 1/len and /std: a direction of its own


def test_on_equal_lengths_and_unit_deviation_grpo_is_dr_grpo() -> None:
    drawn = tuple(i for i, n in enumerate(LENGTH.tolist()) if n == 3)[:4]
    columns = columns_of(drawn)
    columns["reward"] = torch.tensor([0.5, -1.5, 0.5, 0.5], dtype=torch.float64)  # unbiased deviation 1
    a = gradient(override(without_kl("grpo"), epsilon=0.0), columns)
    b = gradient(override(POLICY_GRADIENT["dr_grpo"], length=3), columns)
    assert_close(a, b, **TIGHT)


# ---- identities -----------------------------------------------------------------------------------------------------


@ROWS
def test_at_ratio_one_every_row_is_reinforce_with_its_advantage(row: str) -> None:
    columns = columns_of(MIXED, GROUPED)
    setting = without_kl(row)
    made = prepare(setting, columns)
    assert_close(gradient(setting, columns), -made["weight"] * made["policy_weight"] * made["advantage"], **TIGHT)
    assert made["advantage"].abs().max() > 0.1


@ROWS
def test_away_from_ratio_one_only_the_unlimited_rows_are_still_that(row: str) -> None:
    columns = columns_of(MIXED, GROUPED)
    setting = without_kl(row)
    made, moved = prepare(setting, columns), off_policy(columns)
    plain = -made["weight"] * made["policy_weight"] * made["advantage"]
    same = torch.allclose(gradient(setting, columns, moved), plain)
    assert same == (setting.ratio == "none")


@ROWS
def test_kl_in_the_loss_adds_its_own_gradient_and_nothing_else(row: str) -> None:
    setting = override(POLICY_GRADIENT[row], kl="k2", kl_coef=0.3, kl_placement="loss")
    columns = columns_of(MIXED, GROUPED)
    moved = off_policy(columns)
    weight = prepare(setting, columns)["weight"]
    extra = gradient(setting, columns, moved) - gradient(without_kl(row), columns, moved)
    assert_close(extra, weight * 0.3 * (moved - columns["ref_logprobs"]), **TIGHT)


@ROWS
def test_groups_of_equal_rewards_have_exactly_zero_gradient(row: str) -> None:
    """By themselves where the baseline is the group's; else with the filter, which every row may be given."""
    columns = columns_of(MIXED, GROUPED)
    for name in ("reward", "step_reward", "rewards"):
        columns[name] = torch.full_like(columns[name], 0.1)  # the mean of three 0.1 is not 0.1
    setting = without_kl(row) if by_group(row) else override(without_kl(row), sequence_filters=("dead_groups",))
    for logprobs in (columns["old_logprobs"], off_policy(columns)):
        assert bool((gradient(setting, columns, logprobs) == 0).all())
    mixed = columns_of(MIXED, GROUPED)
    dead = GROUPED == 1
    for name in ("reward", "step_reward", "rewards"):
        mixed[name] = mixed[name].clone()
        mixed[name][dead] = 0.1
    got = gradient(setting, mixed)
    assert bool((got[dead[mixed["unit"]]] == 0).all()) and bool((got != 0).any())
    assert_close(
        prepare(setting, mixed)["weight"][~dead[mixed["unit"]]],
        prepare(without_kl(row), mixed)["weight"][~dead[mixed["unit"]]],
    )


# ---- invariances ----------------------------------------------------------------------------------------------------


@ROWS
@pytest.mark.parametrize("pieces", [2, 5, 12])
def test_the_split_into_micro_batches_and_chunks_changes_nothing(row: str, pieces: int) -> None:
    setting = POLICY_GRADIENT[row]
    columns = columns_of(MIXED, GROUPED)
    captured, moved = columns | prepare(setting, columns), off_policy(columns)
    whole = gradient(setting, columns, moved)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(7))
    cut = columns["unit"] if couples_sequences(setting) else torch.arange(len(moved)) % 12  # or between any two labels
    got = torch.zeros_like(moved)
    for part in order.chunk(pieces):
        items = torch.isin(cut, part).nonzero()[:, 0]
        small = moved[items].clone().requires_grad_()
        per_entry = {k: v[items] for k, v in captured.items() if len(v) == len(moved)}
        objective = objective_of(setting, per_entry)
        middle = int((per_entry["unit"] == per_entry["unit"][0]).sum())  # two chunks of the head, the first one unit
        loss = objective(small[:middle], slice(0, middle)) + objective(small[middle:], slice(middle, len(items)))
        got[items] = torch.autograd.grad(loss, small)[0]
    assert_close(got, whole, rtol=1e-12, atol=1e-14)


@ROWS
def test_the_order_of_completions_changes_nothing(row: str) -> None:
    setting = POLICY_GRADIENT[row]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(8))
    columns, other = columns_of(MIXED, GROUPED), columns_of(tuple(MIXED[i] for i in order), GROUPED[order])
    moved = torch.cat([(columns["unit"] == i).nonzero()[:, 0] for i in order])
    other["noise"] = columns["noise"][moved]
    there = off_policy(columns)
    assert_close(
        gradient(setting, other, there[moved]), gradient(setting, columns, there)[moved], rtol=1e-10, atol=1e-13
    )


@ROWS
def test_a_completion_without_a_reward_leaves_the_baseline_and_gets_none(row: str) -> None:
    setting, missing = POLICY_GRADIENT[row], 5
    columns = columns_of(MIXED, GROUPED)
    columns["reward"] = columns["reward"].clone()
    columns["reward"][missing] = float("nan")
    columns["known"] = torch.arange(12) != missing
    columns |= {"step_known": columns["known"], "rewards_known": columns["known"][:, None].expand(-1, 2)}
    got = advantages_of(setting, columns)
    rest = [i for i in range(12) if i != missing]
    want = advantages_of(setting, columns_of(tuple(MIXED[i] for i in rest), GROUPED[rest]))
    here = columns["unit"] == missing
    assert bool((got[here] == 0).all())
    assert_close(got[~here], want, rtol=1e-10, atol=1e-12)


@ROWS
def test_a_column_nobody_asked_for_is_never_read(row: str) -> None:
    setting = POLICY_GRADIENT[row]
    columns = columns_of(MIXED, GROUPED)
    asked = {name: columns[name] for name in needs(setting)}
    made = prepare(setting, asked)
    small = columns["old_logprobs"].clone().requires_grad_()
    objective_of(setting, asked | made)(small, slice(0, len(small)))
    for name in needs(setting) - {"unit", "known"}:
        with pytest.raises(ConfigError, match=f"takes '{name}', which is not among the columns"):
            prepare(setting, {k: v for k, v in asked.items() if k != name})


# ---- declarations ---------------------------------------------------------------------------------------------------


@ROWS
def test_declared_with_equation_paper_bias_and_taxonomy(row: str) -> None:
    found = describe("method")[row]
    assert found.citation and found.about.bias and found.about.taxonomy and found.about.year
    assert " = " in found.doc or "loss" in found.doc
    assert {p.name: p.default for p in found.parameters} == vars(POLICY_GRADIENT[row])


def test_without_a_value_and_with_lam_1_a_critic_is_reinforce() -> None:
    columns = columns_of(MIXED, GROUPED)
    blind = columns | {"value": torch.zeros_like(columns["value"])}
    want = gradient(POLICY_GRADIENT["reinforce"], columns | {"reward_trace": torch.zeros(2, dtype=torch.float64)})
    assert_close(gradient(POLICY_GRADIENT["a2c"], blind), want, **TIGHT)
    assert (gradient(POLICY_GRADIENT["a2c"], columns) - want).norm() > 0.1 * want.norm()
    ppo = override(without_kl("ppo"), lam=1.0, whiten="none", weights="sequence_sum")  # at the old policy nothing is clipped
    assert_close(gradient(ppo, blind), want, **TIGHT)


def test_a_penalty_that_adapts_belongs_to_the_surrogate_that_has_one() -> None:
    assert override(POLICY_GRADIENT["ppo_kl"], surrogate="clip").penalty_target is None
    with pytest.raises(ConfigError, match="there is no penalty_coef"):
        override(POLICY_GRADIENT["grpo"], penalty_target=0.01)
    with pytest.raises(ConfigError, match="wanted a positive number"):
        override(POLICY_GRADIENT["ppo_kl"], penalty_target=-1.0)


def test_no_two_rows_are_the_same_point() -> None:
    assert len(set(POLICY_GRADIENT.values())) == len(POLICY_GRADIENT)


def test_a_setting_has_a_field_for_every_parameter_of_every_row() -> None:
    found: dict[str, Any] = {}
    for kind in (*AXES, *FILTERS):
        for name, description in describe(kind).items():
            assert {p.name for p in description.parameters} == set(keywords(load_table(kind)[name]))
            found |= {p.name: p.type for p in description.parameters}
    found["cov_share"] = float
    mine = {p.name: p.type for p in describe("method")["grpo"].parameters if p.name in PARAMETERS}
    assert mine == {name: kind | None for name, kind in found.items()}
