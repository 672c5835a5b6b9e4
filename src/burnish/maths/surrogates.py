"""Surrogates: the loss of each token from its log-ratio and advantage. To be minimised, unreduced.

Axes: m entries. All have the gradient - A d log p at ratio 1; they differ in what becomes of it as the ratio moves
away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.core.table import About, Table
from burnish.maths.units import numbered, totals, unit_mean

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def reinforce(log_ratio: Float[Tensor, "m"], advantage: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Importance-weighted policy gradient, not limited: loss = - rho A.

    With ratio `none` this is REINFORCE, whose gradient is - A d log p   (Williams 1992; off-policy: eq. 6, arXiv:1707.06347)
    """
    return -log_ratio.exp() * advantage


def clip(
    log_ratio: Float[Tensor, "m"],
    advantage: Float[Tensor, "m"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, "m"]:
    """No gain from moving the ratio out of [1 - low, 1 + high]: loss = - min(rho A, clip(rho) A).

    (PPO: eq. 7, arXiv:1707.06347; low and high apart: DAPO, eq. 10, arXiv:2503.14476.) Beside `reinforce`: a token
    that has moved far enough in the direction of its advantage has no gradient; one that moved the wrong way keeps it.
    Raises ConfigError unless 0 <= clip_low <= 1 and clip_high >= 0.
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ConfigError(
            f"[1 - {clip_low}, 1 + {clip_high}] given",
            where="clip_low, clip_high",
            remedy="wanted low in [0, 1], high >= 0",
        )
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def dual_clip(
    log_ratio: Float[Tensor, "m"],
    advantage: Float[Tensor, "m"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> Float[Tensor, "m"]:
    """`clip`, and for A < 0 no more than a ratio of c: loss = min(clip loss, - c A) where A < 0.

    (arXiv:1912.09729; the two-sided delta of arXiv:2505.07291 is the same.) Beside `clip`, which is unbounded for a
    bad token whose ratio has grown. Raises ConfigError unless c > 1 + clip_high.
    """
    if not dual_clip > 1 + clip_high:
        raise ConfigError(f"{dual_clip} given, wanted more than 1 + clip_high = {1 + clip_high}", where="dual_clip")
    loss = clip(log_ratio, advantage, clip_low=clip_low, clip_high=clip_high)
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def cispo(
    log_ratio: Float[Tensor, "m"],
    advantage: Float[Tensor, "m"],
    logprobs: Float[Tensor, "m"],
    *,
    ratio_max: float = 5.0,
) -> Float[Tensor, "m"]:
    """REINFORCE with a cut importance weight that carries no gradient: loss = - sg[min(rho, max)] A log p.

    (MiniMax-M1: eq. 4-5, arXiv:2506.13585, whose lower cut is off; 5 is the value of arXiv:2510.13786.) Beside
    `clip`: no token loses its gradient. Raises ConfigError for a maximum that is not positive.
    """
    if not ratio_max > 0:
        raise ConfigError(f"{ratio_max} given, wanted a positive number", where="ratio_max")
    return -log_ratio.detach().exp().clamp(max=ratio_max) * advantage * logprobs


def sapo(
    log_ratio: Float[Tensor, "m"],
    advantage: Float[Tensor, "m"],
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Float[Tensor, "m"]:
    """A soft gate in place of the clip: loss = - (4 / tau) sigmoid(tau (rho - 1)) A, tau by the sign of A.

    (SAPO: arXiv:2511.20347.) The gradient fades as 4 s (1 - s) rho, s the sigmoid: 1 at ratio 1, never cut to 0.
    Raises ConfigError for a temperature that is not positive.
    """
    if not (tau_positive > 0 and tau_negative > 0):
        raise ConfigError(f"{tau_positive}, {tau_negative} given, wanted positive", where="tau_positive, tau_negative")
    tau = torch.where(advantage > 0, tau_positive, tau_negative).to(log_ratio.dtype)
    return -4 / tau * torch.sigmoid(tau * (log_ratio.exp() - 1)) * advantage


def gmpo(
    log_ratio: Float[Tensor, "m"],
    advantage: Float[Tensor, "m"],
    unit: Int[Tensor, "m"],
    *,
    log_clip: float = 0.4,
) -> Float[Tensor, "m"]:
    """The geometric mean of a sequence's clipped ratios: loss = - A exp((1 / |y|) sum_t l_t), at every token.

    l_t = min(log rho_t, log_clip) where A > 0, max(log rho_t, - log_clip) where A < 0      (GMPO: arXiv:2507.20673)
    Beside `clip`: one outlying token cannot carry the mean. Beside ratio `sequence` with `clip`: tokens are clipped,
    not their mean. Raises ConfigError for a clip that is not positive.
    """
    if not log_clip > 0:
        raise ConfigError(f"{log_clip} given, wanted a positive number", where="log_clip")
    clipped = torch.where(advantage > 0, log_ratio.clamp(max=log_clip), log_ratio.clamp(min=-log_clip))
    return -unit_mean(clipped, unit).exp() * advantage


def vespo(
    log_ratio: Float[Tensor, "m"],
    advantage: Float[Tensor, "m"],
    logprobs: Float[Tensor, "m"],
    unit: Int[Tensor, "m"],
    *,
    shape_positive: float = 2.0,
    rate_positive: float = 3.0,
    shape_negative: float = 3.0,
    rate_negative: float = 2.0,
) -> Float[Tensor, "m"]:
    """REINFORCE weighted by a Gamma curve of the whole sequence's ratio: loss = - sg[phi(W)] A log p.

    phi(W) = W^k exp(l (1 - W)),   W = prod_t rho_t, kept in [1e-8, e^20], k and l by the sign of A   (no paper; as TRL)
    Beside `cispo`: the weight is the sequence's and falls off on both sides of ratio k / l. phi(1) = 1.
    """
    index, count = numbered(unit)
    log_w = totals(log_ratio.detach().clamp(-20, 20), index, count).clamp(-18.420680743952367, 20)[index]
    shape = torch.where(advantage >= 0, shape_positive, shape_negative)
    rate = torch.where(advantage >= 0, rate_positive, rate_negative)
    return -(rate + shape * log_w - rate * log_w.exp()).exp() * advantage * logprobs


def kl_penalty(
    log_ratio: Float[Tensor, "m"], advantage: Float[Tensor, "m"], *, penalty_coef: float = 1.0
) -> Float[Tensor, "m"]:
    """A price on leaving the old policy in place of the clip: loss = - rho A + coef (rho - 1 - log rho).

    The last term estimates KL(old || policy) on tokens of the old policy without bias and is never negative. (PPO with
    adaptive penalty: eq. 8, arXiv:1707.06347; `divergences.doubling_coef` moves the coefficient between batches.)
    """
    return -log_ratio.exp() * advantage + penalty_coef * (torch.expm1(log_ratio) - log_ratio)


def kl_cov(
    log_ratio: Float[Tensor, "m"],
    advantage: Float[Tensor, "m"],
    high_covariance: Bool[Tensor, "m"],
    *,
    cov_penalty: float = 1.0,
) -> Float[Tensor, "m"]:
    """A price on moving the few tokens that would take the most entropy: loss = - rho A + coef |log rho| on those.

    (KL-Cov: arXiv:2505.22617; which tokens: `divergences.high_covariance`.) Beside `kl_penalty`: all
    others are free. The subgradient of |.| at ratio 1 is 0, so the first step on fresh samples is unpenalised.
    """
    return -log_ratio.exp() * advantage + cov_penalty * torch.where(high_covariance, log_ratio.abs(), 0.0)


SURROGATES = Table(
    "surrogate",
    {
        "reinforce": reinforce,
        "clip": clip,
        "dual_clip": dual_clip,
        "cispo": cispo,
        "sapo": sapo,
        "gmpo": gmpo,
        "vespo": vespo,
        "kl_penalty": kl_penalty,
        "kl_cov": kl_cov,
    },
    also={"ppo": "clip", "ppo_clip": "clip", "geo_mean": "gmpo", "delta": "dual_clip"},
    about={
        "reinforce": About(taxonomy=("F4",), year=1992),
        "clip": About(taxonomy=("P2",), paper="arXiv:1707.06347", year=2017),
        "dual_clip": About(taxonomy=("Z12",), paper="arXiv:1912.09729", year=2019),
        "cispo": About(taxonomy=("Z4",), paper="arXiv:2506.13585", year=2025),
        "sapo": About(taxonomy=("Z6",), paper="arXiv:2511.20347", year=2025),
        "gmpo": About(taxonomy=("Z5",), paper="arXiv:2507.20673", year=2025),
        "vespo": About(taxonomy=("Z7",), year=2026),
        "kl_penalty": About(taxonomy=("P3",), paper="arXiv:1707.06347", year=2017),
        "kl_cov": About(taxonomy=("Z11",), paper="arXiv:2505.22617", year=2025),
    },
)
