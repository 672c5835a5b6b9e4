"""Entropy of each row of a chunk of logits and its gradient, tile by tile, for the head.

Axes: n rows of a chunk, v vocabulary. With y = map(z), e = exp(y - top), S = sum e:

    H = log S - (1 / S) sum_v e_v (y_v - top)
    d (c log p_t + b H) / d z_v = [c onehot_t - (e_v / S) (c + b (y_v - top - log S + H))] map'(z_v)

The chunk's logits z stay as they are until the objective is known, so each tile is exponentiated twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Map(Protocol):
    """What `head.LogitMap` is to this module: logits from z, and their slope from the logits."""

    def __call__(self, z: Tensor) -> Tensor: ...

    def slope(self, y: Tensor) -> Tensor | float: ...


def measured(
    z: Float[Tensor, "n v"], logit_map: Map, wide: torch.dtype, lines: int
) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"], Float[Tensor, "n"]]:
    """(top, S, H) of the module's equations, in `wide`; z is only read, `lines` rows at a time.

    H as in `entropies.entropy`; a logit of -inf has p log p = 0.
    """
    top, mass = z.new_empty((len(z), 1), dtype=wide), z.new_empty((len(z), 1), dtype=wide)
    inner = torch.empty_like(mass)
    for here in _tiles(len(z), lines):
        y = logit_map(z[here].to(wide))
        top[here] = y.amax(1, keepdim=True)
        y = y - top[here]
        e = y.exp()
        mass[here] = e.sum(1, keepdim=True)
        inner[here] = (e * y.masked_fill(e == 0, 0.0)).sum(1, keepdim=True)
    return top, mass, (mass.log() - inner / mass)[:, 0]


def overwrite_gradient(
    z: Float[Tensor, "n v"],
    label: Int[Tensor, "n"],
    logit_map: Map,
    top: Float[Tensor, "n 1"],
    mass: Float[Tensor, "n 1"],
    entropy: Float[Tensor, "n"],
    by_logprob: Float[Tensor, "n"],
    by_entropy: Float[Tensor, "n"],
    lines: int,
) -> None:
    """z becomes d objective / d z, where `by_logprob` and `by_entropy` are the objective's derivatives by row."""
    for here in _tiles(len(z), lines):
        y = logit_map(z[here].to(top.dtype))
        shifted = y - top[here]
        p = shifted.exp() / mass[here]
        c, b = by_logprob[here, None], by_entropy[here, None]
        inside = c + b * (shifted.masked_fill(p == 0, 0.0) - mass[here].log() + entropy[here, None])
        gradient = -p * inside
        gradient[torch.arange(len(gradient), device=z.device), label[here]] += c[:, 0]
        z[here] = (gradient * logit_map.slope(y)).to(z.dtype)


def _tiles(rows: int, lines: int) -> Iterator[slice]:
    return (slice(start, start + lines) for start in range(0, rows, lines))
