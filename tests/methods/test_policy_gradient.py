"""The policy-gradient method on the bundled model: what it draws, learns, logs, and continues after an interruption."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from burnish.build import build_stage
from burnish.config.load import load, resolve
from burnish.config.provenance import Document
from burnish.core.errors import ConfigError
from burnish.core.runs import StageFolder, read_jsonl
from burnish.core.stop import Stop
from burnish.core.table import describe
from burnish.methods.policy_gradient import PolicyGradient
from burnish.methods.rounds import Round, retire
from burnish.models.load import load_policy
from burnish.models.policy import Policy
from burnish.train.loop import fit
from burnish.train.memory import Memory


def stage(
    method: Any = "grpo", rewards: Any = "task", rollouts: dict[str, Any] | bool | None = None, critic: dict[str, Any] | None = None,
    data: Any = None, **train: Any,
) -> tuple[Policy, Any, Any]:  # fmt: skip
    """(policy, built stage, its recipe)"""
    train = {"steps": 4, "batch_rows": 4, "learning_rate": 1e-4} | train
    made = {"name": "rl", "method": method, "data": data or {"task": "sums", "levels": [2, 3], "rows": 64}, "rewards": rewards, "train": train,
            "rollouts": None if rollouts is False else {"group_size": 4, "max_new_tokens": 24} | (rollouts or {}), "critic": critic}  # fmt: skip
    recipe = resolve(Document("test", data={"burnish": 1, "name": "t", "model": "spark", "stages": [made]})).recipe
    policy = load_policy("spark", dtype="float32")
    policy.requires_grad_(True)
    return policy, build_stage(recipe, recipe.stages[0], policy), recipe.stages[0]


def train(folder: Path, *, stop_after: int | None = None, **given: Any) -> tuple[Policy, list[dict[str, Any]]]:
    policy, built, block = stage(**given)

    class StopAfter(Stop):
        pass

    stop = StopAfter()
    guards = []
    if stop_after is not None:
        guards = [lambda state, row: "enough" if state.step == stop_after else None]
    home = StageFolder(folder).make()
    fit(policy, built.method, block.train, home, schedule=built.schedule, memory=Memory.fixed(400), stop=stop, resume=True, guards=guards)
    return policy, list(read_jsonl(home.metrics))


def test_it_draws_scores_and_learns(tmp_path: Path) -> None:
    before = load_policy("spark", dtype="float32")
    policy, rows = train(tmp_path / "00-rl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    for row in rows:
        assert 0 <= row["reward_mean"] <= 1 and row["reward_abstained"] == 0
        assert row["sampler_gap_max"] < 1e-4 and row["completion_tokens"] > 1
        assert (row["label_tokens"] > 0) == (row["live_samples"] > 0)
    assert any(row["live_samples"] > 0 for row in rows)
    assert any(not torch.equal(a, b) for a, b in zip(before.model.parameters(), policy.model.parameters()))
    drawn = Round.read(StageFolder(tmp_path / "00-rl").trajectories(0))
    assert len(drawn.groups) == 4 and all(len(group) == 4 for group in drawn.groups)
    assert all(len(s.tokens) == len(s.logprobs) and set(s.rewards) == {"task"} for group in drawn.groups for s in group)


def test_what_training_made_of_a_round_stands_beside_it(tmp_path: Path) -> None:
    train(tmp_path / "00-rl", method={"name": "grpo", "kl_coef": 0.0}, rollouts={"updates": 2, "passes": 2})
    folder = StageFolder(tmp_path / "00-rl")
    drawn = Round.read(folder.trajectories(0))
    found = {}
    for part in (0, 1):
        head, *rows = [json.loads(line) for line in gzip.decompress(folder.credit(0, part).read_bytes()).splitlines()]
        assert head == {"schema": 1} and [row["group"] for row in rows] == [part, part + 2]
        found |= {row["group"]: row for row in rows}
    for q, group in enumerate(drawn.groups):
        reward = torch.tensor([s.total for s in group])
        assert found[q]["advantages"] == pytest.approx(((reward - reward.mean()) / (reward.std() + 1e-4)).tolist(), abs=1e-5)
        assert found[q]["live"] == [a != 0 for a in found[q]["advantages"]] and found[q]["prompt"][0]["role"] == "user" and found[q]["answer"]
    assert any(any(row["live"]) for row in found.values())


def test_rounds_on_disk_are_the_last_ones_and_ever_fewer_of_the_others(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "00-rl").make()
    (folder.root / "trajectories").mkdir()
    for number in range(100):
        for path in (folder.trajectories(number), folder.credit(number, 0)):
            path.write_bytes(b"")
        retire(folder, number)
    assert folder.rounds() == [0, 1, 2, 4, 8, 16, 32, *range(50, 100)]
    assert folder.of_round(3) == [] and folder.of_round(16) == [folder.credit(16, 0), folder.trajectories(16)]


def test_the_time_of_a_step_is_split(tmp_path: Path) -> None:
    train(tmp_path / "00-rl", method={"name": "grpo", "kl_coef": 0.0}, rollouts={"updates": 2})
    ledger = json.loads((tmp_path / "00-rl" / "ledger.json").read_text())
    spent = ledger["measured"]["seconds"]
    timing = list(read_jsonl(tmp_path / "00-rl" / "timing.jsonl"))
    assert spent["prepare"] + spent["reward"] + spent["train"] == pytest.approx(sum(row["seconds"] for row in timing), abs=1e-3)
    assert all(spent[name] > 0 for name in ("prepare", "reward", "train"))
    assert [row["reward_seconds"] > 0 for row in timing] == ["prepare_seconds" in row for row in timing] == [True, False, True, False]
    assert ledger["counted"]["prepare"]["sampled_tokens"] > 0 and "sampling" not in ledger["counted"]


@pytest.mark.parametrize(
    "given",
    [
        {"rollouts": {"updates": 2, "passes": 2}},  # stopped inside a round
        {"method": "reinforce"},  # a running baseline
        {"method": {"name": "grpo", "kl_coef": 0.1}, "rollouts": {"updates": 2}},  # a reference
    ],
)
def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path, given: dict[str, Any]) -> None:
    whole, rows = train(tmp_path / "00-whole", **given)
    train(tmp_path / "01-parts", stop_after=3, **given)
    parts, again = train(tmp_path / "01-parts", **given)
    assert rows == again
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))


def test_its_gradient_is_that_of_the_published_loss_on_padded_rows() -> None:
    policy, built, _ = stage(method={"name": "grpo", "kl_coef": 0.0}, rollouts={"group_size": 6}, batch_rows=8)
    method: PolicyGradient = built.method
    (work,) = [next(iter(method.batches(0)))]
    method.prepare(policy, work)
    assert work.made is not None and method._round is not None
    policy.zero_grad()
    for micro in work.batch.split(200):
        objective, couple = method.objective(work, micro)
        policy(micro, objective, couple=couple).loss.backward()
    got = {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}
    plain = load_policy("spark", dtype="float32", probe=False).model.requires_grad_(True)
    loss = torch.zeros(())
    samples = 8 * 6
    for q, group in zip(method._round.questions, method._round.groups):
        reward = torch.tensor([s.total for s in group])
        advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
        for a, s in zip(advantage, group):
            prompt = method.questions[q].ids
            ids = torch.tensor([[*prompt, *s.tokens]])
            logits = plain(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logprobs = -cross_entropy(logits, torch.tensor(s.tokens), reduction="none")
            ratio = (logprobs - logprobs.detach()).exp()
            loss = loss - (torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean() / samples)
    loss.backward()
    for name, p in plain.named_parameters():
        if p.grad is not None and float(p.grad.norm()) > 0:
            assert float((got[name] - p.grad).norm() / p.grad.norm()) < 2e-3, name


def test_equal_rewards_change_nothing_and_are_counted(tmp_path: Path) -> None:
    before = load_policy("spark", dtype="float32")
    policy, rows = train(tmp_path / "00-rl", rewards={"name": "length_cap", "cap": 1000}, method="dapo")
    assert all(row["loss"] is None and row["live_samples"] == 0 and row["dead_groups"] == 1 for row in rows)
    assert all(torch.equal(a, b) for a, b in zip(before.model.parameters(), policy.model.parameters()))


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="a group of 1"):
        stage(rollouts={"group_size": 1})
    with pytest.raises(ConfigError, match="cannot be split evenly"):
        stage(rollouts={"updates": 3})
    with pytest.raises(ConfigError, match="takes no values"):
        stage(method="grpo", critic={})
    with pytest.raises(ConfigError, match="draws no completions"):
        stage(method="sft", rewards=None)
    with pytest.raises(ConfigError, match="learns from rewards"):
        stage(rewards=None)


def test_a_user_reward_and_its_axes(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def short(prompts, completions, **rest):\n    return [-float(len(c[-1]['content'])) for c in completions]\n")
    _, rows = train(tmp_path / "00-rl", method={"name": "rloo", "kl_coef": 0.0}, rewards=f"{mine}:short")
    assert all(row["reward_mean"] < 0 for row in rows)
    assert json.dumps(rows)


REFUSED = {"grpo_process": "step"}
ROWS = sorted(name for name, row in describe("method").items() if {"advantage", "surrogate"} <= {p.name for p in row.parameters})


@pytest.mark.parametrize("name", ROWS)
def test_every_row_takes_a_step_or_says_what_it_lacks(name: str, tmp_path: Path) -> None:
    if name in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[name]):
            stage(method=name)
        return
    _, rows = train(tmp_path / "00-rl", method=name, steps=2, batch_rows=6, rollouts={"group_size": 4, "max_new_tokens": 16})
    assert len(rows) == 2 and all(row["skipped_steps"] == 0 for row in rows)
    assert any(row["grad_norm"] for row in rows)


def test_rows_need_a_prompt_and_no_completion(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1", "want": str(i + 1)}) + "\n" for i in range(8)))
    made = {"name": "rl", "method": "dapo", "data": {"file": str(rows)}, "rewards": {"name": "number", "columns": {"answer": "want"}},
            "train": {"steps": 1, "batch_rows": 4, "learning_rate": 1e-4}, "rollouts": {"group_size": 4, "max_new_tokens": 24}}  # fmt: skip
    recipe = resolve(Document("test", data={"burnish": 1, "name": "t", "model": "spark", "stages": [made]})).recipe
    policy = load_policy("spark", dtype="float32")
    method = build_stage(recipe, recipe.stages[0], policy).method
    work = next(iter(method.batches(0)))
    method.prepare(policy, work)
    assert 0 < work.facts["reward_mean"] <= 1 and work.facts["reward_abstained"] == 0


def test_r1_zero_pays_a_base_model_for_the_answer_and_for_work_before_it(tmp_path: Path) -> None:
    """Both rewards can be earned at once by a model that was never fine-tuned: `think` is 1 where work stands before one ####."""
    recipe = load("first_steps/r1_zero").recipe
    (stage_,) = recipe.stages  # no supervised stage before it
    policy = load_policy(recipe.model, dtype="float32")
    method = build_stage(recipe, stage_, policy).method
    method.start(policy, StageFolder(tmp_path / "01-rl").make(), lambda: None)
    work = next(iter(method.batches(0)))
    method.prepare(policy, work)
    samples = [s for group in method._round.groups for s in group]
    for s in samples:
        shown = re.fullmatch(r"\s*\S.*####\s*\S.*", s.text, re.DOTALL) is not None and s.text.count("####") == 1
        assert s.rewards["format"] == float(shown)
        assert s.total == pytest.approx(s.rewards["accuracy"] + 0.5 * s.rewards["format"])
    for name in ("accuracy", "format"):
        assert 0.2 < sum(s.rewards[name] or 0 for s in samples) / len(samples) < 0.8
    assert work.facts["dead_groups"] < 0.3
