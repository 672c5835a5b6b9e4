"""Strategies that choose by a scorer, against scripted samples: answers by hand, tokens to the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations, product
from math import exp
from pathlib import Path
from typing import Any

import pytest

from burnish.core.errors import ConfigError, DataError, RewardError
from burnish.core.records import Sampling, Spend, Trajectory
from burnish.core.table import describe
from burnish.data.tasks.base import items
from burnish.data.tasks.route import ROUTE
from burnish.data.tasks.sums import SUMS
from burnish.engines.base import Prompt
from burnish.engines.pool import Pool
from burnish.engines.scripted import Scripted
from burnish.evals.accuracy import judge_of
from burnish.search.base import Budget, Judge, Outcome, strategy
from burnish.search.sampling import best_of, sample, vote
from burnish.search.scorers import SCORERS

SAYS = {0: ["7", "4444", "44", "none", "7", "1", "4", "99"], 1: ["none", "-", "3", "33", "none", "5", "33", "no"]}
# nats of each token: by the mean "4444" is the surest of item 0 and by the sum "4"; item 1 has a tie of "3" and "33"
SURE = {"7": 0.9, "4444": 0.2, "44": 0.5, "4": 0.25, "3": 0.1, "33": 0.1, "5": 0.4}
PROMPTS = [Prompt(0, (1, 2, 3)), Prompt(1, (1, 2, 3, 4))]
BUDGET = Budget(Sampling(temperature=0.7, max_new_tokens=20))


class Confident(Scripted):
    """Each text with its own log-probability a token."""

    def sample(self, nodes: Any, sampling: Sampling, keys: Any) -> list[Trajectory]:
        made = super().sample(nodes, sampling, keys)
        return [replace(t, logprobs=(-SURE.get(t.text, 2.0),) * len(t.completion)) for t in made]


def engine() -> Confident:
    return Confident(SAYS)


def key(text: str) -> str | None:
    return text[0] if text[0].isdigit() else None


JUDGE = Judge(key, rule=lambda i, text: text.startswith("43"[i]))


def texts(outcomes: Sequence[Outcome]) -> list[str | None]:
    return [o.text for o in outcomes]


def drawn(item: int, n: int) -> int:
    return sum(len(t) for t in SAYS[item][:n])


@pytest.mark.parametrize(
    ("written", "answers"),
    [
        ("best_of:1@logprob", ["7", "none"]),
        ("best_of:3@logprob", ["4444", "3"]),
        ("best_of:3@logprob(sum)", ["4444", "3"]),
        ("best_of:8@logprob", ["4444", "3"]),
        ("best_of:8@logprob(sum)", ["4", "3"]),
        ("best_of:1@rule", ["7", "none"]),
        ("best_of:8@rule", ["4444", "3"]),
        ("best_of:2@rule", ["4444", "none"]),  # none is accepted: the first
    ],
)
def test_the_best_is_chosen_and_every_token_is_charged(written: str, answers: list[str]) -> None:
    bound = strategy(written)
    found = bound.run(engine(), PROMPTS, JUDGE, BUDGET)
    assert texts(found) == answers
    for prompt, outcome in zip(PROMPTS, found):
        n = bound.parameters["n"]
        assert outcome.spend == Spend(prefill_tokens=len(prompt.ids), sampled_tokens=drawn(prompt.item, n))
        assert len(outcome.trace) == len(outcome.scores) == n


@pytest.mark.parametrize("scorer", list(SCORERS))
@pytest.mark.parametrize("row", [best_of, vote])
def test_of_one_it_is_sample(scorer: str, row: Any) -> None:
    (one, other), alone = row(engine(), PROMPTS, JUDGE, BUDGET, n=1, scorer=scorer), sample(engine(), PROMPTS, JUDGE, BUDGET)
    for chosen, drawn_once in zip((one, other), alone):
        assert (chosen.answer, chosen.trace, chosen.spend) == (drawn_once.answer, drawn_once.trace, drawn_once.spend)


def test_four_of_sixteen_are_its_first_four_and_nothing_is_drawn_twice() -> None:
    pool = Pool(engine())
    sixteen, four = (best_of(pool, PROMPTS, JUDGE, BUDGET, n=n, scorer="logprob") for n in (16, 4))
    vote(pool, PROMPTS, JUDGE, BUDGET, n=16)
    assert [o.trace for o in four] == [o.trace[:4] for o in sixteen]
    assert four == best_of(engine(), PROMPTS, JUDGE, BUDGET, n=4, scorer="logprob")
    assert pool.spend == Spend(prefill_tokens=7, sampled_tokens=2 * drawn(0, 8) + 2 * drawn(1, 8))


@pytest.mark.parametrize("tokens", range(1, 18))
@pytest.mark.parametrize("written", ["best_of:8@logprob", "best_of:8@rule", "vote:8@logprob"])
def test_a_budget_is_kept_to_the_token_and_what_it_cuts_is_not_scored(written: str, tokens: int) -> None:
    found = strategy(written).run(engine(), PROMPTS, JUDGE, Budget(BUDGET.sampling, tokens))
    for prompt, outcome in zip(PROMPTS, found):
        assert outcome.spend.sampled_tokens == min(tokens, drawn(prompt.item, 8))
        fits = sum(drawn(prompt.item, n) <= tokens for n in range(1, 9))
        assert len(outcome.scores) == len(outcome.whole) == fits
        if fits:
            fewer = strategy(written.replace("8", str(fits))).run(engine(), PROMPTS, JUDGE, BUDGET)
            assert outcome.text == fewer[prompt.item].text
        else:
            assert outcome.answer is None


def test_the_expected_best_is_the_analytic_one() -> None:
    """All 3^n equally likely draws of three texts: E[max] = sum over k of v_k (F_k^n - F_(k-1)^n)."""
    values = {"5": -0.4, "44": -0.5, "7": -0.9}
    ranked = sorted(values.values())
    for n in (1, 2, 4):
        draws = list(product(values, repeat=n))
        source = Confident({i: list(d) for i, d in enumerate(draws)})
        found = best_of(source, [Prompt(i, (1,)) for i in range(len(draws))], Judge(), BUDGET, n=n, scorer="logprob")
        mean = sum(values[str(o.text)] for o in found) / len(draws)
        assert mean == pytest.approx(sum(v * (((k + 1) / 3) ** n - (k / 3) ** n) for k, v in enumerate(ranked)))


def test_a_weighted_vote_adds_the_weights_of_each_answer() -> None:
    found = vote(engine(), PROMPTS, JUDGE, BUDGET, n=8, scorer="logprob")
    for outcome, item in zip(found, SAYS):
        weights: dict[str, float] = {}
        for text in SAYS[item]:
            if (answer := key(text)) is not None:
                weights[answer] = weights.get(answer, 0.0) + exp(-SURE.get(text, 2.0))
        assert key(outcome.text or "") == max(weights, key=lambda a: weights[a])
        assert outcome.keys == tuple(map(key, SAYS[item]))
    # counted, two unsure samples win; weighed, the one sure sample does, in any order
    for said in set(permutations(["no", "9", "9", "4444"])):
        source, one = Confident({0: said}), PROMPTS[:1]
        assert texts(vote(source, one, JUDGE, BUDGET, n=4)) == ["9"]
        assert exp(-0.2) > 2 * exp(-2.0) and texts(vote(source, one, JUDGE, BUDGET, n=4, scorer="logprob")) == ["4444"]
        assert texts(vote(source, one, JUDGE, BUDGET, n=4, scorer="rule")) == ["4444"]


def test_logarithms_far_below_zero_still_weigh() -> None:
    """e^-900 is 0 in floating point; the ratio of two such weights is not."""
    source = Confident({0: ["9" * 500, "8" * 499]})
    budget = Budget(replace(BUDGET.sampling, max_new_tokens=500))
    found = vote(source, PROMPTS[:1], JUDGE, budget, n=2, scorer="logprob", aggregation="sum")
    assert found[0].scores == (-1000.0, -998.0) and found[0].text == "8" * 499


def test_the_rule_is_lent_only_where_it_reads_no_gold() -> None:
    route, sums = items(ROUTE, "test", None, 4, 0), items(SUMS, "test", None, 4, 0)
    rule = judge_of(ROUTE, route).rule
    assert rule is not None and rule(1, route[1].rationale) and not rule(1, route[2].rationale)
    assert judge_of(SUMS, sums).rule is None
    for row in (best_of, vote):
        with pytest.raises(ConfigError, match=r"@rule  there is no rule .*\n.*type pass@4 for that ceiling"):
            row(engine(), PROMPTS, judge_of(SUMS, sums), BUDGET, n=4, scorer="rule")


def test_an_engine_without_logprobs_refuses_before_anything_is_drawn() -> None:
    source = Scripted(SAYS, logprob=None)
    with pytest.raises(ConfigError, match="best_of:4@logprob  needs an engine that can report the log-probability"):
        best_of(source, [], JUDGE, BUDGET, n=4, scorer="logprob")
    assert texts(best_of(source, PROMPTS, JUDGE, BUDGET, n=8, scorer="rule")) == ["4444", "3"]


OWN = """
from burnish.core.records import Spend
from burnish.search.scorers import Scores


def longest(candidates, *, aggregation: str = "plain"):
    return [Scores(tuple(float(len(t.text)) for t in samples), Spend(scored_tokens=sum(len(t.completion) for t in samples), executed_flops=9))
            for samples in candidates.samples]


def shy(candidates):
    return [Scores((None,) * len(samples)) for samples in candidates.samples]


def nan(candidates):
    return [Scores((float("nan"),) * len(samples)) for samples in candidates.samples]


def short(candidates):
    return [Scores(()) for samples in candidates.samples]


def negative(candidates):
    return [Scores((-1.0,) * len(samples)) for samples in candidates.samples]
"""


def test_your_own_scorer_and_what_it_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    cases = {"best_of:4@own.py:longest": "none", "best_of:4@own.py:longest(odd)": "none", "vote:4@own.py:longest": "3"}
    for name, answer in cases.items():
        found = strategy(name).run(engine(), PROMPTS, JUDGE, BUDGET)
        assert texts(found) == ["4444", answer]
        for prompt, outcome in zip(PROMPTS, found):
            n = drawn(prompt.item, 4)
            assert outcome.spend == Spend(prefill_tokens=len(prompt.ids), sampled_tokens=n, scored_tokens=n, executed_flops=9)
    assert texts(strategy("best_of:4@own.py:shy").run(engine(), PROMPTS, JUDGE, BUDGET)) == ["7", "none"]
    assert texts(strategy("vote:4@own.py:shy").run(engine(), PROMPTS, JUDGE, BUDGET)) == ["7", "none"]
    with pytest.raises(RewardError, match="gave nan where a finite number was wanted"):
        strategy("best_of:4@own.py:nan").run(engine(), PROMPTS, JUDGE, BUDGET)
    with pytest.raises(RewardError, match="gave 0, 0 values for 4, 4 samples"):
        strategy("best_of:4@own.py:short").run(engine(), PROMPTS, JUDGE, BUDGET)
    with pytest.raises(DataError, match="none negative"):
        strategy("vote:4@own.py:negative").run(engine(), PROMPTS, JUDGE, BUDGET)


def test_show_says_how_far_it_moves_the_policy() -> None:
    from burnish.maths.votes import best_of_n_kl

    doc = " ".join(describe("strategy")["best_of"].doc.split())
    assert "log n - (n-1)/n" in doc
    for n, said in ((4, "0.64 at 4"), (16, "1.84 at 16"), (64, "3.17 at 64")):
        assert said == f"{best_of_n_kl(n):.2f} at {n}" and said in doc
