"""MIXER: supervised at Delta = 0, REINFORCE at Delta = T, both between; its schedule, resume, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from burnish.core.errors import ConfigError, DataError
from burnish.methods.mixer import Mixer
from tests.methods.oracles import distance, first_work, gradient_of, logprobs_of, plain_model
from tests.methods.test_policy_gradient import stage, train


def mixer(warmup: int, period: int, fewer: int, **more: object) -> tuple[object, Mixer]:
    method = {"name": "mixer", "warmup": warmup, "period": period, "fewer": fewer, **more}
    policy, built, _ = stage(method=method, rollouts={"group_size": 4, "max_new_tokens": 24}, batch_rows=6)
    return policy, built.method


def test_with_everything_given_it_is_supervised_fine_tuning() -> None:
    policy, method = mixer(1, 1, 1)
    work = first_work(method, policy)
    got = gradient_of(method, policy, work)
    plain, nll, labels = plain_model(), torch.zeros(()), 0
    for q in method.rounds.sampler.batch(0):
        nll = nll - logprobs_of(plain, method.questions[q].ids, method.gold[q]).sum()
        labels += len(method.gold[q])
    (nll / labels).backward()
    assert distance(got, plain) < 1e-5
    assert work.spend.sampled_tokens == 0 and work.facts["supervised_share"] == 1


def test_with_nothing_given_it_is_reinforce() -> None:
    policy, method = mixer(0, 1, 1000, weights="sequence_sum")
    assert method.supervised(0) == 0
    work = first_work(method, policy)
    got = gradient_of(method, policy, work)
    plain, loss = plain_model(), torch.zeros(())
    assert method._round is not None
    for q, group in zip(method._round.questions, method._round.groups):
        total = sum(s.total for s in group)
        for s in group:
            baseline = (total - s.total) / 3
            loss = loss - (s.total - baseline) * logprobs_of(plain, method.questions[q].ids, s.tokens).sum() / (4 * 6)
    loss.backward()
    assert distance(got, plain) < 1e-5 and work.facts["supervised_share"] == 0


@pytest.mark.parametrize("advantage", ["leave_one_out", "none"])  # of the first a group's sum is 0: given tokens would not tell
def test_between_the_first_tokens_are_given_and_the_tail_is_drawn(advantage: str) -> None:
    policy, method = mixer(0, 1, 9, advantage=advantage)
    given = method.longest - 9
    assert 0 < method.supervised(0) == given
    work = first_work(method, policy)
    got = gradient_of(method, policy, work)
    plain, loss = plain_model(), torch.zeros(())
    assert method._round is not None
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    lengths = {len(method.gold[q]) for q in method._round.questions}
    assert min(lengths) <= given < max(lengths), "the batch holds rows given whole and rows with a tail"
    for q, group in zip(method._round.questions, method._round.groups):
        total = sum(s.total or 0.0 for s in group)
        for s in group:
            assert s.tokens[:given] == method.gold[q][:given]
            logprobs = logprobs_of(plain, method.questions[q].ids, s.tokens)
            factor = torch.ones(len(s.tokens))
            if len(method.gold[q]) > given:
                assert s.total is not None and len(s.logprobs) == len(s.tokens) - given
                assert s.text == policy.decode(s.tokens)
                factor[given:] = s.total - ((total - s.total) / 3 if advantage == "leave_one_out" else 0.0)
            parts.append((factor, logprobs))
    count = sum(len(f) for f, _ in parts)
    for factor, logprobs in parts:
        loss = loss - (factor * logprobs).sum() / count
    loss.backward()
    assert distance(got, plain) < 1e-5
    # the prefix is computed once a group
    tokens = sum(len(m.stream.tokens) for m in work.batch.split(10_000))
    assert tokens < sum(len(method.questions[q].ids) + len(method.gold[q][:given]) for q in method._round.questions) + sum(
        len(s.logprobs) for group in method._round.groups for s in group
    ) + 1


def test_its_tail_grows_by_the_schedule(tmp_path: Path) -> None:
    _, rows = train(tmp_path / "00-rl", method={"name": "mixer", "warmup": 1, "period": 1, "fewer": 8}, steps=4)
    shares = [row["supervised_share"] for row in rows]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] < 0.5
    assert "reward_mean" not in rows[0] and "reward_mean" in rows[-1]
    assert all(row["sampler_gap_max"] < 1e-4 for row in rows if "sampler_gap_max" in row)


def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    given = {"method": {"name": "mixer", "warmup": 1, "period": 1, "fewer": 12, "advantage": "ema"}, "rollouts": {"group_size": 2, "updates": 2}}
    whole, rows = train(tmp_path / "00-whole", steps=6, **given)
    train(tmp_path / "01-parts", stop_after=5, steps=6, **given)
    parts, again = train(tmp_path / "01-parts", steps=6, **given)
    assert rows == again
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="period"):
        mixer(1, 0, 1)
    with pytest.raises(ConfigError, match="does not begin with the given tokens"):
        mixer(1, 1, 1, advantage="greedy_baseline")
    with pytest.raises(ConfigError, match="value"):
        mixer(1, 1, 1, advantage="gae")
    with pytest.raises(ConfigError, match="not a advantage"):
        mixer(1, 1, 1, advantage="nothing")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 8)
    with pytest.raises(DataError, match="nothing to learn after it"):
        stage(method="mixer", data={"file": str(rows)}, rewards="number")
