"""Which rows make which batch, as pure functions of integers: a run resumes by arithmetic, not by a saved iterator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from burnish.core.errors import ConfigError, DataError
from burnish.core.seeds import derive


@lru_cache(maxsize=4)  # two data sets, each at the border of two epochs
def order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """A permutation of `rows` (read-only): the ranks of the raw words of Philox keyed by (seed, epoch).

    Counter-based, and sorted here rather than shuffled by numpy: numpy promises that raw words stay the same between
    its versions, and promises no such thing for `Generator.permutation`.
    """
    words = np.random.Philox(key=derive(seed, "data order", epoch)).random_raw(rows)
    permutation = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    permutation.setflags(write=False)
    return permutation


@dataclass(frozen=True)
class Sampler:
    """Batches of `batch_rows` rows, drawn from epochs laid end to end; every epoch holds every row exactly once.

    Batch `step` (from 0) is places [step * batch_rows, (step + 1) * batch_rows) of that sequence. Where an epoch does
    not divide by the batch, the batch at its border takes the rows left over and then the first of the next epoch:
    none is dropped, none repeated within an epoch, and every batch is full. `sequential` keeps the file's order.
    """

    rows: int
    batch_rows: int
    seed: int = 0
    sequential: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise DataError("there are no rows to draw from", where="sampler")
        if self.batch_rows < 1:
            raise ConfigError(f"a batch needs 1 row or more, not {self.batch_rows}", where="batch_rows")

    def batch(self, step: int) -> list[int]:
        """Row indices of batch `step`."""
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        return [self._row(place) for place in range(step * self.batch_rows, (step + 1) * self.batch_rows)]

    def state(self, step: int) -> tuple[int, int, int]:
        """(seed, epoch, index within the epoch) of the first row of batch `step`: all there is to resume from."""
        return (self.seed, *divmod(step * self.batch_rows, self.rows))

    def step_at(self, state: tuple[int, int, int]) -> int:
        """The step whose state this is. Raises DataError where rows, batch or seed are not those it was saved under."""
        seed, epoch, index = state
        step, off = divmod(epoch * self.rows + index, self.batch_rows)
        if seed != self.seed or off or not 0 <= index < self.rows:
            now = f"{self.rows} rows, batches of {self.batch_rows}, seed {self.seed}"
            message = f"(seed, epoch, index) = {state} is not where a batch begins with {now}"
            raise DataError(message, where="sampler", remedy="resume with the data and batch size it was saved under")
        return step

    def steps(self, epochs: float) -> int:
        """The fewest steps that show every row `epochs` times; the last batch may reach into the epoch after."""
        return math.ceil(round(epochs * self.rows, 6) / self.batch_rows)

    def _row(self, place: int) -> int:
        epoch, index = divmod(place, self.rows)
        return index if self.sequential else int(order(self.seed, epoch, self.rows)[index])
