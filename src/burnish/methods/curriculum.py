"""Which prompts a round draws for: in epochs, more often where they are neither too easy nor too hard, or only there.

A prompt is *within* where its pass rate is between `low` and `high`, both excluded: one that is never solved teaches a
group baseline nothing, and neither does one that always is. Two uses:

    screen       the rate is measured once, before the first round, and what is not within is left out of the stage
    curriculum   a running rate is kept of every prompt drawn, and those within (and those not drawn yet) come more often;
                 or each by the variance of its passes, p (1 - p)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from burnish.config.schema import Curriculum, Screen
from burnish.core.errors import DataError
from burnish.core.seeds import derive
from burnish.data.sampler import Sampler
from burnish.methods.rounds import Round, Sample


def pass_rate(group: Sequence[Sample], above: float) -> float | None:
    """The share of the drawn samples with a known reward whose reward is above; None where none is known."""
    known = [s.total > above for s in group if s.total is not None and s.finish != "given"]
    return sum(known) / len(known) if known else None


def first_of_race(weights: Sequence[float], count: int, seed: int) -> list[int]:
    """`count` different indices, drawn one after the other with probability in proportion to the weights that are left.

    Index i arrives after an exponential time of rate w_i, and the earliest are taken (Efraimidis and Spirakis 2006): a pure
    function of its arguments.
    """
    words = np.random.Philox(key=seed).random_raw(len(weights))
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    return [int(i) for i in np.argsort(-np.log(uniform) / np.asarray(weights, dtype=np.float64), kind="stable")[:count]]


class Prompts:
    """Batches of prompts. `batch(round)` is a pure function of the round, the seed and `state`.

    Without screen and curriculum these are the sampler's epochs.
    """

    def __init__(self, sampler: Sampler, curriculum: Curriculum | None = None, screen: Screen | None = None) -> None:
        self.sampler, self.curriculum, self.screen = sampler, curriculum, screen
        self.kept: list[int] | None = None  # None: not screened
        self.rates: dict[int, float] = {}

    @property
    def unscreened(self) -> bool:
        """Whether the pass rates of all prompts are to be measured before a batch is asked for."""
        return self.screen is not None and self.kept is None

    @property
    def batch_rows(self) -> int:
        return self.sampler.batch_rows

    def batch(self, number: int) -> list[int]:
        """The prompts of a round, all different."""
        if self.kept is None and self.curriculum is None:
            return list(self.sampler.batch(number))
        among = range(self.sampler.rows) if self.kept is None else self.kept
        if self.curriculum is None:
            return [among[i] for i in Sampler(len(among), self.sampler.batch_rows, self.sampler.seed).batch(number)]
        weights = [self._weight(i) for i in among]
        found = first_of_race(weights, self.sampler.batch_rows, derive(self.sampler.seed, "curriculum", number))
        return [among[i] for i in found]

    def _weight(self, prompt: int) -> float:
        """From 1 to `favour`: all of it within the band, or as the variance p (1 - p) of a pass, which is largest at 1/2."""
        assert self.curriculum is not None
        block, rate = self.curriculum, self.rates.get(prompt)
        if rate is None:
            return block.favour
        if block.priority == "variance":
            return max(1.0, block.favour * 4 * rate * (1 - rate))
        return block.favour if block.low < rate < block.high else 1.0

    def screened(self, measured: Round) -> float:
        """Leave out what is not within; returns the share that is left. Raises DataError where too few are for a batch."""
        assert self.screen is not None
        rates = {q: pass_rate(group, self.screen.above) for q, group in zip(measured.questions, measured.groups)}
        self.kept = [q for q, rate in rates.items() if rate is not None and self.screen.low < rate < self.screen.high]
        if len(self.kept) < self.sampler.batch_rows:
            easy = sum(rate is not None and rate >= self.screen.high for rate in rates.values())
            raise DataError(
                f"{len(self.kept)} of {len(rates)} prompts have a pass rate between {self.screen.low:g} and {self.screen.high:g} "
                f"({easy} are easier), and a round takes {self.sampler.batch_rows}",
                where="rollouts.screen",
                remedy="widen low and high, give more prompts or other levels, or take smaller batches",
            )
        return len(self.kept) / len(rates)

    def saw(self, drawn: Round) -> dict[str, float]:
        """Update the running rates from all that a round drew; returns what to log."""
        if self.curriculum is None:
            return {}
        favoured = sum(self._weight(q) > 1 for q in drawn.questions) / len(drawn.questions)
        for q, group in (*drawn.replaced, *zip(drawn.questions, drawn.groups)):
            rate = pass_rate(group, self.curriculum.above)
            if rate is not None:
                old = self.rates.get(q)
                self.rates[q] = rate if old is None else self.curriculum.memory * old + (1 - self.curriculum.memory) * rate
        return {"favoured_prompts": favoured}

    def state(self) -> dict[str, Any]:
        return {"kept": self.kept, "rates": {str(q): rate for q, rate in self.rates.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        self.kept, self.rates = state["kept"], {int(q): rate for q, rate in state["rates"].items()}
