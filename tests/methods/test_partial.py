"""Partial rollouts: a round ends with its first whole groups, and the others go on in the next with other weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.core.errors import ConfigError
from burnish.core.runs import StageFolder
from burnish.methods.policy_gradient import PolicyGradient
from burnish.methods.rounds import Carried, Round
from burnish.models.load import load_policy
from tests.methods.test_policy_gradient import stage, train

GIVEN: dict[str, Any] = {"method": {"name": "grpo", "correction": "truncated"}, "rollouts": {"partial": 3, "max_new_tokens": 32}, "batch_rows": 6, "learning_rate": 3e-3}


def own_logprobs(model: Any, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def test_a_round_has_its_first_whole_groups_and_nothing_is_lost() -> None:
    policy, built, _ = stage(**GIVEN)
    rounds = built.method.rounds
    model = load_policy("spark", dtype="float32", probe=False).model
    asked: list[int] = []
    for number in range(4):
        before = [Carried.from_json(json.loads(json.dumps(c.to_json()))) for c in rounds.carried]
        assert before == rounds.carried  # what a checkpoint keeps is what there was
        drawn: Round = rounds.draw(policy, number)
        assert len(drawn.groups) == 6 and len(rounds.carried) == 3
        assert all(s.finish in ("stop", "length") and len(s.tokens) == len(s.logprobs) for group in drawn.groups for s in group)
        asked += list(drawn.questions)
        assert drawn.facts["carried_groups"] == 3 and 0 <= drawn.facts["stale_tokens"] < 1
        # those carried come first, with what they had as their beginning
        for c in before:
            if c.question in drawn.questions:
                found = drawn.groups[drawn.questions.index(c.question)]
                assert all(s.tokens[: len(b.tokens)] == b.tokens and s.logprobs[: len(b.tokens)] == b.logprobs for s, b in zip(found, c.samples))
    fresh = [i for n in range(4) for i in rounds.sampler.batch(n)]
    extra = rounds.sampler.batch(2 << 32)[:3]
    assert sorted([*asked, *(c.question for c in rounds.carried)]) == sorted([*fresh, *extra])  # each once
    assert any(s.tokens for c in rounds.carried for s in c.samples)
    # with weights that have not moved, what went on in pieces has the log-probs of the whole
    for q, group in zip(drawn.questions, drawn.groups):
        for s in group:
            assert s.text == policy.decode(s.tokens[:-1] if s.finish == "stop" else s.tokens)
            with torch.no_grad():
                assert torch.tensor(s.logprobs) == pytest.approx(own_logprobs(model, rounds.questions[q].ids, s.tokens), abs=1e-4)
    assert not rounds.engine._nodes  # every handle was given back


def test_tokens_keep_the_log_probs_of_the_weights_that_drew_them_and_are_corrected(tmp_path: Path) -> None:
    policy, built, _ = stage(**GIVEN | {"rollouts": GIVEN["rollouts"] | {"updates": 2}})
    method: PolicyGradient = built.method
    method.start(policy, StageFolder(tmp_path / "00-rl").make(), lambda: None)
    work = next(iter(method.batches(0)))
    method.prepare(policy, work)
    assert method.rounds.rescored and work.facts["stale_tokens"] == 0
    with torch.no_grad():  # the update
        for p in policy.trainable().values():
            p.mul_(1.02)
    policy.version += 1
    plain, moved = (load_policy("spark", dtype="float32", probe=False).model for _ in range(2))
    moved.load_state_dict({n: p.detach() for n, p in policy.model.named_parameters()}, strict=False)
    work = next(iter(method.batches(2)))
    method.prepare(policy, work)
    assert work.facts["stale_tokens"] > 0.05 and method._round is not None
    stale = 0
    for q, group in zip(method._round.questions, method._round.groups):
        for s in group:
            n = s.stale(method._round.version)
            with torch.no_grad():
                old, now = (own_logprobs(m, method.questions[q].ids, s.tokens) for m in (plain, moved))
            assert torch.tensor(s.logprobs[:n]) == pytest.approx(old[:n], abs=1e-4)
            assert torch.tensor(s.logprobs[n:]) == pytest.approx(now[n:], abs=1e-4)
            assert torch.tensor(s.old_logprobs) == pytest.approx(now, abs=1e-4)  # the trainer's, of all of it
            stale += n
    c = work.columns
    apart = (c["old_logprobs"] - c["sampler_logprobs"]).exp()
    assert stale and not c["drawn"].all()
    assert torch.allclose(c["policy_weight"], apart.clamp(max=2.0))
    assert float((apart[c["drawn"]] - 1).abs().max()) < 1e-3 < float((apart[~c["drawn"]] - 1).abs().max())


def test_it_trains_says_how_stale_and_the_gap_is_of_its_own_tokens(tmp_path: Path) -> None:
    _, rows = train(tmp_path / "00-rl", **GIVEN, steps=5)
    assert [row["carried_groups"] for row in rows] == [3] * 5
    assert rows[0]["stale_tokens"] == 0 and max(row["stale_tokens"] for row in rows) > 0.02
    assert all(row["sampler_gap_max"] < 1e-4 for row in rows if row.get("sampler_gap_max") is not None)
    found = Round.read(StageFolder(tmp_path / "00-rl").trajectories(4))
    assert any(s.drawn_by and s.stale(found.version) == sum(n for by, n in s.drawn_by if by != found.version) for g in found.groups for s in g)


@pytest.mark.parametrize("given", [{}, {"rollouts": {"updates": 2, "partial": 3, "max_new_tokens": 32}}, {"method": {"name": "remax", "correction": "truncated"}}])
def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path, given: dict[str, Any]) -> None:
    whole, rows = train(tmp_path / "00-whole", **GIVEN | given, steps=5)
    train(tmp_path / "01-parts", stop_after=3, **GIVEN | given, steps=5)
    parts, again = train(tmp_path / "01-parts", **GIVEN | given, steps=5)
    assert rows == again
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="begun by earlier weights"):
        stage(rollouts={"partial": 2})
    with pytest.raises(ConfigError, match="it might draw nothing"):
        stage(method={"name": "grpo", "correction": "truncated"}, rollouts={"partial": 4})
    with pytest.raises(ConfigError, match="does nothing for this method"):
        stage(method="astar_po", rollouts={"partial": 2})
    with pytest.raises(ConfigError, match="in pieces of their own"):
        stage(method={"name": "ppo", "correction": "truncated"}, rollouts={"partial": 2}, critic={"prune": {"chunk_tokens": 8}})
