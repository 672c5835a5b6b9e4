"""Faults of a reinforcement-learning stage; numbers are rows of the list of faults in the design."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.core.errors import DataError, DivergedError, StorageError
from burnish.core.runs import StageFolder
from burnish.core.stop import Stop
from burnish.engines.local.engine import LocalEngine
from burnish.train.loop import fit
from burnish.train.memory import Memory
from tests.methods.test_policy_gradient import stage, train

EQUAL = {"name": "length_cap", "cap": 1000}


def weights_of(policy: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.model.parameters()]


def test_17_over_long_prompts_are_refused_dropped_or_cut_and_counted() -> None:
    with pytest.raises(DataError, match=r"its prompt has \d+ tokens and 9 fit"):
        stage(max_tokens=9)
    _, whole, _ = stage()
    lengths = [len(q.ids) for q in whole.method.questions]
    limit = sorted(lengths)[len(lengths) // 2]
    over = sum(n > limit for n in lengths)
    assert 0 < over < len(lengths)
    _, dropped, _ = stage(max_tokens=limit, on_long_row="drop")
    assert len(dropped.method.questions) == len(lengths) - over
    assert dropped.summary["dropped"] == {"prompt too long": over}
    _, cut, _ = stage(max_tokens=limit, on_long_row="truncate")
    assert cut.summary["dropped"] == {"prompt truncated": over} and len(cut.method.questions) == len(lengths)
    for before, after in zip(whole.method.questions, cut.method.questions):
        assert after.ids == before.ids[-limit:]  # from the left


def test_22_a_loss_that_is_not_finite_makes_no_step(tmp_path: Path) -> None:
    policy, built, block = stage(method="dapo", steps=9, checkpoint_every=1, max_skipped_steps=2, batch_rows=8)
    method, true, seen = built.method, built.method.objective, []

    def spoilt(work: Any, micro: Any) -> Any:
        objective, couple = true(work, micro)
        if work.step < 2:
            return objective, couple
        seen.append((work.step, weights_of(policy)))
        return (lambda logprobs, entries: objective(logprobs, entries) * float("nan")), couple

    method.objective = spoilt
    home = StageFolder(tmp_path / "00-rl").make()
    with pytest.raises(DivergedError, match="3 times in a row; no update was made") as caught:
        fit(policy, method, block.train, home, schedule=built.schedule, memory=Memory.fixed(400), stop=Stop())
    assert caught.value.exit_code == 5 and "sums/train" in str(caught.value.where)  # the prompts of the batch are named
    (_, first), now = seen[0], weights_of(policy)
    assert all(torch.equal(a, b) for a, b in zip(first, now)) and all(bool(w.isfinite().all()) for w in now)


def test_26_rounds_without_a_live_group_teach_nothing_are_counted_and_may_stop_the_stage(tmp_path: Path) -> None:
    policy, built, block = stage(method="dapo", rewards=EQUAL, steps=9, rollouts={"stop_after_dead_rounds": 3})
    before, said = weights_of(policy), []
    home = StageFolder(tmp_path / "00-rl").make()
    state = fit(
        policy, built.method, block.train, home, schedule=built.schedule, memory=Memory.fixed(400), stop=Stop(),
        guards=built.guards, say=said.append,
    )  # fmt: skip
    assert state.step == 3 and "dead rounds: in 3 rounds in a row" in str(state.stopped_by)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(policy)))
    assert sum("every sample of every group has the same reward" in text for text in said) == 1  # said once


def test_27_components_that_cancel_are_said_and_kept_apart(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def up(completions):\n    return [float(len(c[-1]['content'])) for c in completions]\n"
        "def down(completions):\n    return [-float(len(c[-1]['content'])) for c in completions]\n"
    )
    policy, built, block = stage(method="dapo", rewards=[f"{mine}:up", f"{mine}:down"], steps=2)
    said: list[str] = []
    home = StageFolder(tmp_path / "00-rl").make()
    rows: list[Any] = []
    fit(
        policy, built.method, block.train, home, schedule=built.schedule, memory=Memory.fixed(400), stop=Stop(), say=said.append,
        on_step=lambda row, timing, state: rows.append(row),
    )  # fmt: skip
    for row in rows:
        assert row["reward_cancelled_groups"] > 0 and row["reward_std"] == 0 and row["dead_groups"] == 1
        up, down = row["components"]["up"], row["components"]["down"]
        assert up["reward_std"] == down["reward_std"] > 0 and up["reward_mean"] == -down["reward_mean"]
        assert up["reward_min"] == -down["reward_max"] and "reward_seconds" not in up
    assert sum("the components vary but their sum does not" in text for text in said) == 1


class Stale(LocalEngine):
    """A sampler whose weights were not brought up to date after the first round."""

    def sample(self, *args: Any) -> Any:
        return [replace(t, weights_version="0") for t in super().sample(*args)]


class Silent(LocalEngine):
    """A sampler that does not say how likely its tokens were."""

    def sample(self, *args: Any) -> Any:
        return [replace(t, logprobs=None) for t in super().sample(*args)]


def test_38_completions_of_other_weights_are_never_learned_from(tmp_path: Path) -> None:
    policy, built, block = stage(method={"name": "grpo"}, steps=3)
    built.method.rounds.engine = Stale(policy, end_ids=built.method.rounds.end_ids)
    after: list[Any] = []
    home = StageFolder(tmp_path / "00-rl").make()
    with pytest.raises(DataError, match=r"trajectory 0/0  was sampled with weights 0, the policy is at 1"):
        fit(
            policy, built.method, block.train, home, schedule=built.schedule, memory=Memory.fixed(400), stop=Stop(),
            on_step=lambda row, timing, state: after.append(weights_of(policy)),
        )  # fmt: skip
    assert len(after) == 1 and all(torch.equal(a, b) for a, b in zip(after[0], weights_of(policy)))
    policy, built, block = stage(method="grpo")
    built.method.rounds.engine = Silent(policy, end_ids=built.method.rounds.end_ids)
    with pytest.raises(DataError, match=r"0 log-probs for \d+ sampled tokens"):
        fit(policy, built.method, block.train, home, schedule=built.schedule, memory=Memory.fixed(400), stop=Stop())


def test_38_a_resume_refuses_a_round_that_other_weights_drew_or_that_is_gone(tmp_path: Path) -> None:
    given: dict[str, Any] = {"rollouts": {"passes": 3}, "steps": 6}
    home = StageFolder(tmp_path / "00-rl")
    train(home.root, stop_after=2, **given)
    path = home.trajectories(0)
    kept = path.read_bytes()
    path.write_bytes(gzip.compress(gzip.decompress(kept).replace(b'"weights_version": "0"', b'"weights_version": "7"', 1)))
    with pytest.raises(DataError, match="drawn with weights 7; the checkpoint is inside round 0, drawn with weights 0"):
        train(home.root, **given)
    path.unlink()
    with pytest.raises(StorageError, match="the round being learned from is gone"):
        train(home.root, **given)
    path.write_bytes(kept)
    assert len(train(home.root, **given)[1]) == 6
