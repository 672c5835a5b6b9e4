"""Entropies in the head: against autograd on whole logits, and against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from burnish.maths.entropies import entropy
from burnish.maths.head import LogitMap, WithEntropy, head_loss
from burnish.maths.kernels import kernels_for
from tests.maths.test_head import MAPS, TIGHT, Case, Sizes, V


def both(
    case: Case, kind: str, logit_map: LogitMap, rows: int | None = 9, sink: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """([loss, entropies, gradients] of the head, the same of autograd)"""
    weight = torch.linspace(-0.4, 0.3, len(case.index), dtype=case.hidden.dtype)
    logits = logit_map(F.linear(case.hidden, case.weight, case.bias))
    found = entropy(logits)[case.index]
    want = case.whole(kind, logit_map)[0] + (weight * found).sum()
    measured = torch.zeros(len(case.index), dtype=case.hidden.dtype)
    loss, _ = head_loss(
        case.hidden, case.weight, case.label, WithEntropy(case.objective(kind), measured, weight), index=case.index,
        couple=case.couple(kind), bias=case.bias, logit_map=logit_map, rows=rows, sink=sink,
    )  # fmt: skip
    inputs = case.inputs if sink is None else (case.hidden, case.bias)
    got = [loss.detach(), measured, *torch.autograd.grad(loss, inputs)]
    return got, [want.detach(), found.detach(), *torch.autograd.grad(want, case.inputs if sink is None else inputs)]


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("kind", ["token", "group"])
def test_loss_entropies_and_gradients_equal_autograd(kind: str, logit_map: str) -> None:
    for got, want in zip(*both(Case(), kind, MAPS[logit_map])):
        assert_close(got, want, **TIGHT)


@pytest.mark.parametrize("rows", [None, 1, 25])
@pytest.mark.parametrize("shuffled", [False, True])
def test_any_chunk_size_and_row_order_gives_the_same(shuffled: bool, rows: int | None) -> None:
    for kind in ("token", "group"):
        for got, want in zip(*both(Case(shuffled=shuffled), kind, MAPS["all"], rows)):
            assert_close(got, want, **TIGHT)


def test_tiles_and_a_sink_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.maths.head.TILE", {"cpu": 3 * V})
    case = Case()
    whole = both(case, "token", MAPS["softcap"])[1]
    sink = torch.zeros_like(case.weight, dtype=torch.float64).detach()
    got, want = both(case, "token", MAPS["softcap"], rows=None, sink=sink)
    for a, b in zip(got, want):
        assert_close(a, b, **TIGHT)
    assert_close(sink, whole[3], **TIGHT)  # loss, entropies, hidden, weight


def test_the_bonus_is_its_finite_difference() -> None:
    """Nudge one hidden number: the loss moves by its gradient. Nothing here but the head is asked."""
    case = Case()

    def loss(hidden: Tensor) -> Tensor:
        weight = torch.full((len(case.index),), -0.2, dtype=torch.float64)
        objective = WithEntropy(lambda x, e: 0.0 * x.sum(), torch.zeros(len(case.index)), weight)
        return head_loss(hidden, case.weight, case.label, objective, index=case.index, rows=9)[0]

    assert torch.autograd.gradcheck(loss, (case.hidden[:].detach().requires_grad_(True),), atol=1e-6)


def test_measuring_alone_changes_neither_loss_nor_gradient() -> None:
    case = Case(dtype=torch.bfloat16)
    plain, _ = case.fused("token")
    measured = torch.zeros(len(case.index))
    asked = head_loss(
        case.hidden, case.weight, case.label, WithEntropy(case.token, measured), index=case.index, bias=case.bias, rows=9
    )[0]
    assert_close(asked, plain, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(asked, case.inputs), torch.autograd.grad(plain, case.inputs)):
        assert float((a - b).float().norm() / b.float().norm()) < 2e-2  # two roundings to bf16 in another order
    logits = F.linear(case.hidden.float(), case.weight.float(), case.bias.float())
    assert_close(measured, entropy(logits)[case.index].detach(), rtol=2e-2, atol=2e-2)


def test_logits_never_exceed_a_chunk_and_masked_tokens_have_no_part() -> None:
    case = Case(dtype=torch.float32)
    kernels_for(torch.float32)  # checks itself once
    with Sizes() as sizes:
        objective = WithEntropy(case.token, torch.zeros(len(case.index)), torch.ones(len(case.index)))
        head_loss(case.hidden, case.weight, case.label, objective, index=case.index, rows=9)[0].backward()
    assert sizes.largest == 9 * V
    hidden = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [0.0], [-float("inf")]], dtype=torch.float64)
    found = torch.zeros(2, dtype=torch.float64)
    objective = WithEntropy(lambda x, e: x.sum(), found, -torch.ones(2, dtype=torch.float64))
    loss, _ = head_loss(hidden, weight, torch.tensor([0, 1]), objective)
    assert_close(found, torch.full((2,), 2.0, dtype=torch.float64).log())
    assert bool(loss.isfinite())
