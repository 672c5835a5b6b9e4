"""The policy a stage began with: what a KL is measured from. An adapter switched off, or a frozen copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from burnish.forest.attention import Forest
from burnish.forest.pack import Batch, Micro
from burnish.maths.head_kl import Head
from burnish.models.policy import Policy
from burnish.models.scoring import score


def twin(policy: Policy) -> Policy:
    """A frozen copy of the policy, adapter included, that reads streams as the policy does."""
    model: Any = copy.deepcopy(policy.model).requires_grad_(False).eval()
    made = Policy(model, policy.tokenizer, source=policy.source, probe=False)
    made.logit_map, made.why_not_shared = policy.logit_map, policy.why_not_shared
    return made


class Reference:
    """Log-probs of a batch under the weights of `policy` as they are now. An adapted policy lends its own base: no copy."""

    def __init__(self, policy: Policy) -> None:
        self._copy = None if policy.adapted else twin(policy)

    def logprobs(self, policy: Policy, batch: Batch) -> tuple[Tensor, int]:
        """([M] in the batch's entry order, on the host; executed FLOPs)."""
        with self._switched(policy) as model:
            found = score(model, batch)
        return found.logprobs, found.spend.executed_flops

    @torch.no_grad()
    def head(self, policy: Policy, micro: Micro) -> tuple[Head, int]:
        """(its head over the rows that predict the micro-batch's labels, executed FLOPs of its body)."""
        plan = Forest(micro.stream.layout)
        with self._switched(policy) as model:
            hidden = model.hidden(micro.stream, plan)
            found = model.head(hidden[micro.view.source.to(hidden.device)])
        return found, model.body_flops(micro.stream, plan, backward=False)

    @contextmanager
    def _switched(self, policy: Policy) -> Iterator[Policy]:
        with policy.model.disable_adapter() if self._copy is None else nullcontext():  # type: ignore[operator]
            yield self._copy or policy
