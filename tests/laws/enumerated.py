"""A policy whose completions can all be written down: a softmax table over prefixes, 3 tokens, at most 3 of them.

Token 0 ends a completion: 15 completions of 1 to 3 tokens, 7 prefixes, 27 labels. Expectations over groups are sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

VOCABULARY, LONGEST = 3, 3


def written_out() -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for n in range(1, LONGEST + 1):
        for tokens in product(range(VOCABULARY), repeat=n):
            ended = 0 in tokens
            if (ended and tokens.index(0) == n - 1) or (not ended and n == LONGEST):
                found.append(tokens)
    return found


COMPLETIONS = written_out()
PREFIXES = sorted({c[:i] for c in COMPLETIONS for i in range(len(c))})
STATE = torch.tensor([PREFIXES.index(c[:i]) for c in COMPLETIONS for i in range(len(c))])
TOKEN = torch.tensor([t for c in COMPLETIONS for t in c])
LENGTH = torch.tensor([len(c) for c in COMPLETIONS])
UNIT = torch.arange(len(COMPLETIONS)).repeat_interleave(LENGTH)
FIRST = LENGTH.cumsum(0) - LENGTH


def table(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), VOCABULARY, generator=g, dtype=torch.float64).requires_grad_()


def label_logprobs(logits: Tensor) -> Tensor:
    """[27] of every label of every completion."""
    return logits.log_softmax(1)[STATE, TOKEN]


def completion_logprobs(logits: Tensor) -> Tensor:
    return torch.zeros(len(COMPLETIONS), dtype=torch.float64).index_add(0, UNIT, label_logprobs(logits))


def entries(drawn: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(which of the 27 labels each entry of a batch is, the unit of each entry)."""
    labels = [torch.arange(FIRST[i], FIRST[i] + LENGTH[i]) for i in drawn]
    return torch.cat(labels), torch.arange(len(drawn)).repeat_interleave(LENGTH[list(drawn)])


def exact_gradient(logits: Tensor, reward: Tensor) -> Tensor:
    """d E[reward] / d logits for rewards that do not depend on the logits."""
    return torch.autograd.grad((completion_logprobs(logits).exp() * reward).sum(), logits)[0]


def expected_gradient(logits: Tensor, group: int, of_labels: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """The expectation over all groups drawn from the policy of d loss / d logits.

    `of_labels(drawn)` is d loss / d log-prob for the entries of one group.
    """
    with torch.no_grad():
        probability = completion_logprobs(logits).exp()
    total = torch.zeros(len(TOKEN), dtype=torch.float64)
    for drawn in product(range(len(COMPLETIONS)), repeat=group):
        total.index_add_(0, entries(drawn)[0], probability[list(drawn)].prod() * of_labels(drawn))
    return torch.autograd.grad((label_logprobs(logits) * total).sum(), logits)[0]
