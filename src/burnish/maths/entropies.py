"""Entropy of the policy: exact from logits, with its gradient, and coefficients of a bonus that adapt.

Axes: n rows, v vocabulary, m entries, u units. A bonus needs the distribution: - log p of the sampled token estimates
the entropy, but its gradient, E[d log p] = 0, is no gradient of the entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def entropy(logits: Float[Tensor, "n v"]) -> Float[Tensor, "n"]:
    """H = - sum_v p log p = logsumexp z - sum_v p z, in nats, at least fp32 (Shannon 1948, no paper).

    A logit of -inf (a masked token) has p log p = 0.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = z - z.amax(-1, keepdim=True)  # else logsumexp - sum p z cancels where logits are large
    probs = z.softmax(-1)
    return z.logsumexp(-1) - (probs * z.masked_fill(probs == 0, 0.0)).sum(-1)


def d_entropy(
    logits: Float[Tensor, "n v"], probs: Float[Tensor, "n v"], entropy: Float[Tensor, "n"]
) -> Float[Tensor, "n v"]:
    """d H / d logits = - p (log p + H), from the chunk's logits, their softmax and their entropy."""
    log_p = logits.to(probs.dtype) - logits.to(probs.dtype).logsumexp(-1, keepdim=True)
    return -probs * (log_p.masked_fill(probs == 0, 0.0) + entropy[:, None])


def variance_coef(
    reward: Float[Tensor, "u"], known: Bool[Tensor, "u"], *, largest: float = 0.01, steepness: float = 1.0
) -> float:
    """The bonus of a batch, small where rewards spread: lambda = largest * exp(- steepness * Var(r)).

    (Eq. 22, arXiv:2503.06072: that survey's own idea, which it lays to DeepSeek-R1 without ground.) Biased variance
    over the known rewards: one reward has none. Raises DataError where no reward is known.
    """
    if not bool(known.any()):
        raise DataError("no reward is known", where="variance_coef")
    return largest * exp(-steepness * float(reward[known].var(unbiased=False)))


@dataclass(frozen=True)
class EntropyControl:
    """State of the target controller: the coefficient, and whether the last measured entropy called for it."""

    coef: float = 0.0
    active: bool = True

    @property
    def applied(self) -> float:
        """What multiplies the entropy of the next step."""
        return self.coef if self.active else 0.0


def next_control(
    state: EntropyControl,
    measured: float,
    *,
    target: float = 0.2,
    step: float = 0.005,
    smallest: float = 0.0,
    largest: float = 0.02,
) -> EntropyControl:
    """The bonus moved by a constant step towards a target entropy, and applied only at or below it.

    c' = clip(c + step) where H <= target, clip(c - step) where H > target; applied = c' [H <= target]
    (Skywork-OR1: arXiv:2505.22312.) Beside `variance_coef`: it looks at the entropy itself.
    Raises ConfigError unless 0 <= smallest <= largest and step > 0.
    """
    if not (0 <= smallest <= largest and step > 0):
        raise ConfigError(
            f"step {step}, [{smallest}, {largest}] given, wanted step > 0 and 0 <= smallest <= largest",
            where="entropy controller",
        )
    below = measured <= target
    return EntropyControl(min(largest, max(smallest, state.coef + (step if below else -step))), below)


def top_entropy(entropy: Float[Tensor, "m"], *, entropy_share: float = 0.2) -> Bool[Tensor, "m"]:
    """Keep the policy term of the tokens of highest entropy over the batch: H_t >= its (1 - share) quantile.

    (arXiv:2506.01939: a fifth of the tokens, the forks, is enough.) At least one token, and all that tie with the
    last one kept. Raises ConfigError for a share outside (0, 1].
    """
    if not 0 < entropy_share <= 1:
        raise ConfigError(f"{entropy_share} given, wanted a share in (0, 1]", where="entropy_share")
    kept = max(1, ceil(round(len(entropy) * entropy_share, 9)))
    return entropy >= entropy.topk(min(kept, len(entropy))).values[-1] if len(entropy) else entropy > 0
