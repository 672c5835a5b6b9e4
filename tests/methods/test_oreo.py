"""OREO: actions by level, both gradients against plain autograd, stored completions of files and of other runs, resume."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.core.errors import ConfigError, DataError
from burnish.core.runs import StageFolder, read_jsonl
from burnish.core.stop import Stop
from burnish.core.table import load_row
from burnish.data.tasks.base import items
from burnish.maths.offline import oreo_policy, oreo_value
from burnish.methods.oreo import Offline, action_ends, first_of, label_ids
from burnish.methods.rounds import Round
from burnish.methods.stored import stored
from burnish.models.critic import FILE, Critic
from burnish.train.loop import fit
from burnish.train.memory import Memory
from tests.methods.oracles import distance, plain_model
from tests.methods.test_policy_gradient import stage
from tests.methods.test_policy_gradient import train as train_online


def write_rows(path: Path, count: int = 24) -> Path:
    """Sums with the right rationale, and with the answer of another sum."""
    task: Any = load_row("task", "sums")
    asked = items(task, "train", [2, 3], count, 0)
    rows = [{"prompt": a.question, "completion": (a if i % 2 else b).rationale, "reward": float(i % 2)} for i, (a, b) in enumerate(zip(asked, asked[1:] + asked[:1]))]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def offline(path: Path, method: Any = "oreo", **train: Any) -> tuple[Any, Offline, Any]:
    policy, built, block = stage(method=method, rewards=None, rollouts=False, data={"file": str(path)}, **train)
    return policy, built.method, (built, block)


def train(folder: Path, rows: Path, *, stop_after: int | None = None, **given: Any) -> tuple[Any, Offline, list[dict[str, Any]]]:
    policy, method, (built, block) = offline(rows, **given)
    guards = [] if stop_after is None else [lambda state, row: "enough" if state.step == stop_after else None]
    home = StageFolder(folder).make()
    fit(policy, method, block.train, home, schedule=built.schedule, memory=Memory.fixed(200), stop=Stop(), resume=True, guards=guards)
    return policy, method, list(read_jsonl(home.metrics))


def test_actions_are_tokens_steps_or_the_response() -> None:
    labels = ["1", "+2", "=3\n", "3", "\n", "end"]
    assert action_ends("token", labels, "\n") == [True] * 6
    assert action_ends("step", labels, "\n") == [False, False, True, False, True, True]
    assert action_ends("step", ["a", "b\n", "\nc", "d"], "\n\n") == [False, False, True, True]  # an end across two tokens
    assert action_ends("step", ["\n", "", "x"], "\n") == [True, False, True]
    assert action_ends("response", labels, "\n") == [False] * 5 + [True]


@pytest.mark.parametrize("trunk", ["shared", "separate"])
@pytest.mark.parametrize(("level", "alpha"), [("token", 0.0), ("step", 0.7), ("response", 0.0)])
def test_its_gradients_are_those_of_the_published_losses_on_separate_rows(level: str, alpha: float, trunk: str, tmp_path: Path) -> None:
    given = {"name": "oreo", "level": level, "trunk": trunk, "kl_coef": 0.2, "exact_kl_coef": alpha}
    policy, method, _ = offline(write_rows(tmp_path / "rows.jsonl"), given, batch_rows=6)
    method.start(policy, None, lambda: None)  # type: ignore[arg-type]
    critic = method.critic
    with torch.no_grad():  # away from the reference and from a critic that says nothing
        for p in policy.trainable().values():
            p.mul_(1.01)
        critic.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        critic.bias.fill_(0.3)
    work = next(iter(method.batches(0)))
    method.prepare(policy, work)
    policy.zero_grad()
    for micro in work.batch.split(120):
        for run in method.forwards(policy, work, micro):
            run.policy(micro, run.objective, couple=run.couple, on_rows=run.on_rows).loss.backward()
    got = {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}

    plain, reference, body = plain_model(), plain_model(), plain_model()
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(1.01)
    weight, bias = (x.detach().clone().requires_grad_() for x in (critic.weight, critic.bias))
    policy_loss = value_loss = whole = torch.zeros(())
    for i in method.sampler.batch(0):
        row, ends = method.prepared.rows[i], method.ends[i]
        ids = torch.tensor([row.ids])
        at = [k for k, trained in enumerate(row.trained) if trained and k]
        label = torch.tensor(label_ids(row))
        rows = torch.tensor(at) - 1
        every = plain(ids, use_cache=False).logits[0, rows].log_softmax(-1)
        with torch.no_grad():
            every_ref = reference(ids, use_cache=False).logits[0, rows].log_softmax(-1)
        logprobs, ref = (x.gather(1, label[:, None])[:, 0] for x in (every, every_ref))
        whole = whole + (every.exp() * (every - every_ref)).sum(-1).mean() / 6
        trunk_of = plain if trunk == "shared" else body
        hidden = trunk_of.model(ids, use_cache=False).last_hidden_state[0, rows]
        hidden = hidden.detach() if trunk == "shared" else hidden
        starts = [0] + [k + 1 for k, end in enumerate(ends[:-1]) if end]
        stops = [*starts[1:], len(ends)]
        assert len(starts) == {"token": len(ends), "response": 1}.get(level, len(starts)) and (level != "step" or 1 < len(starts) < len(ends))
        value = hidden[starts] @ weight[0] + bias
        gap = torch.stack([(logprobs - ref)[a:b].sum() for a, b in zip(starts, stops)])
        for t in range(len(starts)):
            later = gap[t + 1 :].sum().detach()
            target = method.reward[i]
            scale = 1 / (6 * len(starts))
            policy_loss = policy_loss + scale * (value[t].detach() - target + 0.2 * gap[t] + 0.2 * later) ** 2
            value_loss = value_loss + scale * (value[t] - target + 0.2 * (gap[t].detach() + later)) ** 2
    (policy_loss + alpha * whole).backward()
    assert distance(got, plain) < 1e-5
    if alpha:
        assert work.facts["exact_kl"] == pytest.approx(float(whole), rel=1e-3)
    value_loss.backward()
    assert critic.weight.grad is not None and critic.bias.grad is not None and weight.grad is not None and bias.grad is not None
    moved, wanted = torch.cat([critic.weight.grad[0], critic.bias.grad]), torch.cat([weight.grad[0], bias.grad])
    assert float((moved - wanted).norm() / wanted.norm()) < 1e-5
    assert work.facts["value_loss"] == pytest.approx(float(value_loss), rel=1e-4)
    if trunk == "separate":
        assert critic.own is not None
        mine = {n: p.grad for n, p in critic.own.model.named_parameters() if p.grad is not None}
        assert distance(mine, body) < 1e-5


def test_at_the_optimum_of_a_tree_that_is_written_out_no_residual_is_left() -> None:
    from tests.maths.test_offline import BETA, TOKENS, UNIT, tree

    ref, best, value, reward = tree()
    for f in (oreo_policy, oreo_value):
        assert float(f(best, ref, value, reward, TOKENS, UNIT, kl_coef=BETA).max()) < 1e-12
        assert float(f(best + 0.1, ref, value, reward, TOKENS, UNIT, kl_coef=BETA).max()) > 1e-4
    assert first_of(torch.tensor([4, 4, 5, 7, 7])).tolist() == [0, 2, 3]


def test_it_learns_what_was_right_and_a_search_can_load_the_values(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    policy, method, metrics = train(tmp_path / "00-oreo", rows, method={"name": "oreo", "level": "step", "kl_coef": 0.1}, steps=30, batch_rows=12, learning_rate=1e-3)
    for name in ("value_loss", "loss"):  # of single batches: means of ten
        curve = [row[name] for row in metrics]
        assert sum(curve[-10:]) < 0.3 * sum(curve[:10]), name
    work = next(iter(method.batches(0)))
    wanted = method.critic.values(policy, work.batch).before
    (tmp_path / "critic").mkdir()
    method.exports()[FILE](tmp_path / FILE)
    found = Critic.load(tmp_path, policy).values(policy, work.batch).before
    assert torch.equal(found, wanted) and float(found.std()) > 0.05


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path, trunk: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    given = {"method": {"name": "oreo", "trunk": trunk}}
    whole, one, metrics = train(tmp_path / "00-whole", rows, **given)
    train(tmp_path / "01-parts", rows, stop_after=2, **given)
    parts, two, again = train(tmp_path / "01-parts", rows, **given)
    assert metrics == again
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(one.critic.parameters().values(), two.critic.parameters().values()))
    assert float(one.critic.weight.norm()) > 0


def test_it_learns_from_the_trajectories_of_another_run(tmp_path: Path) -> None:
    train_online(tmp_path / "00-grpo", steps=2)
    folder = tmp_path / "00-grpo" / "trajectories"
    drawn = [Round.read(p) for p in sorted(folder.glob("round-??????.jsonl.gz"))]
    _, method, _ = offline(folder)
    wanted = [((*p, *s.tokens), s.total) for r in drawn for p, group in zip(r.prompts, r.groups) for s in group]
    assert [(r.ids, w) for r, w in zip(method.prepared.rows, method.reward)] == wanted and len(wanted) == 2 * 4 * 4
    assert all(not any(r.trained[: len(r.ids) - sum(r.trained)]) for r in method.prepared.rows)
    assert {0.0, 1.0} <= set(method.reward)
    _, _, metrics = train(tmp_path / "01-oreo", folder)
    assert any(row["grad_norm"] > 0 for row in metrics)
    with pytest.raises(DataError, match="learns from rows"):
        stage(method="sft", rewards=None, rollouts=False, data={"file": str(folder)})
    with pytest.raises(DataError, match="learns from rows"):
        stage(method="grpo", data={"file": str(folder)})
    with pytest.raises(ConfigError, match="columns is for a file"):
        stage(method="oreo", rewards=None, rollouts=False, data={"file": str(folder), "columns": {"prompt": "a", "completion": "b"}})


def test_damaged_and_foreign_trajectories_are_refused(tmp_path: Path) -> None:
    train_online(tmp_path / "00-grpo", steps=1)
    folder = tmp_path / "00-grpo" / "trajectories"
    (path,) = folder.glob("round-??????.jsonl.gz")
    good = path.read_bytes()
    with pytest.raises(DataError, match="tokenizer"):
        list(stored(folder, lambda ids: "something else"))
    lines = gzip.decompress(good).decode().splitlines()
    head = json.loads(lines[0])
    del head["prompts"]
    path.write_bytes(gzip.compress("\n".join([json.dumps(head), *lines[1:]]).encode()))
    with pytest.raises(DataError, match="does not hold the prompts"):
        list(stored(folder, str))
    for bad in (good[: len(good) // 2], b"", b"not gzip"):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="not a round that can be read"):
            list(stored(folder, str))
    path.unlink()
    with pytest.raises(DataError, match="folder without rounds"):
        offline(folder)


@pytest.mark.parametrize(
    ("row", "method", "said"),
    [
        ({}, {}, "has no column 'reward'"),
        ({"score": 1}, {"reward_column": "scores"}, "Did you mean 'score'"),
        ({"reward": None}, {}, "missing"),
        ({"reward": "good"}, {}, "wanted a finite number"),
        ({"reward": 1.0}, {}, "nothing to tell apart"),
        ({"reward": 1.0}, {"level": "word"}, "token, step"),
        ({"reward": 1.0}, {"kl_coef": 0.0}, "kl_coef"),
        ({"reward": 1.0}, {"value_learning_rate": 0.0}, "value_learning_rate"),
        ({"reward": 1.0}, {"level": "step", "step_end": ""}, "step_end"),
        ({"reward": 1.0}, {"level": "step", "step_end": "###"}, "no completion holds"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, row: dict[str, Any], method: dict[str, Any], said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps({"prompt": "1+1=", "completion": "2"} | row) + "\n") * 8)
    with pytest.raises((ConfigError, DataError), match=said):
        offline(path, {"name": "oreo", **method})


def test_keys_of_methods_that_draw_are_refused(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match="takes no rewards"):
        stage(method="oreo", rewards="task", rollouts=False, data={"file": str(rows)})
    with pytest.raises(ConfigError, match="draws no completions"):
        stage(method="oreo", rewards=None, data={"file": str(rows)})
    with pytest.raises(ConfigError, match="no loss on held-out rows"):
        offline(rows, validation_rows=2)
