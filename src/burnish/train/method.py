"""What a method gives the loop: where batches come from, what is done to a whole batch, and the objective of a part of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from burnish.core.records import Rendered, Spend
from burnish.data.chat import Mask, Prepared
from burnish.data.sampler import Sampler
from burnish.forest.pack import Batch, Micro
from burnish.maths.head import Objective


@dataclass
class Work:
    """One optimiser batch. `columns` are captured tensors in the batch's entry order [M] or unit order [units].

    batch  None until `prepare` where a method makes its own data, and after it where there is nothing to learn from it
    spend  what making it cost an engine; facts: metrics of it besides the loop's own
    """

    batch: Batch | None
    rows: int
    where: tuple[str, ...] = ()
    epoch: float = 0.0
    columns: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    spend: Spend = field(default_factory=Spend)
    facts: dict[str, Any] = field(default_factory=dict)


class Material(Protocol):
    """What a method is built from: a stage's data and the numbers that order it. `build` makes it."""

    def render(self, mask: Mask) -> tuple[Prepared, tuple[Rendered, ...]]:
        """(training rows, validation rows) as ids, labels chosen by `mask`. Raises DataError."""
        ...

    def sampler(self, rows: int) -> Sampler: ...

    def steps(self, sampler: Sampler) -> int:
        """Optimiser steps of the whole stage."""
        ...


class Method(Protocol):
    """Three hooks of the one loop. `batches(step)` starts at that step and is a pure function of it for offline methods."""

    total_steps: int

    def batches(self, step: int) -> Iterator[Work]: ...

    def prepare(self, policy: Any, work: Work) -> None:
        """No gradient, whole batch: weights, reference log-probs, statistics."""
        ...

    def objective(self, work: Work, micro: Micro) -> tuple[Objective, Tensor | None]:
        """The objective of one micro-batch and its coupling ids [M] (None: tokens are independent)."""
        ...
