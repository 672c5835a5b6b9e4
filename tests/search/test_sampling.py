"""Strategies over independent samples, against scripted samples with exact token counts."""

from __future__ import annotations

from math import comb

import pytest

from burnish.core.errors import ConfigError
from burnish.core.records import Sampling, Spend
from burnish.core.table import describe
from burnish.engines.base import Prompt
from burnish.engines.pool import Pool
from burnish.engines.scripted import Scripted
from burnish.search.base import Budget, Judge, Outcome, strategy
from burnish.search.sampling import STRATEGIES, greedy, pass_at, sample, vote

SAYS = {
    0: ["7", "4", "4.", "none", "7", "7", "4", "1"],  # greedy 7; 4 leads after three, 7 after eight (tie, seen first)
    1: ["none", "nothing", "no", "-", "3", "none", "none", "none"],
}
PROMPTS = [Prompt(0, (1, 2, 3)), Prompt(1, (1, 2, 3, 4))]
GOLD = ["4", "3"]
BUDGET = Budget(Sampling(temperature=0.7, max_new_tokens=20))


def key(text: str) -> str | None:
    digits = "".join(c for c in text if c.isdigit())
    return digits or None


JUDGE = Judge(key, lambda i, text: key(text) == GOLD[i])


def engine() -> Scripted:
    return Scripted(SAYS)


def texts(outcomes: list[Outcome]) -> list[str | None]:
    return [o.text for o in outcomes]


def length(item: int, n: int) -> int:
    return sum(len(t) for t in SAYS[item][:n])


def test_greedy_and_sample_answer_once() -> None:
    for row in (greedy, sample):
        found = row(engine(), PROMPTS, JUDGE, BUDGET)
        assert texts(found) == ["7", "none"]
        assert [o.spend for o in found] == [Spend(3, 1), Spend(4, 4)]
    assert greedy(engine(), PROMPTS, JUDGE, BUDGET)[0].answer.sampler["temperature"] == 0.0  # type: ignore[union-attr]
    assert sample(engine(), PROMPTS, JUDGE, BUDGET)[0].answer.sampler["temperature"] == 0.7  # type: ignore[union-attr]


@pytest.mark.parametrize(("n", "answers"), [(1, ["7", "none"]), (3, ["4", "none"]), (5, ["7", "3"]), (8, ["7", "3"])])
def test_vote_counts_keys_and_spends_exactly(n: int, answers: list[str]) -> None:
    found = vote(engine(), PROMPTS, JUDGE, BUDGET, n=n)
    assert texts(found) == answers
    for prompt, outcome in zip(PROMPTS, found):
        assert outcome.spend == Spend(prefill_tokens=len(prompt.ids), sampled_tokens=length(prompt.item, n))
        assert len(outcome.trace) == n


def test_vote_four_is_the_first_four_of_sixteen() -> None:
    pool = Pool(engine())
    sixteen = vote(pool, PROMPTS, JUDGE, BUDGET, n=16)
    four = vote(pool, PROMPTS, JUDGE, BUDGET, n=4)
    alone = vote(engine(), PROMPTS, JUDGE, BUDGET, n=4)
    assert [o.trace for o in four] == [o.trace[:4] for o in sixteen] == [o.trace for o in alone]
    assert four == alone  # charged as if drawn
    drawn = sum(2 * length(i, 8) for i in SAYS)
    assert pool.spend == Spend(prefill_tokens=7, sampled_tokens=drawn)


def test_vote_does_not_depend_on_the_order_of_samples_but_for_ties() -> None:
    turned = Scripted({0: [*SAYS[0][3:], *SAYS[0][:3], "7"]})
    straight = Scripted({0: [*SAYS[0], "7"]})
    judge, prompts = Judge(key), PROMPTS[:1]
    assert (
        texts(vote(turned, prompts, judge, BUDGET, n=9)) == texts(vote(straight, prompts, judge, BUDGET, n=9)) == ["7"]
    )


def test_vote_refuses_a_task_without_a_key() -> None:
    with pytest.raises(ConfigError, match="vote:4  cannot vote"):
        vote(engine(), PROMPTS, Judge(None, JUDGE.correct), BUDGET, n=4)


def test_pass_is_the_unbiased_estimate_and_an_oracle() -> None:
    assert strategy("pass@4").oracle and not strategy("vote:4").oracle
    assert [o.grade for o in pass_at(engine(), PROMPTS, JUDGE, BUDGET, n=4)] == [1.0, 0.0]
    found = pass_at(engine(), PROMPTS, JUDGE, BUDGET, n=2, draws=8)
    assert [o.grade for o in found] == pytest.approx([1 - comb(5, 2) / comb(8, 2), 1 - comb(7, 2) / comb(8, 2)])
    assert [o.spend.sampled_tokens for o in found] == [length(0, 8), length(1, 8)]
    assert texts(found) == ["4", "3"]
    with pytest.raises(ConfigError, match="2 draws cannot estimate pass@4"):
        pass_at(engine(), PROMPTS, JUDGE, BUDGET, n=4, draws=2)
    with pytest.raises(ConfigError, match="verifier"):
        pass_at(engine(), PROMPTS, Judge(key), BUDGET, n=4)


@pytest.mark.parametrize("tokens", range(1, 16))
def test_a_budget_is_kept_to_the_token(tokens: int) -> None:
    found = vote(engine(), PROMPTS, JUDGE, Budget(BUDGET.sampling, tokens), n=8)
    for prompt, outcome in zip(PROMPTS, found):
        whole = length(prompt.item, 8)
        assert outcome.spend.sampled_tokens == min(tokens, whole)
        assert outcome.spend.sampled_tokens == sum(len(t.completion) for t in outcome.trace)
        assert outcome.spend.sampled_tokens == sum(len(t.logprobs or ()) for t in outcome.trace)
        fits = sum(length(prompt.item, n) <= tokens for n in range(1, 9))
        assert len(outcome.whole) == fits
        if fits:
            assert outcome.text == vote(engine(), [prompt], JUDGE, BUDGET, n=fits)[0].text
        else:
            assert outcome.answer is None
        if len(outcome.trace) > fits:
            cut = outcome.trace[-1]
            assert (cut.finish, cut.text) == ("budget", "")
            assert all(s.end <= len(cut.tokens) for s in cut.spans)


def test_strategies_leave_no_node_behind() -> None:
    for name in STRATEGIES:
        source = engine()
        written = {"pass": "pass@4", "best_of": "best_of:4@logprob"}.get(name, name)
        strategy(written).run(source, PROMPTS, JUDGE, BUDGET)
        assert source.held == 0, name


def test_a_strategy_as_written_is_bound_or_refused_with_what_to_type() -> None:
    bound = strategy("vote:4")
    assert (bound.name, dict(bound.parameters)) == ("vote:4", {"n": 4, "scorer": None, "aggregation": None})
    assert texts(bound.run(engine(), PROMPTS, JUDGE, BUDGET)) == texts(vote(engine(), PROMPTS, JUDGE, BUDGET, n=4))
    assert strategy("vote").parameters["n"] == 16
    for wrong, hint in {
        "greedy:4": "'greedy' has no parameter 'n'",
        "greedy@rule": "type greedy",
        "best_of:4": "'best_of' needs 'scorer': one of logprob, rule\n  type best_of:4@logprob",
        "best_of:4@verifier": "Did you mean 'rule'",
        "best_of:4@logprob(max)": "'max' given, wanted one of mean, sum",
        "vote:4@rule(mean)": "'rule' has no parameter 'aggregation'",
        "self_consistency:8": "Did you mean 'vote'",
        "vote:0": "1 or more",
        "pass:4": "pass@4",
    }.items():
        with pytest.raises(ConfigError, match=hint):
            strategy(wrong)
    assert set(describe("strategy")) == set(STRATEGIES) == {"greedy", "sample", "vote", "best_of", "pass"}
    assert describe("strategy")["vote"].citation == "arXiv:2203.11171"


def test_budgets_that_buy_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 tokens buy nothing"):
        Budget(Sampling(), 0)
