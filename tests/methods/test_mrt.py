"""Minimum risk training: its gradient, its set, the exact expected risk where the set is everything, resume, bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from burnish.core.errors import ConfigError, DataError
from burnish.maths.logprobs import sequence_objective
from burnish.maths.offline import minimum_risk
from burnish.methods.mrt import MinimumRisk, distinct
from burnish.methods.rounds import Sample
from tests.laws import enumerated
from tests.methods.oracles import distance, first_work, gradient_of, logprobs_of, plain_model
from tests.methods.test_policy_gradient import stage, train

ROLLOUTS = {"group_size": 5, "max_new_tokens": 24}


@pytest.mark.parametrize("subspace", ["samples_and_gold", "samples"])
def test_its_gradient_is_that_of_the_published_loss_on_separate_rows(subspace: str) -> None:
    policy, built, _ = stage(method={"name": "mrt", "sharpness": 0.05, "subspace": subspace}, rollouts=ROLLOUTS, batch_rows=6)
    method: MinimumRisk = built.method
    work = first_work(method, policy)
    assert method._round is not None
    got = gradient_of(method, policy, work)
    plain, loss = plain_model(), torch.zeros(())
    for q, group in zip(method._round.questions, method._round.groups):
        worth = {s.tokens: s.total for s in group}
        if subspace == "samples_and_gold":
            assert method.gold is not None and group[-1].tokens == method.gold[q] and group[-1].total == 1
            assert policy.decode(group[-1].tokens) == built.method.questions[q].columns.get("rationale", policy.decode(method.gold[q]))
        scores = torch.stack([logprobs_of(plain, method.questions[q].ids, tokens).sum() for tokens in worth])
        mass = (0.05 * scores).softmax(0)
        loss = loss - (mass * torch.tensor(list(worth.values()))).sum() / len(method._round.questions)
    loss.backward()
    assert distance(got, plain) < 1e-5


def test_with_every_completion_in_the_set_it_is_the_expected_risk() -> None:
    logits = enumerated.table(3)
    cost = -torch.arange(len(enumerated.COMPLETIONS)).double().sin()
    one_prompt = torch.zeros(len(cost), dtype=torch.long)
    objective = sequence_objective(lambda seq, ids: minimum_risk(seq, cost[ids], one_prompt[ids], sharpness=1.0).sum(), enumerated.UNIT)
    loss = objective(enumerated.label_logprobs(logits), slice(None))
    exact = (enumerated.completion_logprobs(logits).exp() * cost).sum()
    assert_close(loss, exact)
    assert_close(torch.autograd.grad(loss, logits)[0], enumerated.exact_gradient(logits, cost))


def test_a_set_holds_each_completion_once_and_none_without_a_reward() -> None:
    one = Sample((1, 2), (0.0, 0.0), "eos", "", {}, 1.0)
    other, unknown = replace(one, tokens=(3,), total=0.0), replace(one, tokens=(4,), total=None)
    assert distinct([one, other, one, unknown]) == [one, other]


def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    given = {"method": "mrt", "rollouts": {"group_size": 4, "max_new_tokens": 24, "updates": 2}}
    whole, rows = train(tmp_path / "00-whole", **given)
    train(tmp_path / "01-parts", stop_after=3, **given)
    parts, again = train(tmp_path / "01-parts", **given)
    assert rows == again and any(row["grad_norm"] for row in rows)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a set of 1"):
        stage(method={"name": "mrt", "subspace": "samples"}, rollouts={"group_size": 1})
    stage(method="mrt", rollouts={"group_size": 1})  # and the row's own completion
    with pytest.raises(ConfigError, match="sharpness"):
        stage(method={"name": "mrt", "sharpness": 0.0})
    with pytest.raises(ConfigError, match="samples_and_gold"):
        stage(method={"name": "mrt", "subspace": "all"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 8)
    with pytest.raises(DataError, match="nothing to learn after it"):
        stage(method="mrt", data={"file": str(rows)}, rewards="number")
