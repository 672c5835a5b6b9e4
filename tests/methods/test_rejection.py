"""Learning from one's own right answers: what is kept, what is learned, where rounds start, and that it all resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from burnish.build import build_stage
from burnish.config.load import resolve
from burnish.config.provenance import Document
from burnish.core.errors import ConfigError, DataError, StorageError
from burnish.core.runs import StageFolder, read_jsonl
from burnish.core.stop import Stop
from burnish.methods.rejection import best, verified
from burnish.methods.rounds import Round, Sample
from burnish.models.load import load_policy
from burnish.models.policy import Policy
from burnish.train import checkpoint
from burnish.train.loop import fit
from burnish.train.memory import Memory


def sample(text: str, total: float | None, finish: str = "stop") -> Sample:
    return Sample((1, 2), (-1.0, -1.0), finish, text, {}, total)


def test_right_finished_and_different_answers_are_kept_in_order() -> None:
    group = [sample("a", 0.0), sample("b  c", 1.0), sample("b c", 1.0), sample("d", 1.0, "length"), sample("e", None), sample("f\n", 0.9), sample("g", 0.5)]
    assert verified(group, 0.5, None) == [1, 5]  # 0.5 is not above 0.5; blanks make no difference; cut and unknown are left out
    assert verified(group, 0.5, 1) == [1] and verified(group, 0.95, None) == [1] and verified(group, -1.0, 2) == [0, 1]
    assert verified(group[3:5], 0.5, None) == []


def test_the_best_is_one_of_the_finished_and_the_first_of_equals() -> None:
    group = [sample("a", -2.0), sample("b", 9.0, "length"), sample("c", -1.0), sample("d", -1.0), sample("e", None)]
    assert best(group) == [2] and best(group[:1]) == [0] and best([group[1], group[4]]) == []


def stage(method: Any, rewards: Any = "task", rollouts: dict[str, Any] | None = None, rows: int = 24, **train: Any) -> tuple[Policy, Any, Any]:
    train = {"steps": 4, "batch_rows": 8, "learning_rate": 1e-3} | train
    made = {"name": "own", "method": method, "data": {"task": "sums", "levels": [2], "rows": rows}, "rewards": rewards, "train": train,
            "rollouts": {"group_size": 4, "max_new_tokens": 24} | (rollouts or {})}  # fmt: skip
    recipe = resolve(Document("test", data={"burnish": 1, "name": "t", "model": "spark", "stages": [made]})).recipe
    policy = load_policy("spark", dtype="float32")
    policy.requires_grad_(True)
    return policy, build_stage(recipe, recipe.stages[0], policy), recipe.stages[0]


def train(folder: Path, method: Any, *, stop_after: int | None = None, watch: Any = None, **given: Any) -> tuple[Policy, list[dict[str, Any]]]:
    policy, built, block = stage(method, **given)
    if watch is not None:
        objective = built.method.objective
        built.method.objective = lambda work, micro: watch(policy, work) or objective(work, micro)
    guards = [lambda state, row: "enough" if state.step == stop_after else None]
    home = StageFolder(folder).make()
    fit(policy, built.method, block.train, home, schedule=built.schedule, memory=Memory.fixed(400), stop=Stop(), resume=True, guards=guards)
    return policy, list(read_jsonl(home.metrics))


def weights(policy: Policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.model.parameters()]


STAR = {"name": "star", "rounds": 2, "hint": "{question}={answer}"}


@pytest.mark.parametrize("method", ["rft", {"name": "rest_em", "rounds": 2}, {"name": "raft", "rounds": 2, "prompts": 10}, STAR], ids=str)
@pytest.mark.parametrize("stop_after", [2, 3])  # between two rounds, and inside one
def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path, method: Any, stop_after: int) -> None:
    whole, rows = train(tmp_path / "00-whole", method)
    train(tmp_path / "01-parts", method, stop_after=stop_after)
    parts, again = train(tmp_path / "01-parts", method)
    assert len(rows) == 4 and rows == again
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))
    first, second = (StageFolder(tmp_path / name).ledger.read_text() for name in ("00-whole", "01-parts"))
    assert first.partition('"measured"')[0] == second.partition('"measured"')[0]


def test_what_was_drawn_is_needed_to_go_on(tmp_path: Path) -> None:
    train(tmp_path / "00-own", "rft", stop_after=1)
    StageFolder(tmp_path / "00-own").trajectories(0).unlink()
    with pytest.raises(StorageError, match="is gone"):
        train(tmp_path / "00-own", "rft")


def test_its_gradient_is_that_of_sft_on_the_kept_completions() -> None:
    policy, built, _ = stage("rft", batch_rows=24)
    method = built.method
    work = next(iter(method.batches(0)))
    method.prepare(policy, work)
    assert method._rows and work.rows == len(set(work.where)) == 24
    policy.zero_grad()
    for micro in work.batch.split(200):
        objective, couple = method.objective(work, micro)
        assert couple is None
        policy(micro, objective).loss.backward()
    got = {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}
    plain = load_policy("spark", dtype="float32", probe=False).model.requires_grad_(True)
    names = [r.where for r in method._rows]
    total, labels = torch.zeros(()), 0
    for where in work.where:
        row = method._rows[names.index(where)]
        ids = torch.tensor([row.ids])
        at = [t for t, flag in enumerate(row.trained) if flag]
        assert at == list(range(at[0], len(row.ids))) and row.ids[-1] in method.rounds.end_ids
        total = total + cross_entropy(plain(ids, use_cache=False).logits[0, [t - 1 for t in at]], ids[0, at], reduction="sum")
        labels += len(at)
    (total / labels).backward()
    for name, p in plain.named_parameters():
        if p.grad is not None and float(p.grad.norm()) > 0:
            assert float((got[name] - p.grad).norm() / p.grad.norm()) < 2e-3, name


@pytest.mark.parametrize(("name", "restarts"), [("rft", False), ("raft", False), ("rest_em", True), ("star", True)])
def test_where_a_round_starts(tmp_path: Path, name: str, restarts: bool) -> None:
    """At the second round's first step: the stage's first weights and no moments, or those the first round left."""
    seen: dict[int, list[torch.Tensor]] = {}
    train(tmp_path / "00-own", {"name": name, "rounds": 2}, watch=lambda policy, work: seen.setdefault(work.step, weights(policy)) and None)
    same = all(torch.equal(a, b) for a, b in zip(seen[0], seen[2]))
    assert same is restarts and not all(torch.equal(a, b) for a, b in zip(seen[0], seen[1]))
    saved = checkpoint.latest(StageFolder(tmp_path / "00-own"))
    assert saved is not None
    assert {int(value) for key, value in saved.tensors.items() if key.startswith("step/")} == {2 if restarts else 4}


def test_each_round_has_the_whole_schedule_and_says_what_it_kept(tmp_path: Path) -> None:
    _, rows = train(tmp_path / "00-own", {"name": "rest_em", "rounds": 2}, schedule="linear")
    assert [row["lr"] for row in rows] == [1e-3, 5e-4, 1e-3, 5e-4]
    assert [("kept_rows" in row, "reward_mean" in row) for row in rows] == [(True, True), (False, False)] * 2
    home = StageFolder(tmp_path / "00-own")
    for number, row in ((0, rows[0]), (1, rows[2])):
        drawn = Round.read(home.trajectories(number))
        right = [{" ".join(s.text.split()) for s in group if s.total == 1 and s.finish != "length"} for group in drawn.groups]
        assert row["kept_rows"] == sum(map(len, right)) and row["solved_prompts"] == sum(map(bool, right)) / 24
        assert row["epoch"] == pytest.approx(8 / row["kept_rows"], abs=1e-6)
    assert rows[0]["reward_mean"] == pytest.approx(sum(s.total or 0 for g in Round.read(home.trajectories(0)).groups for s in g) / 96)


def test_a_hint_helps_to_find_an_answer_and_is_not_learned() -> None:
    """A reward that only the answer told can earn: every row is hinted, and none shows the hint."""
    policy, built, _ = stage(STAR, rollouts={"group_size": 2}, rows=16)
    method = built.method
    draw = method.rounds.draw

    def only_with_a_hint(policy: Any, number: int, *, chosen: Any, hinted: bool) -> Round:
        made = draw(policy, number, chosen=chosen, hinted=hinted)
        if not hinted:
            made.groups = [[Sample(s.tokens, s.logprobs, s.finish, s.text, s.rewards, 0.0) for s in group] for group in made.groups]
        return made

    method.rounds.draw = only_with_a_hint
    work = next(iter(method.batches(0)))
    method.prepare(policy, work)
    assert work.facts["kept_hinted"] == work.facts["kept_rows"] == len(method._rows) > 0 and work.facts["solved_prompts"] == 0
    for row in method._rows:
        asked = policy.decode(row.ids[: row.trained.index(True)])
        assert "=" not in asked and any(row.ids[: len(q.ids)] == q.ids and q.hinted and "=" in policy.decode(q.hinted) for q in method.rounds.questions)


def test_a_round_asks_its_prompts_and_no_others() -> None:
    policy, built, _ = stage({"name": "raft", "rounds": 2, "prompts": 10})
    method = built.method
    works = list(method.batches(0))
    method.prepare(policy, works[0])
    assert work_prompts(method) <= set(method.rounds.sampler.batch(0)) and len(method.rounds.sampler.batch(0)) == 10
    assert len(method._rows) <= 10 and works[0].facts["kept_rows"] == len(method._rows)
    method.prepare(policy, works[2])
    assert work_prompts(method) <= set(method.rounds.sampler.batch(1)) and not set(method.rounds.sampler.batch(0)) & set(method.rounds.sampler.batch(1))


def work_prompts(method: Any) -> set[int]:
    return {i for i, q in enumerate(method.rounds.questions) if any(r.where.startswith(q.where + ",") for r in method._rows)}


def test_nothing_kept_is_refused_with_what_was_drawn(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"round 1.*none of 96 completions of 24 prompts.*mean reward") as caught:
        train(tmp_path / "00-own", {"name": "rft", "threshold": 1.0})  # not above 1
    assert "threshold" in str(caught.value.remedy)


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    for method, given, said in (
        ({"name": "rft", "rounds": 3}, {}, "4 steps cannot be shared evenly by 3 rounds"),
        ("rft", {"steps": None, "epochs": 2}, "known only once they are drawn"),
        ({"name": "rft", "rounds": 0}, {}, "0 rounds do nothing"),
        ("rft", {"rollouts": {"passes": 2}}, "passes are of policy gradients"),
        ("rft", {"rewards": None}, "learns from rewards"),
        ("rft", {"validation_rows": 4}, "no loss on held-out rows"),
        ({"name": "rft", "per_prompt": 0}, {}, "wanted 1 or more"),
        ({"name": "raft", "prompts": 100}, {}, "asks 100 prompts and the data has 24"),
    ):
        with pytest.raises(ConfigError, match=said):
            stage(method, **given)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1"}\n' * 8)
    made = {"name": "own", "method": "star", "data": {"file": str(rows)}, "rewards": "think", "train": {"steps": 3, "batch_rows": 2, "learning_rate": 1e-3}}
    recipe = resolve(Document("test", data={"burnish": 1, "name": "t", "model": "spark", "stages": [made]})).recipe
    with pytest.raises(DataError, match="no answer to hint at"):
        build_stage(recipe, recipe.stages[0], load_policy("spark", dtype="float32"))
