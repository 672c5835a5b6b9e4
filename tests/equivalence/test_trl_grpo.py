"""TRL 1.16's GRPO family and RLOO replayed from a fixture (trl_grpo/README.md): losses, gradients, advantages, corrections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from burnish.core.table import load_row
from burnish.maths.advantages import ADVANTAGES
from burnish.maths.policy_gradient import Setting, objective_of, override, prepare
from burnish.maths.settings import POLICY_GRADIENT as NAMED

FIXTURE = json.loads((Path(__file__).parent / "trl_grpo" / "fixture.json").read_text(encoding="utf-8"))
UNIT = torch.arange(8).repeat_interleave(torch.tensor(FIXTURE["lengths"]))
GROUP = torch.arange(2).repeat_interleave(FIXTURE["group_size"])
KNOWN = torch.ones(8, dtype=torch.bool)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
GRPO = override(NAMED["grpo"], kl_coef=0.0)  # TRL's beta is 0 unless given

# Every departure from TRL stands in its line.
SETTINGS: dict[str, Setting] = {
    "grpo": GRPO,
    "grpo_kl": NAMED["grpo"],  # TRL 1.16 multiplies k3 by the ratio unless told not to; the paper, and we, do not
    "grpo_kl_unbiased": override(NAMED["grpo"], kl="k3_unbiased"),  # its default
    "grpo_delta": override(
        GRPO, surrogate="dual_clip", dual_clip=1.6
    ),  # "delta" caps the ratio before the minimum: the same
    "grpo_forks": override(GRPO, token_filters=("top_entropy",), entropy_share=0.4),  # a quantile there, a count here
    "grpo_off_policy": override(NAMED["grpo"], kl="k3_unbiased", token_filters=("off_policy",), off_policy_limit=0.05),
    "bnpo": override(GRPO, weights="token_mean"),  # over its micro-batch there, over the whole optimiser batch here
    "dr_grpo": override(NAMED["dr_grpo"], length=FIXTURE["longest"]),  # we ask for the length; TRL takes its budget
    "dapo": NAMED["dapo"],  # whose filter of dead groups TRL does not have: no group is dead here
    "cispo": override(NAMED["cispo"], ratio_max=1.3),  # TRL calls the maximum itself epsilon_high, not 1 + epsilon_high
    "sapo": NAMED["sapo"],
    "vespo": override(GRPO, surrogate="vespo", weights="token_mean"),
    "gspo": override(NAMED["gspo"], clip_low=0.03, clip_high=0.04),  # as loss_type grpo; wider, so that both sides bind
    "luspo": override(NAMED["gspo"], clip_low=0.03, clip_high=0.04, weights="sequence_sum"),  # GSPO times the length
    "gmpo": NAMED["gmpo"],
    "rloo": override(NAMED["rloo"], kl_coef=0.0),  # at the old policy: TRL also clips the product of all ratios
}


def t(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def columns() -> dict[str, Tensor]:
    inputs = FIXTURE["inputs"]
    return {
        "unit": UNIT,
        "known": KNOWN,
        "group": GROUP,
        "reward": t(inputs["advantage"]),
        "old_logprobs": t(inputs["old"]),
        "sampler_logprobs": t(inputs["sampler"]),
        "ref_logprobs": t(inputs["ref"]),
        "entropy": t(inputs["entropy"]),
    }


def ours(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d loss / d log-prob, weighted policy loss by token) with TRL's advantages."""
    setting, given = SETTINGS[name], columns()
    made = prepare(setting, given)
    made["advantage"] = prepare(override(GRPO, advantage="none"), given)["advantage"]  # as given, not of a group
    factor = made["policy_weight"].clone().requires_grad_()
    start = FIXTURE["inputs"]["old" if name == "rloo" else "policy"]
    policy = t(start).requires_grad_()
    loss = objective_of(setting, given | made | {"policy_weight": factor})(policy, slice(0, len(UNIT)))
    by_policy, by_factor = torch.autograd.grad(loss, (policy, factor))
    return loss.detach(), by_policy, by_factor * (made["policy_weight"] != 0)


def test_the_fixture_is_whole() -> None:
    assert set(SETTINGS) == set(FIXTURE["losses"]) and FIXTURE["versions"]["trl"].startswith("1.16")


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_are_trls(name: str) -> None:
    want = FIXTURE["losses"][name]
    loss, gradient, by_token = ours(name)
    assert_close(gradient, t(want["gradient"]), **CLOSE)
    if name != "rloo":  # whose value, not its gradient, is by completion there and by token here
        assert_close(loss.item(), want["loss"], **CLOSE)
    if want["token_loss"] is not None and name != "grpo_off_policy":  # whose mask is made inside our loss
        assert_close(by_token, t(want["token_loss"]), **CLOSE)
    others = [t(case["gradient"]) for other, case in FIXTURE["losses"].items() if other != name]
    assert all((gradient - other).abs().max() > 1e-4 for other in others)  # a case that mistook another would show


def test_limits_bind_in_the_fixture() -> None:
    """Each limit stops some token or bends some weight, else its case would be its neighbour's."""
    for name in ("grpo", "dapo", "grpo_delta", "gspo", "gmpo", "grpo_forks"):
        stopped = (t(FIXTURE["losses"][name]["gradient"]) == 0).sum()
        assert 0 < stopped < len(UNIT), name


@pytest.mark.parametrize("name", FIXTURE["corrections"])
def test_corrections_are_trls(name: str) -> None:
    case, given = FIXTURE["corrections"][name], columns()
    level, kind = name.split("_")
    row = {"truncate": "truncated", "mask": "masked"}[kind]
    f = load_row("correction", row if level == "token" else f"sequence_{row}")
    bounds = {"correction_high": case["settings"]["max"]} | (
        {"correction_low": case["settings"]["min"]} if kind == "mask" else {}
    )
    extra = (UNIT,) if level == "sequence" else ()
    got = f(given["old_logprobs"], given["sampler_logprobs"], *extra, **bounds)
    assert_close(got, t(case["weight"]), **CLOSE)
    assert not torch.allclose(got, (given["old_logprobs"] - given["sampler_logprobs"]).exp())


@pytest.mark.parametrize("missing", ["", "_none"])
@pytest.mark.parametrize("name", ["group", "none", "normalize_then_sum", "rloo"])
def test_advantages_are_trls(name: str, missing: str) -> None:
    rewards = t(FIXTURE["rewards"]).T
    known = KNOWN.clone()
    known[2] = not missing
    summed = rewards @ t([1.0, 0.5])
    calls: dict[str, tuple[str, tuple[Any, ...]]] = {
        "group": ("group_standardised", (summed, known, GROUP)),
        "none": ("group_centred", (summed, known, GROUP)),
        "normalize_then_sum": ("per_reward_normalised", (rewards, known[:, None].expand(-1, 2), GROUP, t([1.0, 0.5]))),
        "rloo": ("leave_one_out", (rewards[:, 0], known, GROUP)),
    }
    row, arguments = calls[name]
    got, want = ADVANTAGES[row](*arguments), t(FIXTURE["advantages"][name + missing])
    assert_close(got, want, rtol=1e-7, atol=1e-7)  # TRL's n / (n - 1) is in fp32
