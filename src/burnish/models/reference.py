"""The policy a stage began with: what a KL is measured from. An adapter switched off, or a frozen copy."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from burnish.forest.pack import Batch
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
        with policy.model.disable_adapter() if self._copy is None else nullcontext():  # type: ignore[operator]
            found = score(self._copy or policy, batch)
        return found.logprobs, found.spend.executed_flops
