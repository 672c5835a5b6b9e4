"""A*-PO: V* against enumeration, the gradient of its regression, what it draws when, resume, bad input."""

from __future__ import annotations

from math import exp, log
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from burnish.core.errors import ConfigError
from burnish.maths.offline import a_star, soft_value
from burnish.methods.astar_po import AStar
from tests.laws import enumerated
from tests.methods.oracles import distance, first_work, gradient_of, logprobs_of, plain_model
from tests.methods.test_policy_gradient import stage, train


def test_the_value_of_many_samples_is_that_of_all_completions() -> None:
    logp = enumerated.completion_logprobs(enumerated.table(5)).detach()
    reward = torch.arange(len(logp)).double().cos()
    exact = 0.5 * (logp + reward / 0.5).logsumexp(0)
    drawn = torch.multinomial(logp.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    found = soft_value(reward[drawn], torch.ones(len(drawn), dtype=torch.bool), torch.zeros(len(drawn), dtype=torch.long), value_coef=0.5)
    assert abs(float(found[0] - exact)) < 0.005
    best = logp + (reward - exact) / 0.5  # the optimum of the same coefficient, where the regression is zero everywhere
    assert_close(best.exp().sum().item(), 1.0)
    assert_close(a_star(best, logp, reward, exact.expand_as(reward), kl_coef=0.5), torch.zeros_like(reward))


def test_its_gradient_is_that_of_the_published_loss_on_separate_rows() -> None:
    policy, built, _ = stage(method={"name": "astar_po", "kl_coef": 0.05, "value_coef": 0.25}, rollouts={"group_size": 6}, batch_rows=8)
    method: AStar = built.method
    method.start(policy, None, lambda: None)  # type: ignore[arg-type]
    method._folder = None
    with torch.no_grad():  # away from the reference
        for p in policy.trainable().values():
            p.mul_(1.01)
    work = first_work(method, policy)
    got = gradient_of(method, policy, work)
    plain, reference, loss = plain_model(), plain_model(), torch.zeros(())
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(1.01)
    assert method._round is not None and all(len(group) == 1 for group in method._round.groups)
    for q, (sample,) in zip(method._round.questions, method._round.groups):
        prompt = method.questions[q].ids
        with torch.no_grad():
            ref = logprobs_of(reference, prompt, sample.tokens).sum()
        implied = 0.05 * (logprobs_of(plain, prompt, sample.tokens).sum() - ref)
        loss = loss + (implied - (sample.total - method.values[q])) ** 2 / 8
    loss.backward()
    assert distance(got, plain) < 1e-5


def test_values_are_those_of_the_samples_drawn_before_the_first_step() -> None:
    policy, built, _ = stage(method={"name": "astar_po", "value_coef": 0.5}, rollouts={"group_size": 8}, batch_rows=8, steps=3)
    method: AStar = built.method
    asked = {q for n in range(3) for q in method.rounds.sampler.batch(n)}
    work = next(iter(method.batches(0)))
    method.estimate(policy, work)
    assert set(method.values) == asked
    possible = {0.5 * log((k * exp(2.0) + 8 - k) / 8) for k in range(9)}  # k of 8 right
    assert all(min(abs(v - p) for p in possible) < 1e-9 for v in method.values.values())
    assert len(set(method.values.values())) > 2
    assert work.spend.sampled_tokens > 0


def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    given = {"method": "astar_po", "rollouts": {"group_size": 4, "max_new_tokens": 24, "updates": 2}}
    whole, rows = train(tmp_path / "00-whole", **given)
    train(tmp_path / "01-parts", stop_after=3, **given)
    parts, again = train(tmp_path / "01-parts", **given)
    assert rows == again and all(row["grad_norm"] > 0 for row in rows)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))


def test_what_cannot_be_meant_is_refused() -> None:
    for name in ("value_coef", "kl_coef"):
        with pytest.raises(ConfigError, match=name):
            stage(method={"name": "astar_po", name: 0.0})
    with pytest.raises(ConfigError, match="learns from rewards"):
        stage(method="astar_po", rewards=None)
