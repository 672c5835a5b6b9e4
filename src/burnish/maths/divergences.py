"""KL between policies: estimates from sampled tokens, exact values, and coefficients that adapt.

Axes: m entries, u units, n distributions, v vocabulary. With x = log p - log q, p the policy, q the reference, and
tokens drawn from p, E[k1] = E[k3] = KL(p || q); k2 is biased in value. What is *differentiated* matters more than the
value:

    in the reward   the score function multiplies the estimate, so only k1 gives the gradient of KL(p || q);
    in the loss     the estimate itself is differentiated: k2 gives the gradient of KL(p || q), k3 that of KL(q || p),
                    and k1 nothing at all, E[d log p] = 0; `k3_unbiased` carries the ratio and gives that of KL(p || q).

(arXiv:2506.09477 works these out; tests/maths/test_divergences.py enumerates them.)
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.core.table import About, Table
from burnish.maths.units import last_of_unit, totals

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def k1(logprobs: Float[Tensor, "m"], ref_logprobs: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """The log-ratio itself: x = log p - log q; unbiased, and negative as often as not (Schulman 2020, no paper)."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "m"], ref_logprobs: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Half the squared log-ratio: x^2 / 2; biased in value, right in gradient on p's tokens (Schulman 2020, no paper)."""
    return (logprobs - ref_logprobs) ** 2 / 2


def k3(logprobs: Float[Tensor, "m"], ref_logprobs: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Unbiased and never negative: e^(-x) - 1 + x = q/p - log(q/p) - 1      (eq. 4, arXiv:2402.03300)."""
    x = logprobs - ref_logprobs
    return torch.expm1(-x) + x


def k3_unbiased(
    logprobs: Float[Tensor, "m"], ref_logprobs: Float[Tensor, "m"], log_ratio: Float[Tensor, "m"]
) -> Float[Tensor, "m"]:
    """`k3` times the ratio to the old policy, which carries gradient: rho (q/p - log(q/p) - 1)      (arXiv:2512.02556).

    Beside `k3`: unbiased for tokens of the old policy, in value and in gradient.
    """
    return log_ratio.exp() * k3(logprobs, ref_logprobs)


def exact_kl(p: Float[Tensor, "n v"], q: Float[Tensor, "n v"]) -> Float[Tensor, "n"]:
    """KL(p || q) = sum_v p (log p - log q), from log-probs; 0 log 0 = 0 (Kullback and Leibler 1951, no paper)."""
    return torch.where(p > -float("inf"), p.exp() * (p - q), 0.0).sum(-1)


def exact_jsd(p: Float[Tensor, "n v"], q: Float[Tensor, "n v"]) -> Float[Tensor, "n"]:
    """(KL(p || (p+q)/2) + KL(q || (p+q)/2)) / 2, from log-probs: symmetric, at most log 2 (Lin 1991, no paper)."""
    middle = torch.logaddexp(p, q) - log(2)
    return (exact_kl(p, middle) + exact_kl(q, middle)) / 2


KLS = Table(
    "kl",
    {"k1": k1, "k2": k2, "k3": k3, "k3_unbiased": k3_unbiased},
    also={"kl": "k1", "mse": "k2", "low_var_kl": "k3", "use_bias_correction_kl": "k3_unbiased"},
    about={
        "k1": About(taxonomy=("R12",), year=2020),
        "k2": About(taxonomy=("R12",), year=2020),
        "k3": About(taxonomy=("R12", "P8"), paper="arXiv:2402.03300", year=2024),
        "k3_unbiased": About(taxonomy=("Z14",), paper="arXiv:2512.02556", year=2025),
    },
)


# ---- placed in the reward -------------------------------------------------------------------------------------------


def token_rewards(reward: Float[Tensor, "u"], unit: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
    """A reward a token: the unit's at its last, 0 before. A unit without labels has no token to carry its reward."""
    return torch.where(last_of_unit(unit), reward[unit], 0.0)


def with_kl(columns: Mapping[str, Tensor], token_kl: Float[Tensor, "m"], kl_coef: float) -> dict[str, Tensor]:
    """`token_reward` [m] and, where there is one, `reward` [u] with the KL to the reference taken out of them.

    r'_t = r_t - kl_coef * KL_t by token, r' = r - kl_coef * sum_t KL_t by unit      (eq. 2, arXiv:1909.08593)
    What is paid by the token is `token_reward` where an environment gives one, else `token_rewards`.
    """
    unit, cost, out = columns["unit"], kl_coef * token_kl, dict[str, Tensor]()
    if "reward" in columns:
        reward = columns["reward"]
        out["reward"] = reward - totals(cost.to(reward), unit, len(reward))
    paid = columns["token_reward"] if "token_reward" in columns else token_rewards(columns["reward"], unit)
    return {**out, "token_reward": paid - cost.to(paid)}


# ---- coefficients that adapt: state in, state out -------------------------------------------------------------------


def proportional_coef(kl_coef: float, kl: float, *, target: float, gain: float = 0.1) -> float:
    """The next coefficient, moved by the relative error: beta' = beta (1 + gain * clip(KL / target - 1, -0.2, 0.2)).

    (Section 2.2, arXiv:1909.08593.) Raises ConfigError for a target or coefficient that is not positive: 0 stays 0
    for ever.
    """
    _positive(kl_coef, target)
    return kl_coef * (1 + gain * min(0.2, max(-0.2, kl / target - 1)))


def doubling_coef(penalty_coef: float, kl: float, *, target: float) -> float:
    """The next coefficient of `kl_penalty`: halved where KL < target / 1.5, doubled where KL > 1.5 target.

    (Section 4, arXiv:1707.06347.) Raises ConfigError for a target or coefficient that is not positive.
    """
    _positive(penalty_coef, target)
    return penalty_coef / 2 if kl < target / 1.5 else penalty_coef * 2 if kl > target * 1.5 else penalty_coef


def _positive(coef: float, target: float) -> None:
    if not (coef > 0 and target > 0):
        raise ConfigError(f"coefficient {coef}, target {target} given, wanted positive numbers", where="kl controller")


# ---- which tokens would take the entropy ----------------------------------------------------------------------------


def covariance(logprobs: Float[Tensor, "m"], advantage: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Each token's part of the covariance of log-prob and advantage: (log p_t - mean log p) (A_t - mean A).

    Its mean is, to first order, what one step of policy gradient takes from the entropy (arXiv:2505.22617). Means
    are over the whole optimiser batch.
    """
    return (logprobs - logprobs.mean()) * (advantage - advantage.mean())


def high_covariance(
    old_logprobs: Float[Tensor, "m"], advantage: Float[Tensor, "m"], *, cov_share: float = 2e-4
) -> Bool[Tensor, "m"]:
    """True for the tokens of highest `covariance`, a share of the batch and at least one: those `kl_cov` prices.

    (KL-Cov, arXiv:2505.22617: 2e-3 for 7B, 2e-4 for 32B.) Log-probs are those at the start of the batch, so that
    the choice does not depend on micro-batches. A token whose covariance is not positive is never among them: it takes
    no entropy. Raises ConfigError for a share outside (0, 1].
    """
    found = covariance(old_logprobs, advantage)
    chosen = torch.zeros_like(found, dtype=torch.bool)
    top = found.topk(share_of(len(found), cov_share)).indices
    chosen[top] = found[top] > 0
    return chosen


def share_of(count: int, share: float) -> int:
    """How many of `count` a share is, rounded down, and at least one where there are any. Raises ConfigError."""
    if not 0 < share <= 1:
        raise ConfigError(f"{share} given, wanted a share in (0, 1]", where="cov_share")
    return min(count, max(1, int(count * share)))
