"""Log-probs of labels and their sums, by hand."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from burnish.maths.logprobs import label_logprobs, nll, seq_logprob, weighted_nll


def test_label_logprobs_by_hand() -> None:
    logits = torch.tensor([[math.log(1.0), math.log(3.0)], [math.log(2.0), math.log(2.0)]], dtype=torch.float64)
    got = label_logprobs(logits, torch.tensor([1, 0]))
    assert_close(got, torch.tensor([math.log(0.75), math.log(0.5)], dtype=torch.float64))


def test_label_logprobs_of_narrow_logits_are_wide() -> None:
    logits = torch.randn(5, 300).bfloat16()
    got = label_logprobs(logits, torch.arange(5))
    assert got.dtype == torch.float32
    assert_close(got, logits.double().log_softmax(-1)[torch.arange(5), torch.arange(5)].float(), rtol=1e-6, atol=1e-6)


def test_seq_logprob_sums_each_unit() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0, -8.0], requires_grad=True)
    got = seq_logprob(logprobs, torch.tensor([1, 0, 1, 3]), 4)
    assert_close(got, torch.tensor([-2.0, -5.0, 0.0, -8.0]))
    (got * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert_close(logprobs.grad, torch.tensor([2.0, 1.0, 2.0, 4.0]))


def test_nll_by_hand_and_its_sign() -> None:
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    loss = nll(logprobs, torch.tensor([0.5, 2.0]))
    loss.backward()
    assert loss.item() == 6.5
    assert logprobs.grad.tolist() == [-0.5, -2.0]  # descent raises the likelihood


def test_weighted_nll_takes_the_weights_of_its_entries() -> None:
    weight = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    objective = weighted_nll(weight)
    logprobs = torch.tensor([-1.0, -2.0])
    assert objective(logprobs, slice(1, 3)).dtype == torch.float32
    assert objective(logprobs, slice(1, 3)).item() == 210.0
    whole = objective(torch.tensor([-1.0, -2.0, -3.0, -4.0]), slice(0, 4))
    parts = objective(torch.tensor([-1.0]), slice(0, 1)) + objective(torch.tensor([-2.0, -3.0, -4.0]), slice(1, 4))
    assert whole.item() == parts.item()
