"""The KL of whole distributions between two heads against plain autograd, whatever the chunks, the map and the sink."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.maths.divergences import exact_kl
from burnish.maths.head import LogitMap
from burnish.maths.head_kl import Head, head_kl, kl_flops

N, V, H, OTHER = 7, 31, 5, 3


def heads(dtype: torch.dtype, logit_map: LogitMap, biased: bool) -> tuple[Head, Head, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    bias = random(V).requires_grad_() if biased else None
    own = Head(random(N, H).requires_grad_(), random(V, H).requires_grad_(), bias, logit_map)
    return own, Head(random(N, OTHER), random(V, OTHER), random(V), LogitMap(0.5)), torch.rand(N, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(2.0, 3.0, 0.7)])
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradients_are_autograds(rows: int | None, logit_map: LogitMap, biased: bool) -> None:
    own, other, scale = heads(torch.float64, logit_map, biased)
    inputs = [x for x in (own.hidden, own.weight, own.bias) if x is not None]
    p, q = (h.logit_map(h.hidden @ h.weight.T + (0 if h.bias is None else h.bias)).log_softmax(-1) for h in (own, other))
    want = exact_kl(p, q)
    found, each = head_kl(own, other, scale, rows=rows)
    assert torch.allclose(each, want) and not each.requires_grad and float(each.min()) > 0.1
    got = torch.autograd.grad(3 * found, inputs)
    for a, b in zip(got, torch.autograd.grad(3 * (scale * want).sum(), inputs)):
        assert torch.allclose(a, b, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(head_kl(own, other, scale, rows=rows)[0], found.detach())


@pytest.mark.parametrize("rows", [None, 3])
def test_a_sink_takes_the_weights_gradient(rows: int | None) -> None:
    own, other, scale = heads(torch.float32, LogitMap(), False)
    (want,) = torch.autograd.grad(head_kl(own, other, scale)[0], own.weight)
    sink = torch.ones(V, H)
    (2 * head_kl(own, other, scale, rows=rows, sink=sink)[0]).backward()
    assert own.weight.grad is None and own.hidden.grad is not None
    assert torch.allclose(sink - 1, 2 * want, atol=1e-5)


def test_a_frozen_head_and_half_precision() -> None:
    own, other, scale = heads(torch.bfloat16, LogitMap(), False)
    frozen = Head(own.hidden, own.weight.detach())
    found, each = head_kl(frozen, other, scale)
    found.backward()
    wide = Head(own.hidden.detach().double().requires_grad_(), own.weight.detach().double())
    want, rows = head_kl(wide, Head(other.hidden.double(), other.weight.double(), None if other.bias is None else other.bias.double(), other.logit_map), scale)
    want.backward()
    assert each.dtype == torch.float32 and torch.allclose(each.double(), rows, rtol=0.03, atol=0.03)
    assert own.hidden.grad is not None and wide.hidden.grad is not None
    assert float((own.hidden.grad.double() - wide.hidden.grad).norm() / wide.hidden.grad.norm()) < 0.03


def test_equal_heads_have_none_and_a_token_without_mass_adds_nothing() -> None:
    own, _, scale = heads(torch.float64, LogitMap(), True)
    found, _ = head_kl(own, Head(own.hidden.detach(), own.weight.detach(), own.bias), scale)
    (g,) = torch.autograd.grad(found, own.hidden)
    assert float(found) == pytest.approx(0, abs=1e-12) and float(g.abs().max()) < 1e-12
    assert own.bias is not None
    never = own.bias.detach().clone()
    never[3] = -torch.inf
    found, _ = head_kl(Head(own.hidden, own.weight, never), Head(own.hidden.detach(), own.weight.detach(), own.bias), scale)
    (g,) = torch.autograd.grad(found, own.hidden)
    assert bool(found.isfinite()) and bool(g.isfinite().all()) and float(found) > 0


def test_what_does_not_fit_is_refused_and_flops_are_the_products() -> None:
    own, other, scale = heads(torch.float32, LogitMap(), False)
    with pytest.raises(ConfigError, match="wanted the same rows and vocabulary"):
        head_kl(own, other, scale[1:])
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        head_kl(own, other, scale)[0].backward()
    assert counter.get_total_flops() == kl_flops(N, V, H, OTHER, weight_trained=True)
