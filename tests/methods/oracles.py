"""What independent implementations of a method's loss are made of: one unpadded row at a time, plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from burnish.models.load import load_policy
from burnish.train.method import Work


def first_work(method: Any, policy: Any, step: int = 0) -> Work:
    """The work of a step, prepared."""
    work = next(iter(method.batches(step)))
    method.prepare(policy, work)
    return work


def gradient_of(method: Any, policy: Any, work: Work, tokens: int = 200) -> dict[str, Tensor]:
    """What the loop would accumulate, by parameter."""
    policy.zero_grad()
    for micro in work.batch.split(tokens):
        objective, couple = method.objective(work, micro)
        policy(micro, objective, couple=couple).loss.backward()
    return {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}


def plain_model() -> Any:
    return load_policy("spark", dtype="float32", probe=False).model.requires_grad_(True)


def logits_of(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """[n, v] at the rows that predict the completion."""
    return model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]


def logprobs_of(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """[n] of the completion's tokens."""
    return -cross_entropy(logits_of(model, prompt, completion), torch.tensor(completion), reduction="none")


def distance(got: dict[str, Tensor], model: Any) -> float:
    """|got - model's gradient| / |model's gradient|, over all parameters."""
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gap = sum(float((got[n] - g).double().norm() ** 2) for n, g in wanted.items())
    return (gap / sum(float(g.double().norm() ** 2) for g in wanted.values())) ** 0.5
