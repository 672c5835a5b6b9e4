"""Objectives that learn from completions somebody else drew, and the classical ones. Unreduced, to be minimised.

Axes: m entries, a actions, u units. An action is what a critic values: a token, a step or a whole response. `action`
numbers the action of each entry 0 .. A - 1 without decreasing, `action_unit` the unit of each action.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.maths.units import last_of_unit, numbered, suffix_sum, totals

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


# ---- OREO -----------------------------------------------------------------------------------------------------------


def oreo_policy(
    logprobs: Float[Tensor, "m"],
    ref_logprobs: Float[Tensor, "m"],
    value: Float[Tensor, "a"],
    reward: Float[Tensor, "u"],
    action: Int[Tensor, "m"],
    action_unit: Int[Tensor, "a"],
    *,
    kl_coef: float = 0.03,
) -> Float[Tensor, "a"]:
    """Squared soft Bellman residual of an action, later actions held still; at its zero the policy is optimal.

    (V(s_a) - R + beta d_a + sg[beta sum_(b > a) d_b])^2,   d_a = log p(a | s_a) - log p_ref(a | s_a), beta = kl_coef
    (OREO: arXiv:2412.16145; R is the unit's outcome, V carries no gradient here.) One action a token, step or
    response gives its three levels. A survey prints it without the stopped sum: that residual is not zero at the
    optimum.
    """
    gap = totals(logprobs - ref_logprobs, action, len(action_unit))
    later = suffix_sum(gap.detach(), action_unit) - gap.detach()
    return (value.detach() - reward[action_unit] + kl_coef * (gap + later)) ** 2


def oreo_value(
    logprobs: Float[Tensor, "m"],
    ref_logprobs: Float[Tensor, "m"],
    value: Float[Tensor, "a"],
    reward: Float[Tensor, "u"],
    action: Int[Tensor, "m"],
    action_unit: Int[Tensor, "a"],
    *,
    kl_coef: float = 0.03,
) -> Float[Tensor, "a"]:
    """The same residual seen from the critic: (V(s_a) - R + sg[beta sum_(b >= a) d_b])^2      (OREO: arXiv:2412.16145).

    Beside `oreo_policy`: equal in value; the gradient goes to V alone.
    """
    gap = totals((logprobs - ref_logprobs).detach(), action, len(action_unit))
    return (value - reward[action_unit] + kl_coef * suffix_sum(gap, action_unit)) ** 2


# ---- A*-PO ----------------------------------------------------------------------------------------------------------


def soft_value(
    reward: Float[Tensor, "u"], known: Bool[Tensor, "u"], group: Int[Tensor, "u"], *, value_coef: float = 0.5
) -> Float[Tensor, "u"]:
    """The optimal value of a prompt from samples of the reference: V* = b log mean exp(r / b), at each unit of a group.

    (A*-PO, stage 1: arXiv:2505.20686; b = value_coef.) Only known rewards count; a group without one gets 0.
    Raises ConfigError for a coefficient that is not positive.
    """
    _positive(value_coef, "value_coef")
    index, count = numbered(group)
    scaled = torch.where(known, reward / value_coef, -float("inf"))
    top = scaled.new_full((count,), -float("inf")).scatter_reduce(0, index, scaled, "amax")
    top = torch.where(top.isfinite(), top, 0.0)
    size = totals(known.to(reward.dtype), index, count)
    mean = totals((scaled - top[index]).exp(), index, count) / size.clamp(min=1)
    return torch.where(size > 0, value_coef * (top + mean.log()), 0.0)[index]


def a_star(
    seq_logprob: Float[Tensor, "u"],
    ref_seq_logprob: Float[Tensor, "u"],
    reward: Float[Tensor, "u"],
    soft_value: Float[Tensor, "u"],
    *,
    kl_coef: float = 1e-3,
) -> Float[Tensor, "u"]:
    """Regress the implied reward onto the optimal advantage: (beta log(p / p_ref) - (r - V*))^2, beta = kl_coef.

    (A*-PO, stage 2: arXiv:2505.20686.) One sample a prompt is enough; zero for every completion at the optimum
    p* = p_ref exp((r - V*) / beta). Raises ConfigError for a coefficient that is not positive.
    """
    _positive(kl_coef, "kl_coef")
    return (kl_coef * (seq_logprob - ref_seq_logprob) - (reward - soft_value)) ** 2


# ---- classical ------------------------------------------------------------------------------------------------------


def minimum_risk(
    seq_logprob: Float[Tensor, "u"],
    cost: Float[Tensor, "u"],
    group: Int[Tensor, "u"],
    *,
    sharpness: float = 5e-3,
) -> Float[Tensor, "u"]:
    """Expected cost under the policy renormalised on a prompt's samples: Q_i * cost_i; summed over a group, its risk.

    Q_i = p(y_i)^alpha / sum_j p(y_j)^alpha      (minimum risk training: arXiv:1512.02433; alpha = sharpness)
    The samples of a group should be distinct. Raises ConfigError for a sharpness that is not positive.
    """
    _positive(sharpness, "sharpness")
    index, count = numbered(group)
    scaled = sharpness * seq_logprob
    top = scaled.detach().new_full((count,), -float("inf")).scatter_reduce(0, index, scaled.detach(), "amax")
    mass = (scaled - top[index]).exp()
    return mass / totals(mass, index, count)[index] * cost


def mixer(unit: Int[Tensor, "m"], *, supervised_tokens: int) -> Bool[Tensor, "m"]:
    """True for the first tokens of each completion, which learn by likelihood; the rest learn by reward.

    (MIXER: arXiv:1511.06732; `supervised_tokens` is its T - Delta.) Raises ConfigError below 0.
    """
    if supervised_tokens < 0:
        raise ConfigError(f"{supervised_tokens} given, wanted 0 or more", where="supervised_tokens")
    index, count = numbered(unit)
    last = last_of_unit(unit).nonzero()[:, 0]
    first = torch.cat([last.new_zeros(1), last[:-1] + 1])[:count]
    return torch.arange(len(unit), device=unit.device) - first[index] < supervised_tokens


def mixer_tokens(step: int, *, longest: int, warmup: int, period: int, fewer: int = 2) -> int:
    """How many tokens learn by likelihood at a step: all of them for `warmup` steps, then `fewer` less every `period`.

    max(0, T - Delta * (1 + floor((step - warmup) / period)))      (MIXER: algorithm 1, arXiv:1511.06732)
    Raises ConfigError unless period and fewer are at least 1.
    """
    if period < 1 or fewer < 1:
        raise ConfigError(f"period {period}, fewer {fewer} given, wanted at least 1", where="mixer_tokens")
    return longest if step < warmup else max(0, longest - fewer * (1 + (step - warmup) // period))


def _positive(value: float, where: str) -> None:
    if not value > 0:
        raise ConfigError(f"{value} given, wanted a positive number", where=where)
