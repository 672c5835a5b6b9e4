"""The load-balancing loss by hand, and against transformers' own, which knows weights only as a mask."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from burnish.maths.routing import load_balancing


def test_by_hand():
    # two tokens of weights 3 and 1 on two experts, one layer: p = (0.75, 0.25) and (0.2, 0.8)
    logits = torch.tensor([[3.0, 1.0], [1.0, 4.0]]).log()
    got = load_balancing([logits], torch.tensor([3, 1]), top_k=1)
    mean = ((3 * 0.75 + 0.2) / 4, (3 * 0.25 + 0.8) / 4)
    assert float(got) == pytest.approx(2 * (0.75 * mean[0] + 0.25 * mean[1]), rel=1e-6)


def test_even_routing_costs_top_k_and_all_on_few_costs_the_most():
    even = torch.eye(8).repeat(3, 1) * 40
    assert float(load_balancing([even], torch.ones(24), top_k=1)) == pytest.approx(1.0, rel=1e-5)
    one = torch.zeros(24, 8)
    one[:, 3] = 40
    assert float(load_balancing([one], torch.ones(24), top_k=1)) == pytest.approx(8.0, rel=1e-5)
    assert float(load_balancing([torch.zeros(24, 8)], torch.ones(24), top_k=2)) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_value_and_gradient_are_those_of_transformers_over_repeated_tokens(top_k: int):
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(11, 5, generator=g).requires_grad_() for _ in range(3)]
    weight = torch.randint(1, 5, (11,), generator=g)
    ours = load_balancing(logits, weight, top_k=top_k)
    got = torch.autograd.grad(ours, logits)
    copies = tuple(x.repeat_interleave(weight, 0) for x in logits)
    theirs = load_balancing_loss_func(copies, 5, top_k)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for x, y in zip(got, torch.autograd.grad(theirs, logits)):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-8)
        assert bool(y.any())


def test_the_gradient_is_that_of_finite_differences_while_the_choice_stands():
    g = torch.Generator().manual_seed(1)
    logits, weight = torch.randn(6, 4, generator=g).double(), torch.arange(1, 7)
    assert torch.autograd.gradcheck(lambda x: load_balancing([x, 2 * x], weight, top_k=2), logits.requires_grad_())
