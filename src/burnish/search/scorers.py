"""Who says how good a sample is: the scorers of every strategy that chooses, written `best_of:16@name(aggregation)`.

A scorer is given all prompts of a call with their samples and returns one `Scores` a prompt. Your own is a
`file.py:function` of one argument, `Candidates`, and may have keyword-only parameters as any row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, fsum, isfinite
from typing import Literal

from burnish.core.errors import ConfigError, RewardError
from burnish.core.grammar import Spec
from burnish.core.records import Spend, Trajectory
from burnish.core.table import About, Table, bind, describe_row, load_row
from burnish.engines.base import NOTHING, Engine, Prompt, need
from burnish.search.base import Judge


@dataclass(frozen=True)
class Candidates:
    """What a scorer is given. samples[i] are the whole samples of prompts[i]; `asked` is the strategy as written."""

    asked: Spec
    engine: Engine
    prompts: Sequence[Prompt]
    samples: Sequence[Sequence[Trajectory]]
    judge: Judge


@dataclass(frozen=True)
class Scores:
    """What a scorer says of one prompt's samples, and what saying it took beyond drawing them.

    values  one a sample, the higher the better; None: it abstains
    log     True where a value is the logarithm of what a vote should weigh
    """

    values: tuple[float | None, ...]
    spend: Spend = NOTHING
    log: bool = False

    @property
    def weights(self) -> list[float]:
        """What each sample's vote counts, up to a common factor: e^(value - highest) of logarithms; 0 for abstaining."""
        if not self.log:
            return [0.0 if v is None else v for v in self.values]
        top = max((v for v in self.values if v is not None), default=0.0)
        return [0.0 if v is None else exp(v - top) for v in self.values]


Scorer = Callable[[Candidates], list[Scores]]


def logprob(candidates: Candidates, *, aggregation: Literal["mean", "sum"] = "mean") -> list[Scores]:
    """The model's own confidence: log-probability of the completion, end token included, at temperature 1. Costs nothing.

    mean: (1/K) sum over t of log p(y_t | x, y_<t), K sampled tokens;      sum: without 1/K
    The mean is what is known to work: ranked by it samples beat a random one, by the sum they can do worse, because the
    sum prefers whatever is short (section 3.3, arXiv:2107.03374). As a vote's weight it is e^mean, the normalised
    weighted sum of self-consistency (eq. 1, arXiv:2203.11171). Raises ConfigError where the engine gives none.
    """
    need(candidates.engine, str(candidates.asked), "logprobs")
    found: list[Scores] = []
    for samples in candidates.samples:
        values: list[float | None] = []
        for sample in samples:
            tokens = sample.logprobs
            divisor = len(tokens or ()) if aggregation == "mean" else 1
            values.append(fsum(tokens) / divisor if tokens else None)
        found.append(Scores(tuple(values), log=True))
    return found


def rule(candidates: Candidates) -> list[Scores]:
    """The task's own verifier, where it reads no gold answer: 1 for a sample it accepts, else 0 (no paper).

    Raises ConfigError where there is no such rule: choosing by the right answers is no way to answer.
    """
    accepts, asked = candidates.judge.rule, candidates.asked
    if accepts is None:
        raise ConfigError(
            "there is no rule to choose by that reads no gold answer: the number this would give is a ceiling",
            where=str(asked),
            remedy=f"type pass@{asked.n} for that ceiling (an oracle), or choose by logprob, or take a task such as route",
        )
    return [Scores(tuple(float(accepts(i, s.text)) for s in samples)) for i, samples in enumerate(candidates.samples)]


def score(candidates: Candidates) -> list[Scores]:
    """What the scorer named in `asked` says, checked.

    Raises ConfigError where it cannot serve, RewardError where it gives anything but one finite number, or None, a sample.
    """
    asked = candidates.asked
    assert asked.scorer is not None
    given = {} if asked.aggregation is None else {"aggregation": asked.aggregation}
    parameters = bind(describe_row("scorer", asked.scorer), given, str(asked))
    found: list[Scores] = load_row("scorer", asked.scorer)(candidates, **parameters)
    sizes = [len(samples) for samples in candidates.samples]
    if [len(scores.values) for scores in found] != sizes:
        told = ", ".join(str(len(scores.values)) for scores in found[:8])
        raise RewardError(f"gave {told} values for {', '.join(map(str, sizes[:8]))} samples", where=str(asked))
    if odd := [v for scores in found for v in scores.values if v is not None and not isfinite(v)]:
        raise RewardError(f"gave {odd[0]} where a finite number was wanted", where=str(asked), remedy="None abstains")
    return found


SCORERS = Table(
    "scorer",
    {
        "logprob": logprob,
        "rule": rule,
    },
    also={"confidence": "logprob", "likelihood": "logprob", "perplexity": "logprob", "verifier": "rule"},
    about={"logprob": About(taxonomy=("T17",), paper="arXiv:2107.03374", year=2021)},
)
