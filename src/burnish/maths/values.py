"""Losses of a critic. Axes: m entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.core.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float


def squared(value: Float[Tensor, "m"], target: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Half the squared distance to the return, A + V of the rollout: (V - G)^2 / 2      (arXiv:1602.01783)."""
    return (value - target) ** 2 / 2


def clipped(
    value: Float[Tensor, "m"], old_value: Float[Tensor, "m"], target: Float[Tensor, "m"], *, value_clip: float = 0.2
) -> Float[Tensor, "m"]:
    """`squared`, with no gain from moving more than `value_clip` from the old value.

    max((V - G)^2, (clip(V, V_old -+ c) - G)^2) / 2      (PPO's implementations, studied in arXiv:2005.12729)
    Raises ConfigError for a clip that is not positive.
    """
    if not value_clip > 0:
        raise ConfigError(f"{value_clip} given, wanted a positive number", where="value_clip")
    near = old_value + (value - old_value).clamp(-value_clip, value_clip)
    return torch.maximum(squared(value, target), squared(near, target))
