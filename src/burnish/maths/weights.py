"""How per-token losses are averaged: a weight for every label of the whole optimiser batch, made before it is split.

Every loss is (weight * per_token).sum(), so micro-batches and ranks add up to the same number. `unit` names each
label's sequence; a sequence without labels is not in it and counts nowhere. Weights are fp64: whoever multiplies casts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.core.errors import ConfigError, DataError
from burnish.core.table import About, Table
from burnish.maths.units import numbered

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def token_mean(unit: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Every label counts alike, so long sequences count more: DAPO's choice.

    weight = 1 / M, M labels in the batch      (section 3.3, arXiv:2503.14476)
    Raises DataError when there are no labels.
    """
    return torch.full_like(_some(unit), 1 / len(unit), dtype=torch.float64)


def sequence_mean(unit: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Every sequence counts alike, so the labels of long ones count less: GRPO's choice.

    weight = 1 / (S * n_s), S sequences, n_s labels in the label's own      (eq. 3, arXiv:2402.03300)
    Beside `token_mean`: equal to it where all sequences have one length. Raises DataError when there are no labels.
    """
    sequence, sequences = numbered(_some(unit))
    return 1 / (sequences * sequence.bincount()[sequence].to(torch.float64))


def sequence_sum(unit: Int[Tensor, "m"]) -> Float[Tensor, "m"]:
    """The mean over sequences of the sum over their labels: log-likelihood of whole completions.

    weight = 1 / S, S sequences      (REINFORCE over whole completions, arXiv:2402.14740)
    Beside `sequence_mean`: not divided by length, so the loss grows with it. Raises DataError when there are no labels.
    """
    return torch.full_like(_some(unit), 1 / numbered(unit)[1], dtype=torch.float64)


def fixed_length(unit: Int[Tensor, "m"], *, length: int = 256) -> Float[Tensor, "m"]:
    """`sequence_sum` over one constant length, the same for short and long sequences: Dr. GRPO's choice.

    weight = 1 / (S * length), S sequences, length = the generation budget      (section 3.2, arXiv:2503.20783)
    Beside `sequence_mean`: no bias towards short correct and long wrong answers. `length` only scales the loss; its
    default is that of `max_new_tokens`. Raises DataError when there are no labels, ConfigError for a length below 1.
    """
    if length < 1:
        raise ConfigError(f"{length} given, wanted at least 1 token", where="length", remedy="use max_new_tokens")
    return sequence_sum(unit) / length


def _some(unit: Tensor) -> Tensor:
    if not len(unit):
        raise DataError("the batch has no labels: nothing to average", remedy="look at the mask and at truncation")
    return unit


WEIGHTS = Table(
    "weights",
    {
        "token_mean": token_mean,
        "sequence_mean": sequence_mean,
        "sequence_sum": sequence_sum,
        "fixed_length": fixed_length,
    },
    also={
        "token-mean": "token_mean",
        "seq-mean-token-mean": "sequence_mean",
        "seq-mean-token-sum": "sequence_sum",
        "seq-mean-token-sum-norm": "fixed_length",
        "dapo": "token_mean",
        "grpo": "sequence_mean",
        "dr_grpo": "fixed_length",
    },
    about={
        "token_mean": About(taxonomy=("Z1",), paper="arXiv:2503.14476", year=2025),
        "sequence_mean": About(paper="arXiv:2402.03300", year=2024),
        "sequence_sum": About(paper="arXiv:2402.14740", year=2024),
        "fixed_length": About(taxonomy=("Z2",), paper="arXiv:2503.20783", year=2025),
    },
)
