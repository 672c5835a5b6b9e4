"""TRPO as pure functions over callables: a step of largest gain whose KL stays inside a ball.

    max g^T x  s.t.  x^T F x / 2 <= delta,    x = sqrt(2 delta / s^T F s) s,   F s = g   (appendix C, arXiv:1502.05477)

Axes: d numbers of all trained parameters, flat. Who calls says what the KL and the surrogate are and where parameters
live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.core.errors import ConfigError, DivergedError

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Accepted:
    """What the line search took: the fraction of the full step (0: none was good), and what was measured there."""

    fraction: float
    gain: float
    kl: float


def fisher_vector_product(
    kl: Callable[[], Tensor], parameters: Sequence[Tensor], *, damping: float = 0.1
) -> Callable[[Tensor], Tensor]:
    """v -> (F + damping I) v, with F the Hessian of KL(old || policy) at the old policy, which is the Fisher matrix.

    F v = d/d theta (v^T d KL / d theta): backward twice, F itself is never made. `kl` is called once and must be twice
    differentiable; its first derivative is 0 where policy = old, its second is not.
    """
    first = torch.autograd.grad(kl(), parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in first])

    def product(vector: Tensor) -> Tensor:
        if not flat.requires_grad:
            return damping * vector
        found = torch.autograd.grad(
            flat @ vector, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([g.reshape(-1) for g in found]) + damping * vector

    return product


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Float[Tensor, "d"], *, iterations: int = 10, tolerance: float = 1e-10
) -> Float[Tensor, "d"]:
    """x with A x = target for a symmetric positive A known by its products (Hestenes and Stiefel 1952, no paper).

    Stops where |A x - target|^2 <= tolerance * |target|^2; exact after d iterations but for rounding. Raises
    DivergedError where A shows itself not positive.
    """
    x, residual = torch.zeros_like(target), target.clone()
    direction, size = residual.clone(), residual @ residual
    stop = tolerance * float(size)
    for _ in range(iterations):
        if float(size) <= stop:
            break
        image = product(direction)
        curvature = direction @ image
        if not float(curvature) > 0:
            raise DivergedError(
                "the matrix is not positive along a direction", where="conjugate_gradient", remedy="raise damping"
            )
        rate = size / curvature
        x, residual = x + rate * direction, residual - rate * image
        after = residual @ residual
        direction, size = residual + after / size * direction, after
    return x


def natural_step(
    product: Callable[[Tensor], Tensor],
    gradient: Float[Tensor, "d"],
    *,
    max_kl: float = 0.01,
    iterations: int = 10,
    tolerance: float = 1e-10,
) -> Float[Tensor, "d"]:
    """The step along F^-1 g whose KL is `max_kl` to second order: sqrt(2 delta / s^T F s) s      (arXiv:1502.05477).

    Natural gradient (Amari 1998; Kakade 2001) is its direction. A gradient of 0 gives a step of 0. Raises ConfigError
    for a max_kl that is not positive.
    """
    if not max_kl > 0:
        raise ConfigError(f"{max_kl} given, wanted a positive number", where="max_kl")
    direction = conjugate_gradient(product, gradient, iterations=iterations, tolerance=tolerance)
    curvature = direction @ product(direction)
    if not float(curvature) > 0:
        return torch.zeros_like(gradient)
    return (2 * max_kl / curvature).sqrt() * direction


def line_search(
    measure: Callable[[float], tuple[float, float]],
    expected: float,
    *,
    max_kl: float = 0.01,
    backtracks: int = 10,
    shrink: float = 0.5,
    least: float = 0.1,
) -> Accepted:
    """The largest fraction of the step that keeps KL <= max_kl and gains at least `least` of what was promised.

    `measure(fraction)` gives (gain of the surrogate over the old policy, KL) with that part of the step taken;
    `expected` is g^T x, what a full step promises to first order; fractions are 1, shrink, shrink^2, ...     (arXiv:1502.05477)
    Not one of them good enough: fraction 0, and the caller stays where it is. Not finite counts as not good.
    """
    fraction = 1.0
    for _ in range(backtracks):
        gain, kl = measure(fraction)
        if kl <= max_kl and gain >= least * fraction * expected and gain > 0:
            return Accepted(fraction, gain, kl)
        fraction *= shrink
    return Accepted(0.0, 0.0, 0.0)
