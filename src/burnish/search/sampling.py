"""Strategies over independent samples, all from one seeded pool: any two are compared on the same draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from burnish.core.errors import ConfigError
from burnish.core.grammar import Spec
from burnish.core.table import About, Table
from burnish.engines.base import Engine, Prompt
from burnish.engines.pool import Pool
from burnish.maths.estimators import pass_at_k
from burnish.maths.votes import best, majority
from burnish.search.base import Budget, Judge, Outcome, within
from burnish.search.scorers import Candidates, Scores, score


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


def _scored(
    engine: Engine, prompts: Sequence[Prompt], judge: Judge, budget: Budget, asked: Spec
) -> list[tuple[Outcome, Scores]]:
    """The outcomes of `_outcomes`, with what the scorer says of their whole samples added to what they spent."""
    outcomes = _outcomes(engine, prompts, budget, asked.n or 1)
    found = score(Candidates(asked, engine, prompts, [o.whole for o in outcomes], judge))
    return [(replace(o, spend=o.spend + s.spend, scores=s.values), s) for o, s in zip(outcomes, found, strict=True)]


def best_of(
    engine: Engine,
    prompts: Sequence[Prompt],
    judge: Judge,
    budget: Budget,
    *,
    n: int = 16,
    scorer: str,
    aggregation: str | None = None,
) -> list[Outcome]:
    """Best of n: n samples, the one that the scorer likes best.

    argmax over i of score(sample_i)      (arXiv:2009.01325)
    A tie goes to the sample seen first; n = 1 is `sample`, but for what scoring costs. Choosing moves the policy by
    KL <= log n - (n-1)/n nats: 0 at n = 1, 0.64 at 4, 1.84 at 16, 3.17 at 64 (`maths.votes.best_of_n_kl`): beside a
    KL penalty in training it is cheap, and past some n a scorer that is only a proxy is fooled rather than served.
    Raises ConfigError where the scorer cannot serve, RewardError where it fails.
    """
    made: list[Outcome] = []
    for outcome, scores in _scored(engine, prompts, judge, budget, Spec("best_of", n, scorer, aggregation)):
        chosen = best(scores.values)
        made.append(outcome if chosen is None else replace(outcome, answer=outcome.whole[chosen]))
    return made


def vote(
    engine: Engine,
    prompts: Sequence[Prompt],
    judge: Judge,
    budget: Budget,
    *,
    n: int = 16,
    scorer: str | None = None,
    aggregation: str | None = None,
) -> list[Outcome]:
    """Self-consistency: n samples, the answer most of them give; with a scorer, the answer of most weight.

    argmax over answers a of sum over i of weight_i [key(sample_i) = a], weight 1 (section 2, arXiv:2203.11171), or what
    the scorer gives (weighted best of n, arXiv:2408.03314; e^mean log-probability for `logprob`)
    Samples without an answer abstain; a tie goes to the answer seen first; n = 1 is `sample`. It speaks through the
    first sample with the winning answer. Raises ConfigError for a task that has no answer key to count by.
    """
    key = judge.answer_key
    if key is None:
        raise ConfigError(
            "cannot vote: this task has no answer key that says when two answers are the same",
            where=f"vote:{n}",
            remedy="use greedy or sample, or a task with an answer key",
        )
    if scorer is None:
        polled = [(outcome, None) for outcome in _outcomes(engine, prompts, budget, n)]
    else:
        polled = _scored(engine, prompts, judge, budget, Spec("vote", n, scorer, aggregation))
    made: list[Outcome] = []
    for outcome, scores in polled:
        values = outcome.scores or (0.0,) * len(outcome.whole)
        keys = tuple(None if v is None else key(t.text) for t, v in zip(outcome.whole, values, strict=True))
        winner = majority(keys, None if scores is None else scores.weights)
        speaker = next((t for t, k in zip(outcome.whole, keys) if k == winner), None)
        made.append(replace(outcome, answer=speaker, keys=keys))
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
        "best_of": best_of,
        "pass": pass_at,
    },
    also={
        "self_consistency": "vote",
        "majority": "vote",
        "majority_vote": "vote",
        "maj": "vote",
        "weighted_vote": "vote",
        "best_of_n": "best_of",
        "bon": "best_of",
        "rejection_sampling": "best_of",
        "cot": "sample",
        "argmax": "greedy",
        "coverage": "pass",
    },
    about={
        "vote": About(taxonomy=("T13", "T6"), paper="arXiv:2203.11171", year=2022),
        "best_of": About(taxonomy=("T5",), paper="arXiv:2009.01325", year=2020),
        "pass": About(taxonomy=("B1",), paper="arXiv:2107.03374", year=2021),
    },
)
