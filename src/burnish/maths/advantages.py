"""Advantages: what a completion, or a token of it, was worth beyond a baseline. Nothing here is differentiated.

Axes: m entries, u units, p steps, c reward components. A row takes what it needs by name: one that takes `value`
needs a critic, one that takes `greedy_reward` a greedy answer to each prompt. `known` is False where no reward came
(a verifier abstained or broke): such a unit leaves every baseline and gets advantage 0. Returns [u], or [m] where
credit is by token.

Where spread divides, it is the unbiased standard deviation (n - 1, as torch.std, which the libraries people compare
with use) plus epsilon, the same 1e-4 in all rows. Its size matters only for groups that are almost constant: 1e-4 keeps
differences far below it (rounding, a tiny length penalty) from being blown up to unit size, as 1e-9 would. A group
whose known rewards are all equal, or are fewer than two, has nothing to compare and gets exactly 0, not rounding over
epsilon.
"""

from __future__ import annotations

from math import comb, sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.core.errors import ConfigError, DataError
from burnish.core.table import About, Table
from burnish.maths.units import last_of_unit, numbered, suffix_sum, totals, varies

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


# ---- a baseline from elsewhere --------------------------------------------------------------------------------------


def none(reward: Float[Tensor, "u"], known: Bool[Tensor, "u"]) -> Float[Tensor, "u"]:
    """The reward itself, without a baseline: A_i = r_i      (Williams 1992; no paper on arXiv)."""
    return torch.where(known, reward, 0.0)


def ema(reward: Float[Tensor, "u"], known: Bool[Tensor, "u"], reward_trace: Float[Tensor, "2"]) -> Float[Tensor, "u"]:
    """Against the exponential moving average of the rewards of *earlier* batches: A_i = r_i - b.

    b = trace[0] / trace[1], 0 before the first batch; `next_trace` moves it on      (a baseline of arXiv:2402.14740)
    Beside `batch_mean`: the baseline does not contain the reward it is subtracted from, so the gradient is unbiased.
    """
    baseline = torch.where(reward_trace[1] > 0, reward_trace[0] / reward_trace[1].clamp(min=1e-300), 0.0)
    return torch.where(known, reward - baseline, 0.0)


def next_trace(
    reward_trace: Float[Tensor, "2"], reward: Float[Tensor, "u"], known: Bool[Tensor, "u"], *, decay: float = 0.95
) -> Float[Tensor, "2"]:
    """The state of `ema` after a batch: (decayed sum of batch means, its weight). It starts as (0, 0).

    trace' = decay * trace + (1 - decay) * (mean r, 1): dividing the two is Adam's correction of the start (section 3,
    arXiv:1412.6980). A batch without a known reward leaves the state as it was. Raises ConfigError for decay outside
    [0, 1).
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"{decay} given, wanted 0 <= decay < 1", where="decay")
    if not bool(known.any()):
        return reward_trace
    mean = reward[known].mean()
    return decay * reward_trace + (1 - decay) * torch.stack([mean, torch.ones_like(mean)])


def batch_mean(reward: Float[Tensor, "u"], known: Bool[Tensor, "u"]) -> Float[Tensor, "u"]:
    """Against the mean of the batch, own reward included: A_i = r_i - mean r      (no paper; the classical choice).

    Beside `group_centred`: one group, whatever the prompts were. Shrinks the expected gradient by (n - 1) / n where all
    units share a prompt.
    """
    return group_centred(reward, known, torch.zeros_like(known, dtype=torch.long))


def greedy_baseline(
    reward: Float[Tensor, "u"], known: Bool[Tensor, "u"], greedy_reward: Float[Tensor, "u"]
) -> Float[Tensor, "u"]:
    """Against the reward of the policy's own greedy answer to the same prompt: A_i = r_i - r(greedy).

    (Self-critical training, arXiv:1612.00563; ReMax, arXiv:2310.10505.) Unbiased: the baseline does not
    depend on the sample. A unit whose greedy answer was not scored is not `known`.
    """
    return torch.where(known, reward - greedy_reward, 0.0)


# ---- a baseline from the group --------------------------------------------------------------------------------------


def leave_one_out(reward: Float[Tensor, "u"], known: Bool[Tensor, "u"], group: Int[Tensor, "u"]) -> Float[Tensor, "u"]:
    """Against the mean of the *other* samples of the prompt: A_i = r_i - mean over j != i of r_j.

    = n / (n - 1) * (r_i - mean r)      (RLOO: arXiv:2402.14740)
    Beside `group_centred`: unbiased, because b_i does not contain r_i.
    """
    index, size, _, live = _groups(reward, known, group)
    return torch.where(live, group_centred(reward, known, group) * size[index] / (size[index] - 1), 0.0)


def group_centred(reward: Float[Tensor, "u"], known: Bool[Tensor, "u"], group: Int[Tensor, "u"]) -> Float[Tensor, "u"]:
    """Against the mean of the group, not divided by its spread: A_i = r_i - mean r.

    (Dr. GRPO: section 3.2, arXiv:2503.20783.) Beside `group_standardised`: easy and hard prompts, whose rewards spread
    little, do not weigh more. Its expectation is (n - 1) / n of the exact gradient.
    """
    index, _, mean, live = _groups(reward, known, group)
    return torch.where(live, reward - mean[index], 0.0)


def group_standardised(
    reward: Float[Tensor, "u"], known: Bool[Tensor, "u"], group: Int[Tensor, "u"], *, epsilon: float = 1e-4
) -> Float[Tensor, "u"]:
    """In standard deviations of the group: A_i = (r_i - mean r) / (std r + epsilon).

    (GRPO: section 4.1.2, arXiv:2402.03300; std and epsilon as this module says.) Beside `group_centred`: biased,
    because the spread that divides depends on the sample.
    """
    index, size, _, live = _groups(reward, known, group)
    centred = group_centred(reward, known, group)
    deviation = (totals(centred**2, index, len(size)) / (size - 1).clamp(min=1)).sqrt()
    return torch.where(live, centred / (deviation[index] + epsilon), 0.0)


def length_weighted_optimal(
    reward: Float[Tensor, "u"], known: Bool[Tensor, "u"], group: Int[Tensor, "u"], length: Int[Tensor, "u"]
) -> Float[Tensor, "u"]:
    """Against the mean of the group weighted by length: A_i = r_i - sum l_j r_j / sum l_j.

    (OPO: arXiv:2505.23585.) The baseline of least variance where the squared norm of a completion's gradient grows
    with its length. Beside `group_centred`: equal to it at equal lengths. `length` counts a unit's labels.
    """
    index, size, _, live = _groups(reward, known, group)
    share = torch.where(known, length, 0).to(reward.dtype)
    sums = totals(share * torch.where(known, reward, 0.0), index, len(size))
    baseline = sums / totals(share, index, len(size)).clamp(min=1)
    return torch.where(live, reward - baseline[index], 0.0)


def per_reward_normalised(
    rewards: Float[Tensor, "u c"],
    rewards_known: Bool[Tensor, "u c"],
    group: Int[Tensor, "u"],
    component_weight: Float[Tensor, "c"],
    *,
    epsilon: float = 1e-4,
) -> Float[Tensor, "u"]:
    """Each reward in its own group standard deviations, summed, then scaled by the spread over the batch.

    S_i = sum_c w_c (r_ic - mean r_c) / (std r_c + epsilon),   A_i = S_i / (std S + epsilon)   (GDPO: arXiv:2601.05242)
    Beside `group_standardised` of the sum: a reward of small range is not drowned, and (1, 0) differs from (0, 1). The
    paper also subtracts the batch mean of S, which is zero by construction; leaving it out keeps dead groups at
    exactly 0.
    """
    columns = [
        weight * group_standardised(rewards[:, c], rewards_known[:, c], group, epsilon=epsilon)
        for c, weight in enumerate(component_weight)
    ]
    total = torch.stack(columns).sum(0)
    counted = total[rewards_known.any(1)]
    return total / (counted.std() + epsilon) if len(counted) > 1 else torch.zeros_like(total)


def pass_at_k(
    reward: Float[Tensor, "u"], known: Bool[Tensor, "u"], group: Int[Tensor, "u"], *, pass_k: int = 4
) -> Float[Tensor, "u"]:
    """Credit for what k samples together would earn: the group-standardised maximum, averaged over all k-subsets.

    With N samples, W of them wrong:  R = 1 - C(W, k) / C(N, k),  sigma = sqrt(R (1 - R))
    A(right) = (1 - R) / sigma,   A(wrong) = (1 - R - C(W-1, k-1) / C(N-1, k-1)) / sigma     (arXiv:2508.10751)
    Beside `group_standardised` (k = 1, up to its unbiased deviation): easy prompts stop counting once k samples
    suffice. Raises DataError for a known reward that is neither 0 nor 1 and ConfigError where a group is smaller than
    k.
    """
    if bool((known & (reward != 0) & (reward != 1)).any()):
        raise DataError("a reward is neither 0 nor 1", where="pass_at_k", remedy="use group_standardised")
    index, size, mean, live = _groups(reward, known, group)
    if pass_k < 1 or bool(((size > 0) & (size < pass_k)).any()):
        given = f"{pass_k} given, the smallest group has {int(size[size > 0].min())} scored samples"
        raise ConfigError(given, where="pass_k", remedy="give at least 1 and at most the group size")
    right, wrong = torch.zeros_like(mean), torch.zeros_like(mean)
    for g, (n, share) in enumerate(zip(_numbers(size), _numbers(mean), strict=True)):
        total, bad = round(n), round(n * (1 - share))
        if 0 < bad < total and (fails := comb(bad, pass_k) / comb(total, pass_k)) > 0:  # else every subset passes
            sigma = sqrt(fails * (1 - fails))
            right[g] = fails / sigma
            wrong[g] = (fails - comb(bad - 1, pass_k - 1) / comb(total - 1, pass_k - 1)) / sigma
    return torch.where(live, torch.where(reward == 1, right[index], wrong[index]), 0.0)


# ---- credit by token ------------------------------------------------------------------------------------------------


def to_go(token_reward: Float[Tensor, "m"], unit: Int[Tensor, "m"], *, gamma: float = 1.0) -> Float[Tensor, "m"]:
    """The rewards from a token on: A_t = sum over i >= t of gamma^(i - t) r_i      (REINFORCE++: arXiv:2501.03262)."""
    return suffix_sum(token_reward, unit, gamma)


def gae(
    token_reward: Float[Tensor, "m"],
    value: Float[Tensor, "m"],
    unit: Int[Tensor, "m"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Float[Tensor, "m"]:
    """Generalised advantage estimation over the critic's values, `value[t]` being that of the state before token t.

    A_t = sum_k (gamma lam)^k delta_(t+k),   delta_t = r_t + gamma V_(t+1) - V_t,   V = 0 after the last token
    (eq. 16, arXiv:1506.02438.) lam = 1 is the return minus V, lam = 0 the TD error. Beside `to_go`: less variance, and
    bias wherever the critic is wrong and lam < 1.
    """
    following = torch.where(last_of_unit(unit), 0.0, value.roll(-1))
    return suffix_sum(token_reward + gamma * following - value, unit, gamma * lam)


def process(
    step_reward: Float[Tensor, "p"],
    step_known: Bool[Tensor, "p"],
    step_end: Int[Tensor, "p"],
    group: Int[Tensor, "u"],
    unit: Int[Tensor, "m"],
    *,
    epsilon: float = 1e-4,
) -> Float[Tensor, "m"]:
    """Step rewards in standard deviations over *all* the group's steps; a token gets those of the steps that end after it.

    A_t = sum over steps j with end(j) >= t of (r_j - mean r) / (std r + epsilon)      (section 4.1.3, arXiv:2402.03300)
    `step_end` is the entry of a step's last label. Beside `group_standardised`: equal to it where each unit has one
    step, ending at its last token. Raises DataError where a step ends outside the batch.
    """
    if bool(((step_end < 0) | (step_end >= len(unit))).any()):
        raise DataError(f"a step ends outside entries 0 .. {len(unit) - 1}", where="step_end")
    credit = group_standardised(step_reward, step_known, group[unit[step_end]], epsilon=epsilon)
    return suffix_sum(totals(credit, step_end, len(unit)), unit)


# ---- over the whole batch -------------------------------------------------------------------------------------------


def whiten(advantage: Float[Tensor, "k"], counted: Bool[Tensor, "k"], *, epsilon: float = 1e-4) -> Float[Tensor, "k"]:
    """To mean 0 and deviation 1 over the batch: (A - mean A) / (std A + epsilon), over units or over tokens.

    (REINFORCE++: arXiv:2501.03262; PPO implementations do the same.) What is not counted gets 0, as do all where
    the counted are equal. Biased: mean and deviation contain the sample.
    """
    return group_standardised(advantage, counted, torch.zeros_like(counted, dtype=torch.long), epsilon=epsilon)


def _groups(reward: Tensor, known: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(index [u], known rewards of a group [g], their mean [g], whether a unit is known and its group varies [u])."""
    index, count = numbered(group)
    size = totals(known.to(reward.dtype), index, count)
    mean = totals(torch.where(known, reward, 0.0), index, count) / size.clamp(min=1)
    return index, size, mean, known & varies(reward, known, group)


def _numbers(values: Any) -> list[float]:
    return values.tolist()  # untyped in torch


ADVANTAGES = Table(
    "advantage",
    {
        "none": none,
        "ema": ema,
        "batch_mean": batch_mean,
        "greedy_baseline": greedy_baseline,
        "leave_one_out": leave_one_out,
        "group_centred": group_centred,
        "group_standardised": group_standardised,
        "length_weighted_optimal": length_weighted_optimal,
        "per_reward_normalised": per_reward_normalised,
        "pass_at_k": pass_at_k,
        "to_go": to_go,
        "gae": gae,
        "process": process,
    },
    also={
        "rloo": "leave_one_out",
        "grpo": "group_standardised",
        "grpo_passk": "pass_at_k",
        "remax": "greedy_baseline",
        "opo": "length_weighted_optimal",
        "gdpo": "per_reward_normalised",
        "reinforce_plus_plus": "to_go",
    },
    about={
        "none": About(taxonomy=("F4",)),
        "ema": About(taxonomy=("F4",), paper="arXiv:2402.14740", year=2024),
        "batch_mean": About(taxonomy=("F4",)),
        "greedy_baseline": About(taxonomy=("F6", "P12"), paper="arXiv:1612.00563", year=2016),
        "leave_one_out": About(taxonomy=("P10",), paper="arXiv:2402.14740", year=2024),
        "group_centred": About(taxonomy=("Z2",), paper="arXiv:2503.20783", year=2025),
        "group_standardised": About(taxonomy=("P8",), paper="arXiv:2402.03300", year=2024),
        "length_weighted_optimal": About(taxonomy=("Z9",), paper="arXiv:2505.23585", year=2025),
        "per_reward_normalised": About(taxonomy=("Z8", "R20"), paper="arXiv:2601.05242", year=2026),
        "pass_at_k": About(taxonomy=("Z18",), paper="arXiv:2508.10751", year=2025),
        "to_go": About(taxonomy=("P11",), paper="arXiv:2501.03262", year=2025),
        "gae": About(taxonomy=("P1",), paper="arXiv:1506.02438", year=2015),
        "process": About(taxonomy=("P9",), paper="arXiv:2402.03300", year=2024),
    },
)
