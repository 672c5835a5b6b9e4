"""Strategies over independent samples, all from one seeded pool: any two are compared on the same draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from burnish.core.errors import ConfigError
from burnish.core.records import Trajectory
from burnish.core.table import About, Table
from burnish.engines.base import Engine, Prompt
from burnish.engines.pool import Pool
from burnish.maths.estimators import pass_at_k
from burnish.maths.votes import majority
from burnish.search.base import Budget, Judge, Outcome, within


def _outcomes(engine: Engine, prompts: Sequence[Prompt], budget: Budget, n: int) -> list[Outcome]:
    """n samples of each prompt, as far as the budget goes, answered by the first."""
    made: list[Outcome] = []
    for drawn in Pool.over(engine).draw(prompts, budget.sampling, n):
        trace = within(drawn.samples, budget.tokens)
        outcome = Outcome(None, trace, sum((t.cost for t in trace), drawn.prefill))
        made.append(replace(outcome, answer=next(iter(outcome.whole), None)))
    return made


def greedy(engine: Engine, prompts: Sequence[Prompt], judge: Judge, budget: Budget) -> list[Outcome]:
    """The most probable token at every step."""
    sampling = replace(budget.sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    return _outcomes(engine, prompts, replace(budget, sampling=sampling), 1)


def sample(engine: Engine, prompts: Sequence[Prompt], judge: Judge, budget: Budget) -> list[Outcome]:
    """One sample at the budget's temperature: what `vote` starts from."""
    return _outcomes(engine, prompts, budget, 1)


def vote(engine: Engine, prompts: Sequence[Prompt], judge: Judge, budget: Budget, *, n: int = 16) -> list[Outcome]:
    """Self-consistency: n samples, the answer most of them give.

    argmax over answers a of sum over i of [key(sample_i) = a]      (section 2, arXiv:2203.11171)
    Samples without an answer abstain; a tie goes to the answer seen first; n = 1 is `sample`.
    Raises ConfigError for a task that has no answer key to count by.
    """
    key = judge.answer_key
    if key is None:
        raise ConfigError(
            "cannot vote: this task has no answer key that says when two answers are the same",
            where=f"vote:{n}",
            remedy="use greedy or sample, or a task with an answer key",
        )
    made: list[Outcome] = []
    for outcome in _outcomes(engine, prompts, budget, n):
        keys = [key(t.text) for t in outcome.whole]
        winner = majority(keys)
        speaker: Trajectory | None = next((t for t, k in zip(outcome.whole, keys) if k == winner), None)
        made.append(replace(outcome, answer=speaker))
    return made


def pass_at(
    engine: Engine, prompts: Sequence[Prompt], judge: Judge, budget: Budget, *, n: int = 16, draws: int | None = None
) -> list[Outcome]:
    """Oracle: the probability that one of n samples is right. A ceiling and no way to answer: it reads the gold answers.

    1 - C(m - c, n) / C(m, n), m samples drawn (`draws`, or n) of which c are right      (eq. 1, arXiv:2107.03374)
    A sample that the budget cut away is not right. Raises ConfigError without a verifier, or where draws < n.
    """
    if judge.correct is None:
        raise ConfigError("needs a task with a verifier", where=f"pass@{n}")
    m = n if draws is None else draws
    if m < n:
        raise ConfigError(f"{m} draws cannot estimate pass@{n}", where=f"pass@{n}", remedy=f"give draws: {n} or more")
    made: list[Outcome] = []
    for index, outcome in enumerate(_outcomes(engine, prompts, budget, m)):
        right = [t for t in outcome.whole if judge.correct(index, t.text)]
        answer = right[0] if right else outcome.answer
        made.append(replace(outcome, answer=answer, grade=pass_at_k(m, len(right), n)))
    return made


STRATEGIES = Table(
    "strategy",
    {
        "greedy": greedy,
        "sample": sample,
        "vote": vote,
        "pass": pass_at,
    },
    also={
        "self_consistency": "vote",
        "majority": "vote",
        "majority_vote": "vote",
        "maj": "vote",
        "cot": "sample",
        "argmax": "greedy",
        "coverage": "pass",
    },
    about={
        "vote": About(taxonomy=("T13",), paper="arXiv:2203.11171", year=2022),
        "pass": About(taxonomy=("B1",), paper="arXiv:2107.03374", year=2021),
    },
)
