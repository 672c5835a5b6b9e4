"""What a policy says of a batch without learning from it: log-probs of its labels and, where asked for, entropies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.core.records import Spend
from burnish.forest.pack import Batch
from burnish.maths.head import Objective, WithEntropy

SCORED_TOKENS = 8192  # of one pass: no activations are kept


@dataclass(frozen=True)
class Scores:
    """logprobs [M] and entropy [M] (nats, None where not asked for) in the batch's entry order, on the host; what it cost."""

    logprobs: Tensor
    entropy: Tensor | None
    spend: Spend


@torch.no_grad()
def score(policy: Any, batch: Batch, *, entropy: bool = False) -> Scores:
    """One forward pass of a whole batch with the present weights, dropout off. Logits exist a chunk at a time."""
    policy.train(False)
    logprobs = torch.zeros(batch.entries)
    entropies = torch.zeros(batch.entries) if entropy else None
    flops = 0
    for micro in batch.split(SCORED_TOKENS):
        objective: Objective = _total
        measured = torch.zeros(len(micro.items), device=policy.device)
        if entropies is not None:
            objective = WithEntropy(_total, measured)
        found = policy(micro, objective)
        logprobs[micro.items] = found.logprobs.float().cpu()
        if entropies is not None:
            entropies[micro.items] = measured.cpu()
        flops += found.executed_flops(False)
    return Scores(logprobs, entropies, Spend(scored_tokens=batch.entries, useful_flops=flops, executed_flops=flops))


def _total(logprobs: Tensor, entries: slice) -> Tensor:
    return logprobs.sum()
