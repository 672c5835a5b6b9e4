"""Log-ratios of policy to old policy, and weights that correct for a sampler that is not quite the old policy.

Axes: m entries. A ratio is returned as its logarithm and carries the gradient; a correction carries none. Both take
what they need by name. "Old" is the policy at the start of the optimiser batch, "sampler" what drew the tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.core.table import About, Table
from burnish.maths.units import numbered, totals, unit_mean

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def none(logprobs: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Ratio 1 with the score function's gradient: log rho = log p - sg[log p].

    d rho / d theta = d log p / d theta      (arXiv:1506.05254)
    For one optimiser step on fresh samples; beside `token` it needs no old log-probs and no clip can bind.
    """
    return logprobs - logprobs.detach()


def token(logprobs: Float[Tensor, "m"], old_logprobs: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """One ratio a token: log rho_t = log p(y_t) - log p_old(y_t)      (eq. 6, arXiv:1707.06347).

    The denominator is the *old* policy; a survey prints the reference there, whose KL is another term.
    """
    return logprobs - old_logprobs


def sequence(
    logprobs: Float[Tensor, "m"], old_logprobs: Float[Tensor, "m"], unit: Int[Tensor, "m"]
) -> Float[Tensor, "m"]:
    """One ratio a sequence, per token of length: log s = (1 / |y|) sum_t (log p(y_t) - log p_old(y_t)), at every token.

    (GSPO: eq. 7, arXiv:2507.18071.) Beside `token`: clipping keeps or drops whole sequences; equal to it at |y| = 1.
    """
    return unit_mean(logprobs - old_logprobs, unit)


def sequence_token(
    logprobs: Float[Tensor, "m"], old_logprobs: Float[Tensor, "m"], unit: Int[Tensor, "m"]
) -> Float[Tensor, "m"]:
    """The value of `sequence` with the gradient of the token: log s_t = sg[log s] + log p(y_t) - sg[log p(y_t)].

    (GSPO-token: eq. 14, arXiv:2507.18071.) Beside `sequence`: advantages may differ from token to token; where they do
    not, and tokens of a sequence weigh alike, loss and gradient are the same.
    """
    return sequence(logprobs, old_logprobs, unit).detach() + logprobs - logprobs.detach()


RATIOS = Table(
    "ratio",
    {"none": none, "token": token, "sequence": sequence, "sequence_token": sequence_token},
    also={"gspo": "sequence", "gspo_token": "sequence_token", "ppo": "token"},
    about={
        "none": About(taxonomy=("F4",), paper="arXiv:1506.05254", year=2015),
        "token": About(taxonomy=("P2",), paper="arXiv:1707.06347", year=2017),
        "sequence": About(taxonomy=("Z3",), paper="arXiv:2507.18071", year=2025),
        "sequence_token": About(taxonomy=("Z3",), paper="arXiv:2507.18071", year=2025),
    },
)


# ---- the sampler is not the trainer ---------------------------------------------------------------------------------


def uncorrected(unit: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Take the sampler for the old policy: weight 1 (no paper)."""
    return torch.ones_like(unit, dtype=torch.float64)


def truncated(
    old_logprobs: Float[Tensor, "m"], sampler_logprobs: Float[Tensor, "m"], *, correction_high: float = 2.0
) -> Float[Tensor, "m"]:
    """Importance weight of trainer over sampler, cut above: w_t = min(p_old(y_t) / p_sampler(y_t), high).

    (Truncated importance sampling: Ionides 2008, JCGS 17:295; for trainer and sampler: Yao et al. 2025, no paper.)
    Biased only where the cut binds; beside `masked` a token that is cut still counts.
    """
    return (old_logprobs - sampler_logprobs).exp().clamp(max=_positive(correction_high))


def masked(
    old_logprobs: Float[Tensor, "m"],
    sampler_logprobs: Float[Tensor, "m"],
    *,
    correction_low: float = 0.5,
    correction_high: float = 5.0,
) -> Float[Tensor, "m"]:
    """The same weight, but zero outside [low, high]: a token on which the two disagree too far is not trained.

    w_t = rho_t [low <= rho_t <= high],   rho_t = p_old(y_t) / p_sampler(y_t)      (IcePop: arXiv:2510.18855)
    """
    return _inside((old_logprobs - sampler_logprobs).exp(), correction_low, correction_high)


def sequence_truncated(
    old_logprobs: Float[Tensor, "m"],
    sampler_logprobs: Float[Tensor, "m"],
    unit: Int[Tensor, "m"],
    *,
    correction_high: float = 2.0,
) -> Float[Tensor, "m"]:
    """`truncated` of whole sequences: w = min(prod_t p_old(y_t) / p_sampler(y_t), high), at every token (no paper).

    Beside `truncated`: the exact weight of a sequence where the cut does not bind, and more variance.
    """
    return _product(old_logprobs, sampler_logprobs, unit).clamp(max=_positive(correction_high))


def sequence_masked(
    old_logprobs: Float[Tensor, "m"],
    sampler_logprobs: Float[Tensor, "m"],
    unit: Int[Tensor, "m"],
    *,
    correction_low: float = 0.0,
    correction_high: float = 2.0,
) -> Float[Tensor, "m"]:
    """`masked` of whole sequences: the sequence's weight inside [low, high], else no token of it counts (no paper)."""
    return _inside(_product(old_logprobs, sampler_logprobs, unit), correction_low, correction_high)


def _product(old_logprobs: Tensor, sampler_logprobs: Tensor, unit: Tensor) -> Tensor:
    index, count = numbered(unit)
    return totals(old_logprobs - sampler_logprobs, index, count).exp()[index]


def _inside(weight: Tensor, low: float, high: float) -> Tensor:
    if not 0 <= low < _positive(high):
        raise ConfigError(f"[{low}, {high}] holds no weight", where="correction_low", remedy="wanted 0 <= low < high")
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)


def _positive(high: float) -> float:
    if not high > 0:
        raise ConfigError(f"{high} given, wanted a positive number", where="correction_high")
    return high


CORRECTIONS = Table(
    "correction",
    {
        "none": uncorrected,
        "truncated": truncated,
        "masked": masked,
        "sequence_truncated": sequence_truncated,
        "sequence_masked": sequence_masked,
    },
    also={"tis": "truncated", "icepop": "masked", "token_truncate": "truncated", "token_mask": "masked"},
    about={
        "truncated": About(taxonomy=("Z13",), year=2025),
        "masked": About(taxonomy=("Z13",), paper="arXiv:2510.18855", year=2025),
        "sequence_truncated": About(taxonomy=("Z13",), year=2025),
        "sequence_masked": About(taxonomy=("Z13",), year=2025),
    },
)
