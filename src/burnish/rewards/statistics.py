"""What a batch of scored samples looks like: plain dictionaries whose keys are in the glossary of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from burnish.core.metrics import emit
from burnish.core.records import Scored


def describe(found: Sequence[Scored]) -> dict[str, Any]:
    """Mean, standard deviation (biased, no epsilon) and range over the values; shares and counts of the rest.

    The mean of no values is None, never 0.
    """
    values = [one.value for one in found if one.value is not None]
    mean = math.fsum(values) / len(values) if values else None
    errors = [one.error for one in found if one.error is not None]
    return emit(
        reward_mean=mean,
        reward_std=None if mean is None else math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)),
        reward_min=min(values, default=None),
        reward_max=max(values, default=None),
        reward_abstained=sum(one.abstains for one in found) / len(found) if found else None,
        reward_timeouts=errors.count("timeout"),
        reward_crashes=errors.count("crash"),
        reward_invalid=errors.count("invalid"),
        reward_infra=errors.count("infra"),
    )


def groups_of(groups: Sequence[int]) -> dict[int, list[int]]:
    """Group -> the indices of its samples, in order."""
    found: dict[int, list[int]] = {}
    for i, of in enumerate(groups):
        found.setdefault(of, []).append(i)
    return found


def _varies(values: Sequence[float]) -> bool:
    """Whether they differ by more than the rounding of a sum of such numbers."""
    return bool(values) and max(values) - min(values) > 1e-9 * max(map(abs, values))


def spread(
    components: Mapping[str, Sequence[Scored | None]], found: Sequence[Scored], groups: Sequence[int]
) -> dict[str, Any]:
    """How many groups teach nothing, and in how many of those the components do differ: they cancel.

    Only groups with two values or more count.
    """
    live = flat = cancelled = 0
    for members in groups_of(groups).values():
        values = [value for i in members if (value := found[i].value) is not None]
        if len(values) < 2:
            continue
        live += 1
        if not _varies(values):
            flat += 1
            parts = [[one.value for i in members if (one := part[i]) and one.value is not None] for part in components.values()]
            cancelled += any(map(_varies, parts))
    return emit(
        reward_flat_groups=flat / live if live else None, reward_cancelled_groups=cancelled / live if live else None
    )


def warnings(stats: Mapping[str, Mapping[str, Any]], overall: Mapping[str, Any], weights: Mapping[str, float]) -> list[str]:
    """What a person should look at, in words."""
    said: list[str] = []
    if overall["reward_cancelled_groups"]:
        share = overall["reward_cancelled_groups"]
        said.append(
            f"in {share:.0%} of the groups the components vary but their sum does not: the advantage is 0 and nothing "
            "is learned there. Change the weights, or combine: gated"
        )
    if (flat := overall["reward_flat_groups"]) is not None and flat == 1.0:
        said.append("every sample of every group has the same reward: nothing can be learned from this batch")
    sizes = {
        name: abs(weights[name]) * row["reward_std"] for name, row in stats.items() if row["reward_std"] and weights[name]
    }
    if len(sizes) > 1:
        large, small = max(sizes, key=lambda n: sizes[n]), min(sizes, key=lambda n: sizes[n])
        if sizes[large] > 100 * sizes[small]:
            said.append(
                f"{large!r} varies {sizes[large] / sizes[small]:,.0f} times as much as {small!r} after weighting, which "
                "therefore decides nothing: change the weights"
            )
    for name, row in stats.items():
        if row["reward_abstained"] == 1.0:
            said.append(f"{name!r} abstained on every sample")
    return said
