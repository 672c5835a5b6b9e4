"""Sums over the units of a flat batch. Axes: m entries, u units, k things of any kind, g ids.

`unit` names the sequence of each entry and never decreases, so a sequence's entries stand together and in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def numbered(ids: Int[Tensor, "k"]) -> tuple[Int[Tensor, "k"], int]:
    """Ids renamed 0 .. G - 1 in ascending order, and G: gaps between ids do not matter."""
    found: tuple[Tensor, Tensor] = cast(Any, torch).unique(ids, return_inverse=True)  # untyped in torch
    return found[1], len(found[0])


def totals(values: Float[Tensor, "k"], index: Int[Tensor, "k"], count: int) -> Float[Tensor, "g"]:
    """Sum of the values of each index 0 .. count - 1."""
    return values.new_zeros(count).index_add(0, index, values)


def unit_mean(values: Float[Tensor, "m"], unit: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
    """The mean over an entry's own unit, at every entry; differentiable."""
    index, count = numbered(unit)
    size = index.bincount(minlength=count).to(values.dtype)
    return (totals(values, index, count) / size)[index]


def last_of_unit(unit: Int[Tensor, "m"]) -> Bool[Tensor, "m"]:
    """True at the last entry of each unit."""
    last = torch.ones_like(unit, dtype=torch.bool)
    last[:-1] = unit[1:] != unit[:-1]
    return last


def suffix_sum(values: Float[Tensor, "m"], unit: Int[Tensor, "m"], factor: float = 1.0) -> Float[Tensor, "m"]:
    """s_t = x_t + factor * s_(t+1) within a unit: what is still to come, discounted. Nothing crosses units.

    One vector operation for each position of the longest unit, whatever the number of units.
    """
    last = last_of_unit(unit).nonzero()[:, 0]
    size = last.diff(prepend=last.new_full((1,), -1))
    out = values.clone()
    for back in range(1, int(size.max()) if len(size) else 0):
        here = last[size > back] - back
        out = out.index_put((here,), values[here] + factor * out[here + 1])
    return out


def varies(values: Float[Tensor, "k"], counted: Bool[Tensor, "k"], group: Int[Tensor, "k"]) -> Bool[Tensor, "k"]:
    """True where the counted values of a thing's group are not all equal, compared exactly: no mean, no rounding."""
    index, count = numbered(group)
    infinity = float("inf")
    low = values.new_full((count,), infinity)
    low = low.scatter_reduce(0, index, torch.where(counted, values, infinity), "amin")
    high = values.new_full((count,), -infinity)
    high = high.scatter_reduce(0, index, torch.where(counted, values, -infinity), "amax")
    return (high > low)[index]
