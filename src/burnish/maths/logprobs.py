"""Log-probs of labels and the sums made of them. Axes: n rows, m entries, s sequences, v vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.maths.head import Objective
from burnish.maths.units import numbered, totals

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def label_logprobs(logits: Float[Tensor, "n v"], label: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """log softmax(logits)[label], from logits that already exist; `head.head_logprobs` never makes them.

    At least fp32, whatever the logits are: a bf16 log-prob of -10 is off by up to 0.03.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(1, label[:, None])[:, 0] - wide.logsumexp(1)


def seq_logprob(logprobs: Float[Tensor, "m"], unit: Int[Tensor, "m"], sequences: int) -> Float[Tensor, "s"]:
    """Sum of the log-probs of each unit, units numbered 0 .. sequences - 1: log p(completion | prompt)."""
    return logprobs.new_zeros(sequences).index_add(0, unit, logprobs)


def nll(logprobs: Float[Tensor, "m"], weight: Float[Tensor, "m"]) -> Float[Tensor, ""]:
    """Weighted negative log-likelihood: -sum(weight * logprobs)."""
    return -(weight.to(logprobs) * logprobs).sum()


def weighted_nll(weight: Float[Tensor, "m"]) -> Objective:
    """`nll` as an objective of the head: `weight` holds every entry of the micro-batch (`maths.weights`)."""
    return lambda logprobs, entries: nll(logprobs, weight[entries])


def sequence_objective(
    loss: Callable[[Float[Tensor, "s"], Int[Tensor, "s"]], Float[Tensor, ""]], unit: Int[Tensor, "m"]
) -> Objective:
    """A loss of whole completions as an objective of the head: loss(seq_logprob of these units, their ids) -> scalar sum.

    `unit` holds every entry of the micro-batch; whoever calls the head couples what the loss must see together.
    """

    def objective(logprobs: Tensor, entries: slice) -> Tensor:
        here = unit[entries]
        index, count = numbered(here)
        ids = torch.empty(count, dtype=here.dtype, device=here.device).index_put((index,), here)
        return loss(totals(logprobs, index, count), ids)

    return objective
