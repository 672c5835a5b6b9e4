"""PPO with a critic: its loss against a plain one on padded rows, its targets by hand, its run, its resume, its pretraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from burnish.config.schema import Critic as Block
from burnish.core.errors import ConfigError
from burnish.core.runs import StageFolder, read_json, read_jsonl
from burnish.core.stop import Stop
from burnish.maths.policy_gradient import override
from burnish.maths.settings import POLICY_GRADIENT
from burnish.methods.critic import Valued
from burnish.methods.rounds import Round, Sample
from burnish.models.critic import FILE
from burnish.models.load import load_policy
from burnish.models.policy import Policy
from burnish.train.loop import fit
from burnish.train.memory import Memory
from burnish.train.method import Work
from tests.methods.test_policy_gradient import stage


def train(
    folder: Path, *, stop_after: int | None = None, watch: Any = None, memory: Memory | None = None, **given: Any
) -> tuple[Policy, Any, list[dict[str, Any]]]:
    policy, built, block = stage(**given)
    guards = [] if stop_after is None else [lambda state, row: "enough" if state.step == stop_after else None]
    home = StageFolder(folder).make()
    fit(
        policy, built.method, block.train, home, schedule=built.schedule, memory=memory or Memory.fixed(400), stop=Stop(), resume=True, guards=guards,
        on_step=None if watch is None else lambda row, timing, state: watch(policy, built.method, state.step),
    )  # fmt: skip
    return policy, built.method, list(read_jsonl(home.metrics))


# ---- the whole loss, against a plain one on padded rows


def gae_by_hand(reward: list[float], value: list[float], gamma: float, lam: float) -> list[float]:
    advantage, later = [0.0] * len(reward), 0.0
    for t in reversed(range(len(reward))):
        following = value[t + 1] if t + 1 < len(value) else 0.0
        later = reward[t] + gamma * following - value[t] + gamma * lam * later
        advantage[t] = later
    return advantage


def padded(model: Any, rows: list[tuple[tuple[int, ...], tuple[int, ...]]], head: tuple[Tensor, Tensor], body: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(log-probs, values) of each (prompt, completion), right-padded in one batch under transformers' own attention."""
    width = max(len(p) + len(c) for p, c in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, (p, c) in enumerate(rows):
        ids[i, : len(p) + len(c)], mask[i, : len(p) + len(c)] = torch.tensor([*p, *c]), 1
    logprobs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    value = (body.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state @ head[0].T)[..., 0] + head[1]
    spans = [(len(p) - 1, len(p) + len(c) - 1) for p, c in rows]
    taken = [logprobs[i, a:b].gather(-1, ids[i, a + 1 : b + 1, None])[:, 0] for i, (a, b) in enumerate(spans)]
    return taken, [value[i, a:b] for i, (a, b) in enumerate(spans)]


def shaken(parameters: Any, by: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(by * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_the_whole_loss_is_that_of_a_plain_ppo_on_padded_rows(trunk: str) -> None:
    """fp32; second part of a round of two, after policy and critic moved: ratios and values are off their old ones."""
    policy, built, _ = stage(
        method={"name": "ppo", "kl_coef": 0.2, "gamma": 0.98, "lam": 0.9}, rollouts={"group_size": 3, "updates": 2, "max_new_tokens": 12},
        critic={"trunk": trunk, "trains_body": True, "value_coef": 0.7, "value_clip": 0.05}, batch_rows=6,
    )  # fmt: skip
    method = built.method
    method.start(policy, None, lambda: None)
    critic = method.valued.critic
    before = load_policy("spark", dtype="float32", probe=False).model  # the reference
    shaken(policy.model.parameters(), 0.02, seed=1)
    shaken((critic.weight, critic.bias), 0.2, seed=2)
    old = load_policy("spark", dtype="float32", probe=False).model
    old.load_state_dict(policy.model.state_dict())
    old_head = (critic.weight.detach().clone(), critic.bias.detach().clone())
    old_body = before if trunk == "separate" else old  # a separate body is the model as the stage began
    works = list(method.batches(0))[:2]
    method.prepare(policy, works[0])
    shaken(policy.model.parameters(), 0.005, seed=3)
    shaken((critic.weight, critic.bias), 0.05, seed=4)
    if critic.own is not None:
        shaken(critic.own.body.parameters(), 0.01, seed=5)
    work = works[1]
    method.prepare(policy, work)
    total = 0.0
    for micro in work.batch.split(150):
        for run in method.forwards(policy, work, micro):
            out = run.policy(micro, run.objective, couple=run.couple, on_rows=run.on_rows)
            out.loss.backward()
            total += float(out.loss.detach())

    drawn: Round = method._round
    chosen = range(1, 6, 2)  # the part's questions
    rows = [(method.questions[drawn.questions[q]].ids, s.tokens) for q in chosen for s in drawn.groups[q]]
    samples = [s for q in chosen for s in drawn.groups[q]]
    with torch.no_grad():
        old_logprobs, old_values = padded(old, rows, old_head, old_body)
        ref_logprobs, _ = padded(before, rows, old_head, before)
    for s, want in zip(samples, old_values):
        assert_close(torch.tensor(s.values[:-1]), want, rtol=1e-4, atol=2e-5)
    new = load_policy("spark", dtype="float32", probe=False).model.requires_grad_(True)
    new.load_state_dict(policy.model.state_dict())
    body = new
    if critic.own is not None:
        body = load_policy("spark", dtype="float32", probe=False).model.requires_grad_(True)
        body.load_state_dict(critic.own.model.state_dict())
    head = (critic.weight.detach().clone().requires_grad_(), critic.bias.detach().clone().requires_grad_())
    logprobs, values = padded(new, rows, head, body)
    advantages, returns = [], []
    for s, o, r, v in zip(samples, old_logprobs, ref_logprobs, old_values):
        paid = [-0.2 * float(a - b) for a, b in zip(o, r)]
        paid[-1] += s.total
        advantage = gae_by_hand(paid, v.tolist(), 0.98, 0.9)
        advantages += advantage
        returns += [a + b for a, b in zip(advantage, v.tolist())]
    a = torch.tensor(advantages)
    a = (a - a.mean()) / (a.std() + 1e-4)
    ratio = (torch.cat(logprobs) - torch.cat(old_logprobs)).exp()
    policy_loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
    v, v_old, g = torch.cat(values), torch.cat(old_values), torch.tensor(returns)
    near = v_old + (v - v_old).clamp(-0.05, 0.05)
    value_loss = torch.maximum((v - g) ** 2, (near - g) ** 2).mean() / 2
    loss = policy_loss + 0.7 * value_loss
    loss.backward()
    with torch.no_grad():
        assert float(((v - v_old).abs() > 0.05).float().mean()) > 0.02 and float((ratio - 1).abs().max()) > 0.01
    assert_close(total, float(loss.detach()), rtol=1e-5, atol=1e-5)
    assert_close(work.facts["value_loss"], float(value_loss.detach()), rtol=1e-5, atol=1e-6)
    assert_close(critic.weight.grad, head[0].grad, rtol=1e-4, atol=1e-5)
    assert_close(critic.bias.grad, head[1].grad, rtol=1e-4, atol=1e-5)
    pairs = [(policy.model, new)] + ([] if critic.own is None else [(critic.own.model, body)])
    for ours, theirs in pairs:
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
            if q.grad is not None and float(q.grad.norm()) > 1e-6:
                assert p.grad is not None and float((p.grad - q.grad).norm() / q.grad.norm()) < 1e-4, name


# ---- targets


def sample(values: list[float], finish: str, total: float | None) -> Sample:
    n = len(values) - 1
    return Sample(tuple(range(n)), (-0.5,) * n, finish, "", {"r": total}, total, values=tuple(values))


@pytest.mark.parametrize("truncated", ["scored", "bootstrapped"])
def test_targets_are_the_returns_of_a_plain_loop(truncated: Any) -> None:
    setting = override(POLICY_GRADIENT["ppo"], kl_coef=0.0, gamma=0.9, lam=0.8)
    valued = Valued(Block(truncated=truncated), setting, total_steps=1)
    samples = [sample([0.1, 0.4, 0.2, 9.0], "stop", 1.0), sample([0.3, 0.6, 0.5], "length", 0.25), sample([0.2, 7.0], "stop", None)]
    size = torch.tensor([3, 2, 1])
    columns = {
        "unit": torch.arange(3).repeat_interleave(size), "known": torch.tensor([True, True, False]), "reward": torch.tensor([1.0, 0.25, 0.0]),
        "finished": torch.tensor([True, False, True]), "old_logprobs": torch.zeros(6),
    }  # fmt: skip
    columns |= valued.columns(samples, columns)
    work = Work(None, rows=1)
    made = valued.targets(setting, work, columns)
    # a cut completion is worth its reward, or what the critic says of its end
    last = 0.25 if truncated == "scored" else 0.9 * 0.5
    want, monte_carlo = [], []
    for paid, s in zip(([0.0, 0.0, 1.0], [0.0, last]), samples):
        v = list(s.values[:-1])
        want += [a + b for a, b in zip(gae_by_hand(paid, v, 0.9, 0.8), v)]
        monte_carlo += [sum(0.9 ** (i - t) * paid[i] for i in range(t, len(paid))) for t in range(len(paid))]
    assert_close(made["return"][:5], torch.tensor(want))
    assert made["value_weight"].tolist() == [*(pytest.approx(0.2),) * 5, 0.0]  # no reward is known of the third
    target, value = torch.tensor(monte_carlo), columns["value"][:5]
    assert_close(work.facts["explained_variance"], float(1 - (target - value).var() / target.var()), rtol=1e-5, atol=1e-6)
    assert_close(work.facts["value_mean"], float(value.mean()))


# ---- runs


def long_prompts(tmp_path: Path) -> str:
    mine = tmp_path / "mine.py"
    mine.write_text("def long(prompts, completions, **rest):\n    return [float(p[-1]['content'].count('+') > 1) for p in prompts]\n")
    return f"{mine}:long"


@pytest.mark.parametrize(
    ("critic", "at_least"),
    [({"trains_body": True, "learning_rate": 1e-2, "value_coef": 1.0}, 0.1), ({"trunk": "separate", "learning_rate": 3e-3}, 0.6)],
)
def test_a_critic_comes_to_explain_what_can_be_seen(critic: dict[str, Any], at_least: float, tmp_path: Path) -> None:
    _, method, rows = train(
        tmp_path / "00-rl", method={"name": "ppo", "kl_coef": 0.0}, rewards=long_prompts(tmp_path), critic=critic, steps=16, batch_rows=16,
        rollouts={"group_size": 1, "max_new_tokens": 12},
    )  # fmt: skip
    explained = [row["explained_variance"] for row in rows]
    assert explained[0] == 0 and rows[0]["value_mean"] == 0  # it knows nothing yet
    assert sum(explained[-3:]) / 3 > at_least
    assert rows[-1]["value_loss"] < rows[0]["value_loss"] / 2
    counted = read_json(StageFolder(tmp_path / "00-rl").ledger)["counted"]
    scored, sampled = (sum(phase.get(name, 0) for phase in counted.values()) for name in ("scored_tokens", "sampled_tokens"))
    assert scored == sampled > 0  # one pass for the values
    assert FILE in method.exports()


@pytest.mark.parametrize("critic", [{"trains_body": True}, {"trunk": "separate"}, {"trunk": "separate", "trains_body": False}])
def test_micro_batches_and_checkpointing_cannot_change_it(critic: dict[str, Any], tmp_path: Path) -> None:
    given = {"method": "ppo", "critic": critic | {"pretrain_steps": 1}, "steps": 2}
    whole, first, rows = train(tmp_path / "00-a", **given, memory=Memory.fixed(10**6))
    parts, second, again = train(tmp_path / "01-b", **given, memory=Memory.fixed(100, None, "layers"))
    for a, b in zip(rows, again):
        assert a["value_loss"] == pytest.approx(b["value_loss"], rel=1e-4) and a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-6)
        assert a["label_tokens"] == b["label_tokens"]
    for x, y in zip(whole.model.parameters(), parts.model.parameters()):
        assert (x - y).norm() <= 1e-3 * x.norm()
    for x, y in zip(first.valued.critic.parameters().values(), second.valued.critic.parameters().values()):
        assert (x - y).norm() <= 2e-3 * max(1e-2, float(x.norm()))


CASES = [
    {"method": "ppo", "rollouts": {"updates": 2, "passes": 2}, "critic": {"learning_rate": 1e-2}},
    {"method": "ppo", "critic": {"trunk": "separate", "pretrain_steps": 2}},
    {"method": "a2c", "critic": {"trains_body": True, "value_clip": None, "truncated": "bootstrapped"}},
    {"method": {"name": "ppo_kl", "penalty_target": 1e-9}},
    {"method": "ppo", "critic": {"prune": {"chunk_tokens": 8}}, "rollouts": {"updates": 2}},
]


@pytest.mark.parametrize("given", CASES)
def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(given: dict[str, Any], tmp_path: Path) -> None:
    whole, first, rows = train(tmp_path / "00-whole", **given)
    train(tmp_path / "01-parts", stop_after=3, **given)
    parts, second, again = train(tmp_path / "01-parts", **given)
    assert rows == again
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))
    ours, theirs = first.valued.critic.parameters(), second.valued.critic.parameters()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert any(bool(p.any()) for p in (first.valued.critic.weight, first.valued.critic.bias))
    ledgers = [read_json(StageFolder(tmp_path / n).ledger)["counted"] for n in ("00-whole", "01-parts")]
    assert ledgers[0] == ledgers[1]


@pytest.mark.parametrize("critic", [{"trains_body": True}, {"trunk": "separate"}, {}])
def test_pretraining_moves_the_critic_and_not_one_bit_of_the_policy(critic: dict[str, Any], tmp_path: Path) -> None:
    before = {n: p.detach().clone() for n, p in load_policy("spark", dtype="float32").model.named_parameters()}
    seen: list[tuple[bool, bool, int]] = []

    def watch(policy: Policy, method: Any, step: int) -> None:
        same = all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())
        seen.append((same, bool(method.valued.critic.weight.any()), policy.version))

    _, _, rows = train(tmp_path / "00-rl", method="ppo", critic={"pretrain_steps": 2} | critic, steps=3, weight_decay=0.1, watch=watch)
    assert seen == [(True, True, 0), (True, True, 0), (False, True, 1)]
    assert [row["grad_norm"] == 0 for row in rows] == [True, True, False]
    assert rows[1]["value_loss"] != rows[0]["value_loss"] and "sampler_gap" not in rows[0] and "sampler_gap" in rows[2]


def test_a_completion_without_a_gradient_of_its_own_still_teaches_the_critic(tmp_path: Path) -> None:
    """Reward 0 where the critic says 0: no advantage, and a value to confirm."""
    mine = tmp_path / "mine.py"
    mine.write_text("def nothing(prompts, completions, **rest):\n    return [0.0] * len(prompts)\n")
    _, _, rows = train(tmp_path / "00-rl", method="a2c", rewards=f"{mine}:nothing", steps=1)
    assert rows[0]["advantage_std"] == 0 and rows[0]["live_samples"] == 1 and rows[0]["value_loss"] == 0


def test_the_penalty_follows_how_far_the_policy_went(tmp_path: Path) -> None:
    """With one step a round the log-probs seen are at ratio 1: what is measured is after the update."""
    _, _, far = train(tmp_path / "00-far", method={"name": "ppo_kl", "penalty_target": 1e-9})
    assert [row["penalty_coef"] for row in far] == [1, 2, 4, 8] and all(row["policy_moved"] > 1.5e-9 for row in far[1:])
    _, _, near = train(tmp_path / "01-near", method={"name": "ppo_kl", "penalty_target": 1e3})
    assert [row["penalty_coef"] for row in near] == [1, 0.5, 0.25, 0.125] and "policy_moved" not in near[0]
    _, _, still = train(tmp_path / "02-still", method={"name": "ppo_kl", "penalty_target": 1e-9}, critic={"pretrain_steps": 2})
    assert [row["penalty_coef"] for row in still] == [1, 1, 1, 2]  # it did not move while the critic learned alone


@pytest.mark.parametrize(("trunk", "adapter"), [("shared", "null"), ("separate", "{name: lora, rank: 2}")])
def test_a_stages_critic_is_in_its_model_folder(trunk: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.models.critic import Critic
    from burnish.pipeline import run

    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"burnish: 1\nname: r\nmodel: spark\ndtype: float32\nstages:\n  - name: rl\n    method: ppo\n    data: {{task: sums, levels: [2], rows: 16}}\n"
        f"    rewards: task\n    rollouts: {{group_size: 2, max_new_tokens: 8}}\n    critic: {{trunk: {trunk}}}\n    adapter: {adapter}\n"
        "    train: {steps: 1, batch_rows: 4, learning_rate: 1e-4}\n"
    )
    done = run(recipe, under=tmp_path / "runs")
    policy = load_policy(done.folder / "01-rl/model", dtype="float32")
    critic = Critic.load(done.folder / "01-rl/model", policy)
    assert critic.trunk == trunk and bool(critic.weight.any())


# ---- what is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "grpo", "critic": {"trunk": "shared"}}, "'grpo' takes no values: a critic would do nothing"),
        ({"method": "ppo", "critic": {"pretrain_steps": 4}}, "4 of 4 steps for the critic alone"),
        ({"method": "ppo", "critic": {"trunk": "own"}}, "wanted shared or separate"),
        ({"method": "ppo", "critic": {"vf_coef": 1.0}}, "Did you mean 'value_coef'"),
        ({"method": "ppo", "critic": {"value_clip": 0}}, "wanted a number above 0, or null"),
        ({"method": "ppo", "critic": {"prune": {"below": 0.5}}, "rollouts": {"stop": ["x"]}}, "no stop string that lies across"),
        ({"method": "ppo", "critic": {"prune": {"chunk_tokens": 24}}}, "none would be cut"),
        ({"method": {"name": "ppo", "advantage": "group_centred", "whiten": "none"}, "critic": {}}, "takes no values"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stage(**given)


def test_another_methods_advantage_may_want_a_critic() -> None:
    _, built, _ = stage(method={"name": "dr_grpo", "advantage": "gae"}, critic={"trunk": "separate"})
    assert built.method.valued.block.trunk == "separate"
    _, built, _ = stage(method="ppo")
    assert built.method.valued.block == Block()  # the schema's own where the recipe is silent
