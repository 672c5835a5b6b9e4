"""What is left out of the loss: masks, True where it counts, never tensors of another shape.

Axes: m entries, u units. A sequence filter takes whole completions out, their KL included; a token filter stops the
policy term of single labels, whose KL to a reference is still paid. Both leave the weights alone: what is left out
stays in the normaliser, so a filter never makes the rest louder. Rows take what they need by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.core.table import About, Table
from burnish.maths.divergences import covariance, share_of
from burnish.maths.entropies import top_entropy
from burnish.maths.units import unit_mean, varies

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def dead_groups(reward: Float[Tensor, "u"], known: Bool[Tensor, "u"], group: Int[Tensor, "u"]) -> Bool[Tensor, "u"]:
    """Keep groups whose known rewards differ; all right or all wrong says nothing of what was better.

    (Dynamic sampling: section 3.2, arXiv:2503.14476, which also draws others in their place.) Advantages within a
    group are zero there already: this also stops the KL to the reference, and baselines from outside the group.
    """
    return varies(reward, known, group)


def truncated(finished: Bool[Tensor, "u"]) -> Bool[Tensor, "u"]:
    """Keep completions that ended by themselves; one cut at the length limit was never judged on its end.

    (Overlong filtering: section 3.4, arXiv:2503.14476.)
    """
    return finished


def off_policy(
    logprobs: Float[Tensor, "m"],
    sampler_logprobs: Float[Tensor, "m"],
    advantage: Float[Tensor, "m"],
    unit: Int[Tensor, "m"],
    *,
    off_policy_limit: float = 0.5,
) -> Bool[Tensor, "m"]:
    """Drop sequences of negative advantage that the policy has left: mean_t log(p_sampler / p) > limit.

    (Off-policy sequence masking: eq. 9, arXiv:2512.02556, which prints no limit.) What it would push down further is
    already unlikely. Raises ConfigError for a limit that is not positive.
    """
    if not off_policy_limit > 0:
        raise ConfigError(f"{off_policy_limit} given, wanted a positive number", where="off_policy_limit")
    gap = unit_mean(sampler_logprobs - logprobs.detach(), unit)
    return (advantage >= 0) | (gap <= off_policy_limit)


def clip_cov(
    old_logprobs: Float[Tensor, "m"],
    advantage: Float[Tensor, "m"],
    noise: Float[Tensor, "m"],
    *,
    cov_share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
) -> Bool[Tensor, "m"]:
    """Drop a few tokens at random among those whose covariance of log-prob and advantage lies in (low, high).

    (Clip-Cov: arXiv:2505.22617.) `noise` is uniform, one number a token: the smallest are dropped, a share of the
    batch and at least one, so the choice is reproducible. Covariance as in `divergences.high_covariance`.
    Raises ConfigError for a share outside (0, 1] or an empty interval.
    """
    if not cov_low < cov_high:
        raise ConfigError(f"({cov_low}, {cov_high}) holds nothing", where="cov_low, cov_high")
    found = covariance(old_logprobs, advantage)
    eligible = (found > cov_low) & (found < cov_high)
    keep = torch.ones_like(eligible)
    order = torch.where(eligible, noise, float("inf")).argsort(stable=True)
    keep[order[: min(share_of(len(found), cov_share), int(eligible.sum()))]] = False
    return keep


def soft_overlong(length: Int[Tensor, "u"], *, longest: int, cushion: int) -> Float[Tensor, "u"]:
    """What is added to the reward of a long completion: 0 to -1 over the last `cushion` tokens, -1 beyond.

    0 for l <= longest - cushion;  ((longest - cushion) - l) / cushion up to longest;  -1 above   (eq. 13, arXiv:2503.14476)
    A shaping of the reward, not a filter. Raises ConfigError unless 1 <= cushion <= longest.
    """
    if not 1 <= cushion <= longest:
        raise ConfigError(
            f"longest {longest}, cushion {cushion} given, wanted 1 <= cushion <= longest", where="soft_overlong"
        )
    return ((longest - cushion - length) / cushion).clamp(-1.0, 0.0)


SEQUENCE_FILTERS = Table(
    "sequence_filters",
    {"dead_groups": dead_groups, "truncated": truncated},
    also={"filter_groups": "dead_groups", "mask_truncated_completions": "truncated"},
    about={
        "dead_groups": About(taxonomy=("Z1",), paper="arXiv:2503.14476", year=2025),
        "truncated": About(taxonomy=("Z1",), paper="arXiv:2503.14476", year=2025),
    },
)

TOKEN_FILTERS = Table(
    "token_filters",
    {"off_policy": off_policy, "top_entropy": top_entropy, "clip_cov": clip_cov},
    also={"off_policy_mask_threshold": "off_policy", "top_entropy_quantile": "top_entropy"},
    about={
        "off_policy": About(taxonomy=("Z14",), paper="arXiv:2512.02556", year=2025),
        "top_entropy": About(taxonomy=("Z11",), paper="arXiv:2506.01939", year=2025),
        "clip_cov": About(taxonomy=("Z11",), paper="arXiv:2505.22617", year=2025),
    },
)
