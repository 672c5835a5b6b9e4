"""TRPO on a small softmax policy: products with the Fisher matrix, conjugate gradients, the KL of the step, the search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from burnish.core.errors import ConfigError, DivergedError
from burnish.maths.divergences import exact_kl
from burnish.maths.trust_region import (
    Accepted,
    conjugate_gradient,
    fisher_vector_product,
    line_search,
    natural_step,
)

G = torch.Generator().manual_seed(0)
FEATURES = torch.randn(6, 3, generator=G, dtype=torch.float64)  # of six states
ADVANTAGE = torch.randn(6, 4, generator=G, dtype=torch.float64)


def policy() -> list[Tensor]:
    """Weight and bias of a softmax over four actions."""
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [w.requires_grad_(), torch.zeros(4, dtype=torch.float64, requires_grad=True)]


def logprobs(p: list[Tensor]) -> Tensor:
    return (FEATURES @ p[0] + p[1]).log_softmax(1)


def moved(p: list[Tensor], step: Tensor) -> list[Tensor]:
    return [p[0].detach() + step[:12].view(3, 4), p[1].detach() + step[12:]]


def kl_from(p: list[Tensor]):
    old = logprobs(p).detach()
    return lambda q: exact_kl(old, logprobs(q)).mean()


def surrogate(p: list[Tensor], old: Tensor) -> Tensor:
    return (old.exp() * (logprobs(p) - old).exp() * ADVANTAGE).sum(1).mean()


def explicit_fisher(p: list[Tensor]) -> Tensor:
    """Mean over states of E[score score^T], written out."""
    total = torch.zeros(16, 16, dtype=torch.float64)
    lp = logprobs(p)
    for s in range(6):
        for a in range(4):
            score = torch.cat([g.flatten() for g in torch.autograd.grad(lp[s, a], p, retain_graph=True)])
            total += lp[s, a].exp().detach() * torch.outer(score, score) / 6
    return total


def test_the_product_is_that_of_the_fisher_matrix() -> None:
    p = policy()
    kl, fisher = kl_from(p), explicit_fisher(p)
    product = fisher_vector_product(lambda: kl(p), p, damping=0.3)
    columns = torch.stack([product(e) for e in torch.eye(16, dtype=torch.float64)], 1)
    assert_close(columns, fisher + 0.3 * torch.eye(16, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    spare = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # a parameter the policy does not use
    wider = fisher_vector_product(lambda: kl(p), [*p, spare], damping=0.3)
    assert_close(wider(torch.ones(18, dtype=torch.float64))[16:], torch.full((2,), 0.3, dtype=torch.float64))


def test_conjugate_gradients_solve_and_stop() -> None:
    half = torch.randn(8, 8, generator=G, dtype=torch.float64)
    a, b = half @ half.T + torch.eye(8, dtype=torch.float64), torch.randn(8, generator=G, dtype=torch.float64)
    x = conjugate_gradient(lambda v: a @ v, b, iterations=30, tolerance=1e-24)
    assert_close(x, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)
    calls = []
    conjugate_gradient(lambda v: calls.append(1) or v, b)
    assert len(calls) == 1  # the identity is solved in one product
    assert conjugate_gradient(lambda v: v, torch.zeros(3)).tolist() == [0.0] * 3
    with pytest.raises(DivergedError, match="not positive"):
        conjugate_gradient(lambda v: -v, b)


@pytest.mark.parametrize("max_kl", [1e-4, 0.01])
def test_a_trpo_step_keeps_its_kl_and_gains(max_kl: float) -> None:
    p = policy()
    old, kl = logprobs(p).detach(), kl_from(p)
    g = torch.cat([x.flatten() for x in torch.autograd.grad(surrogate(p, old), p)])
    product = fisher_vector_product(lambda: kl(p), p, damping=1e-6)
    step = natural_step(product, g, max_kl=max_kl, iterations=16)
    assert_close((step @ product(step) / 2).item(), max_kl, rtol=1e-6, atol=0)
    natural = torch.linalg.solve(explicit_fisher(p) + 1e-6 * torch.eye(16, dtype=torch.float64), g)
    assert torch.cosine_similarity(step, natural, 0) > 0.999
    base = surrogate(p, old).detach()

    def measure(fraction: float) -> tuple[float, float]:
        q = moved(p, fraction * step)
        return float(surrogate(q, old) - base), float(kl(q))

    assert measure(1.0)[1] == pytest.approx(max_kl, rel=0.3)
    taken = line_search(measure, float(g @ step), max_kl=max_kl * 1.1)
    assert taken.fraction > 0 and taken.kl <= max_kl * 1.1 and taken.gain > 0
    tight = line_search(measure, float(g @ step), max_kl=max_kl / 30)  # a smaller ball is reached by backing off
    assert 0 < tight.fraction < 1 and tight.kl <= max_kl / 30


def test_the_search_backs_off_and_gives_up() -> None:
    kls = {1.0: 0.5, 0.5: 0.02, 0.25: 0.005}
    assert line_search(lambda f: (f, kls[f]), 1.0) == Accepted(0.25, 0.25, 0.005)
    assert line_search(lambda f: (-f, 0.0), 1.0) == Accepted(0.0, 0.0, 0.0)
    assert line_search(lambda f: (float("nan"), float("nan")), 1.0).fraction == 0
    assert line_search(lambda f: (0.05 * f, 0.0), 1.0).fraction == 0  # a twentieth of what was promised
    assert natural_step(lambda v: v, torch.zeros(4)).tolist() == [0.0] * 4
    with pytest.raises(ConfigError, match="max_kl"):
        natural_step(lambda v: v, torch.ones(4), max_kl=0.0)
