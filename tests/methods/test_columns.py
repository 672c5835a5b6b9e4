"""Columns, filters, corrections and coefficients of a training run: each against its formula, and each resumed bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.core.errors import ConfigError
from burnish.core.runs import StageFolder, read_json
from burnish.engines.local.engine import LocalEngine
from burnish.maths.entropies import entropy as entropy_of
from burnish.methods.policy_gradient import PolicyGradient, Round
from burnish.methods.rounds import Sample, all_dead, dead, undecided
from burnish.models.load import load_policy
from burnish.train.method import Work
from tests.methods.test_policy_gradient import stage, train

ONE_STEP = {"use": ["task_steps"], "steps": {"name": "separator", "between": "@@@"}}
EQUAL = {"name": "length_cap", "cap": 1000}  # every completion earns the same


def prepared(**given: Any) -> tuple[Any, PolicyGradient, Work]:
    """(policy, method, its first work) with the columns made and no step taken."""
    policy, built, _ = stage(**given)
    method: PolicyGradient = built.method
    method.start(policy, None, lambda: None)  # type: ignore[arg-type]
    work = next(iter(method.batches(0)))
    method.prepare(policy, work)
    return policy, method, work


def plain_logits(policy: Any, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Tensor:
    """Of every sampled token, from separate rows of an unmodified model."""
    ids = torch.tensor([[*prompt, *tokens]])
    return policy.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]


@pytest.fixture(scope="module")
def plain() -> Any:
    return load_policy("spark", dtype="float32", probe=False)


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_process_grpo_with_one_step_is_grpo(tmp_path: Path) -> None:
    by_step, rows = train(tmp_path / "00-steps", method="grpo_process", rewards=ONE_STEP, steps=2)
    whole, other = train(tmp_path / "01-whole", method="grpo", rewards="task", steps=2)
    assert any(row["grad_norm"] for row in rows)
    assert all(torch.equal(a, b) for a, b in zip(by_step.model.parameters(), whole.model.parameters()))
    assert [row["loss"] for row in rows] == [row["loss"] for row in other]


def test_credit_of_steps_by_hand() -> None:
    """Every token gets the standardised rewards of the steps that end at or after it, over all steps of its group."""
    _, method, work = prepared(method={"name": "grpo_process", "kl_coef": 0.0}, rewards="task_steps", batch_rows=6)
    assert method._round is not None
    want: list[float] = []
    several = 0
    for group in method._round.groups:
        known = [value for s in group for _, value in s.steps if value is not None]
        mean = sum(known) / len(known)
        spread = math.sqrt(sum((v - mean) ** 2 for v in known) / (len(known) - 1))
        for s in group:
            several += len(s.steps) > 1
            assert s.steps[-1][0] == len(s.tokens)
            credit = [sum((v - mean) / (spread + 1e-4) for end, v in s.steps if end > t) if spread else 0.0 for t in range(len(s.tokens))]
            want += credit if any(credit) else []
    assert several > 3
    live = work.columns["advantage"]
    assert len(live) == len(want)
    torch.testing.assert_close(live, torch.tensor(want), rtol=1e-4, atol=1e-4)


def test_steps_need_a_reward_that_scores_them_and_a_sum(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no reward here scores steps"):
        stage(method="grpo_process", rewards="task")
    gated = {"use": ["task_steps", "task"], "combine": {"name": "gated", "gate": "task"}}
    with pytest.raises(ConfigError, match="rewards of steps are summed"):
        stage(method="grpo_process", rewards=gated)


# ---- entropy --------------------------------------------------------------------------------------------------------


def test_entropies_are_those_of_the_policy_and_choose_the_forks(plain: Any) -> None:
    asked = {"name": "dr_grpo", "token_filters": ["top_entropy"], "entropy_share": 0.2, "sequence_filters": []}
    _, method, work = prepared(method=asked, batch_rows=6)
    assert method._round is not None
    every: list[Tensor] = []
    for q, group in zip(method._round.questions, method._round.groups):
        for s in group:
            found = entropy_of(plain_logits(plain, method.questions[q].ids, s.tokens)).detach()
            torch.testing.assert_close(torch.tensor(s.entropies), found, rtol=1e-3, atol=1e-4)
            every.append(found)
    whole = torch.cat(every)
    assert work.facts["entropy"] == pytest.approx(float(whole.mean()), rel=1e-3)
    edge = float(whole.quantile(0.8))
    kept = work.columns["policy_weight"] > 0
    assert bool((work.columns["entropy"][kept] > edge - 1e-3).all())
    assert bool((work.columns["entropy"][~kept] < edge + 1e-3).all()) and 0 < int(kept.sum()) < len(kept)


def test_the_gradient_of_the_bonus_is_that_of_autograd_on_separate_rows() -> None:
    policy, method, work = prepared(
        method={"name": "dapo", "sequence_filters": [], "entropy_coef": 0.3}, rewards=EQUAL, batch_rows=4
    )
    assert method._round is not None
    policy.zero_grad()
    for micro in work.batch.split(150):
        objective, couple = method.objective(work, micro)
        out = policy(micro, objective, couple=couple)
        out.loss.backward()
        method.observe(work, micro, out.logprobs)
    model = load_policy("spark", dtype="float32", probe=False)
    model.model.requires_grad_(True)
    found = [
        entropy_of(plain_logits(model, method.questions[q].ids, s.tokens))
        for q, group in zip(method._round.questions, method._round.groups) for s in group
    ]  # fmt: skip
    mean = torch.cat(found).mean()  # every label weighs 1 / labels
    (-0.3 * mean).backward()
    mean = mean.detach()
    assert work.facts["entropy"] == pytest.approx(float(mean), rel=1e-4) and work.facts["entropy_coef"] == 0.3
    got = {name: p.grad for name, p in policy.trainable().items()}
    for name, p in model.model.named_parameters():
        if p.grad is not None and float(p.grad.norm()) > 0:
            assert float((got[name] - p.grad).norm() / p.grad.norm()) < 2e-3, name


def test_a_bonus_raises_the_entropy(tmp_path: Path) -> None:
    flat = {"rewards": EQUAL, "batch_rows": 4, "steps": 4, "learning_rate": 3e-4}
    _, rows = train(tmp_path / "00-bonus", method={"name": "dr_grpo", "entropy_coef": 1.0}, **flat)
    assert rows[-1]["entropy"] > rows[0]["entropy"] + 0.05
    _, rows = train(tmp_path / "01-none", method="dr_grpo", **flat)
    assert all(row["loss"] is None and "entropy" not in row for row in rows)  # nothing is learned, and surprisal is logged
    assert all(row["surprisal"] > 0 for row in rows)


def test_the_bonus_follows_the_spread_of_rewards_or_a_target(tmp_path: Path) -> None:
    _, method, work = prepared(method={"name": "grpo", "kl_coef": 0.0, "entropy_coef": 0.1, "entropy_steepness": 3.0}, batch_rows=6)
    assert method._round is not None
    reward = torch.tensor([s.total for group in method._round.groups for s in group])
    assert float(reward.var(unbiased=False)) > 0
    assert work.facts["entropy_coef"] == pytest.approx(0.1 * math.exp(-3 * float(reward.var(unbiased=False))))
    aim = {"name": "grpo", "kl_coef": 0.0, "entropy_step": 0.01, "entropy_largest": 0.05}
    _, rows = train(tmp_path / "00-high", method=aim | {"entropy_target": 50.0}, steps=3)  # always below it
    assert [row["entropy_coef"] for row in rows] == pytest.approx([0.01, 0.02, 0.03])
    _, rows = train(tmp_path / "01-low", method=aim | {"entropy_target": 1e-3}, steps=3)  # always above it
    assert [row["entropy_coef"] for row in rows] == [0.0] * 3 and all(row["entropy"] > 1e-3 for row in rows)


# ---- coefficients of KL ---------------------------------------------------------------------------------------------


def test_kl_is_logged_and_its_coefficient_follows_the_target(tmp_path: Path) -> None:
    """Ziegler's controller: by a tenth of the relative error, cut at a fifth; the first step's KL is exactly 0."""
    for place in ("loss", "reward"):
        kl = {"kl": "k3" if place == "loss" else "k1", "kl_placement": place}
        method = {"name": "grpo", "kl_coef": 0.1, "kl_target": 1e-3, "kl_gain": 0.5} | kl
        _, rows = train(tmp_path / place, method=method, learning_rate=1e-3, steps=4)
        assert rows[0]["kl"] < 1e-6 and rows[-1]["kl"] > 1e-3
        coef = 0.1
        for row in rows:
            assert row["kl_coef"] == pytest.approx(coef)
            coef *= 1 + 0.5 * min(0.2, max(-0.2, row["kl"] / 1e-3 - 1))
        assert rows[1]["kl_coef"] < 0.1
        assert rows[-1]["kl_coef"] != rows[1]["kl_coef"]
    given: dict[str, Any] = {"method": {"name": "grpo", "kl_coef": 0.1, "kl_target": 1e-3}, "rollouts": {"passes": 2}, "steps": 4}
    _, rows = train(tmp_path / "passes", **given)
    assert rows[1]["kl_coef"] == rows[2]["kl_coef"] < rows[0]["kl_coef"]  # a round seen again moves nothing


def test_the_penalty_doubles_and_halves(tmp_path: Path) -> None:
    base = {"name": "grpo", "kl_coef": 0.0, "surrogate": "kl_penalty", "clip_low": None, "clip_high": None}
    given: dict[str, Any] = {"rollouts": {"passes": 2}, "learning_rate": 3e-4, "steps": 6}
    _, rows = train(tmp_path / "00-far", method=base | {"penalty_target": 1e-7}, **given)
    assert [row["penalty_coef"] for row in rows] == [1, 1, 2, 2, 4, 4]  # it moved far more than that
    assert all(row["policy_moved"] > 1e-6 for row in rows[2::2])
    once, _ = train(tmp_path / "02-once", method=base | {"penalty_target": 1e-7}, stop_after=2, **given)
    twin = load_policy("spark", dtype="float32", probe=False)
    twin.model.load_state_dict(once.model.state_dict())
    first = Round.read(StageFolder(tmp_path / "00-far").trajectories(0))
    questions = stage()[1].method.questions
    gaps: list[Tensor] = []  # of the round's tokens, under the policy that it left
    for q, group in zip(first.questions, first.groups):
        for s in group:
            now = plain_logits(twin, questions[q].ids, s.tokens).log_softmax(-1)[torch.arange(len(s.tokens)), torch.tensor(s.tokens)]
            gaps.append(now.detach() - torch.tensor(s.logprobs))
    gap = torch.cat(gaps)
    assert rows[2]["policy_moved"] == pytest.approx(float((gap.expm1() - gap).mean()), rel=0.05)
    _, rows = train(tmp_path / "01-near", method=base | {"penalty_target": 10.0}, **given)
    assert [row["penalty_coef"] for row in rows] == [1, 1, 0.5, 0.5, 0.25, 0.25]


# ---- what DAPO does to rollouts -------------------------------------------------------------------------------------


def test_dead_groups_are_replaced_by_others(tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": "dapo", "steps": 2, "batch_rows": 8}
    home = tmp_path / "00-refilled"
    _, rows = train(home, rollouts={"refill": 3}, **given)
    _, bare = train(tmp_path / "01-bare", **given)
    assert rows[0]["dead_groups"] == bare[0]["dead_groups"] > 0  # of what was drawn first
    assert rows[0]["reward_mean"] == bare[0]["reward_mean"]
    assert rows[0]["refilled_groups"] > 0 and rows[0]["live_samples"] > bare[0]["live_samples"]
    drawn, plainly = (Round.read(StageFolder(f).trajectories(0)) for f in (home, tmp_path / "01-bare"))
    assert len(set(drawn.questions)) == 8 and drawn.questions != plainly.questions
    for a, b, g, h in zip(drawn.questions, plainly.questions, drawn.groups, plainly.groups):
        assert dead(h) if a != b else g == h  # only dead groups gave way
    spent = [read_json(StageFolder(f).ledger)["counted"] for f in (home, tmp_path / "01-bare")]
    sampled = [sum(v for phase in s.values() for k, v in phase.items() if k == "sampled_tokens") for s in spent]
    assert sampled[0] > sampled[1]


def test_refills_are_the_same_whenever_they_are_drawn() -> None:
    first, again = (prepared(method="dapo", rollouts={"refill": 2}, batch_rows=6)[1]._round for _ in range(2))
    assert first is not None and again is not None and first == again


def test_a_cushion_costs_reward_and_shortens(tmp_path: Path) -> None:
    """0 up to max_new_tokens - cushion, then a straight line to -1."""
    _, method, work = prepared(method="dapo", rollouts={"overlong_cushion": 20}, batch_rows=6, rewards=EQUAL)
    assert method._round is not None
    samples = [s for group in method._round.groups for s in group]
    for s in samples:
        assert s.penalty == pytest.approx(min(0.0, max(-1.0, (24 - 20 - len(s.tokens)) / 20)))
    assert any(s.penalty < 0 for s in samples)
    assert work.facts["overlong_penalty"] == pytest.approx(sum(s.penalty for s in samples) / len(samples))
    assert work.made is not None and not method._round.dead and all(map(undecided, method._round.groups))  # length alone teaches
    rows = train(tmp_path / "00", method="dapo", rollouts={"overlong_cushion": 20}, rewards=EQUAL, steps=6, learning_rate=5e-4)[1]
    assert rows[-1]["overlong_penalty"] > rows[0]["overlong_penalty"]


def test_the_last_step_pays_for_the_length() -> None:
    sample = Sample((1, 2, 3), (0.0,) * 3, "stop", "a\nb", {}, 0.0, penalty=-0.25, steps=((1, 1.0), (3, 0.5)))
    assert sample.paid == ((1, 1.0), (3, 0.25)) and Sample.from_json(sample.to_json()) == sample
    unknown = Sample((1,), (0.0,), "stop", "a", {}, None, penalty=-0.25, steps=((1, None),))
    assert unknown.paid == ((1, None),) and unknown.worth is None
    assert dead([unknown, unknown]) and not dead([sample, sample])  # steps of one completion differ


def test_truncated_completions_have_no_gradient_where_filtered() -> None:
    given: dict[str, Any] = {"rollouts": {"max_new_tokens": 9}, "batch_rows": 6, "rewards": {"name": "length_cap", "cap": 20}}
    seen = []
    for filters in ([], ["truncated"]):
        method = {"name": "dr_grpo", "entropy_coef": 0.1, "sequence_filters": filters}
        _, found, work = prepared(method=method, **given)
        assert found._round is not None
        cut = [s.finish == "length" for group in found._round.groups for s in group]
        seen.append((work.facts["live_samples"], sum(cut) / len(cut)))
    (every, share), (kept, _) = seen
    assert every == 1 and 0 < share < 1 and kept == pytest.approx(1 - share)


# ---- a sampler that is not the trainer ------------------------------------------------------------------------------


class Skewed(LocalEngine):
    """A sampler whose log-probs are off by a known amount, another for each completion."""

    def sample(self, *args: Any) -> Any:
        found = super().sample(*args)
        return [replace(t, logprobs=tuple(p + self.gap(i) for p in t.logprobs or ())) for i, t in enumerate(found)]

    @staticmethod
    def gap(i: int) -> float:
        return (-1.2, 0.0, 0.3, 1.0)[i % 4]


def skewed(**given: Any) -> tuple[PolicyGradient, Work]:
    policy, built, _ = stage(**given)
    method: PolicyGradient = built.method
    method.start(policy, None, lambda: None)  # type: ignore[arg-type]
    method.rounds.engine = Skewed(policy, end_ids=method.rounds.end_ids)
    work = next(iter(method.batches(0)))
    method.prepare(policy, work)
    return method, work


@pytest.mark.parametrize(
    ("correction", "wanted"),
    [
        ("truncated", lambda w: min(w, 2.0)),
        ("masked", lambda w: w if 0.5 <= w <= 5 else 0.0),
        ("none", lambda w: 1.0),
    ],
)
def test_corrections_weigh_by_trainer_over_sampler(correction: str, wanted: Any) -> None:
    method, work = skewed(method={"name": "dr_grpo", "correction": correction}, batch_rows=6)
    assert method._round is not None
    flat = [s for group in method._round.groups for s in group]
    true = [Skewed.gap(i) for i in range(len(flat))]
    want: list[float] = []
    for i, s in enumerate(flat):
        value = sum(flat[i - i % 4 + k].total or 0 for k in range(4)) / 4
        if s.total != value:
            want += [wanted(math.exp(-true[i]))] * len(s.tokens)
    got = work.columns["policy_weight"]
    kept = torch.tensor([w for w in want if w]) if correction == "masked" else torch.tensor(want)
    torch.testing.assert_close(got[got != 0].float(), kept, rtol=1e-3, atol=1e-3)
    assert all(bool(s.old_logprobs) == (correction != "none") for s in flat)


def test_a_sequence_mask_drops_whole_completions() -> None:
    method, work = skewed(method={"name": "dr_grpo", "correction": "sequence_masked", "correction_high": 1.5}, batch_rows=6)
    weight, unit = work.columns["policy_weight"], work.columns["unit"]
    for u in unit.unique():
        assert len(set((weight[unit == u] == 0).tolist())) == 1
    assert method._round is not None


def test_off_policy_completions_of_negative_advantage_are_dropped() -> None:
    """log p_sampler - log p above the limit: those skewed by +1, where their advantage is negative."""
    losses = []
    for limit in (0.5, 5.0):
        given = {"name": "dr_grpo", "token_filters": ["off_policy"], "off_policy_limit": limit}
        method, work = skewed(method=given, batch_rows=8, rollouts={"group_size": 4})
        policy = load_policy("spark", dtype="float32")
        policy.requires_grad_(True)
        advantage, unit, seen = work.columns["advantage"], work.columns["unit"], work.columns["sampler_logprobs"]
        loss = torch.zeros(())
        for micro in work.batch.split(10**6):
            objective, couple = method.objective(work, micro)
            out = policy(micro, objective, couple=couple)
            loss = loss + out.loss.detach()
            gap = seen - out.logprobs
        want = torch.zeros(())
        dropped = 0
        for u in unit.unique():
            here = unit == u
            out_of_reach = float(gap[here].mean()) > limit and float(advantage[here][0]) < 0
            dropped += out_of_reach
            if not out_of_reach:
                want = want - (work.columns["weight"][here] * advantage[here]).sum()
        torch.testing.assert_close(loss.float(), want.float(), rtol=1e-4, atol=1e-5)
        losses.append((float(loss), dropped))
    assert losses[0][1] > 0 and losses[1][1] == 0 and losses[0][0] != losses[1][0]


def test_whose_log_probs_are_the_old_ones(tmp_path: Path) -> None:
    several: dict[str, Any] = {"rollouts": {"updates": 2}, "method": {"name": "grpo", "kl_coef": 0.0}, "steps": 2}
    scored = {}
    for choice in ("sampler", "auto", "trainer"):
        home = tmp_path / choice
        train(home, **several | {"rollouts": {"updates": 2, "old_logprobs": choice}})
        drawn = Round.read(StageFolder(home).trajectories(0))
        counted = read_json(StageFolder(home).ledger)["counted"]
        scored[choice] = sum(v for phase in counted.values() for k, v in phase.items() if k == "scored_tokens")
        for s in (s for group in drawn.groups for s in group):
            assert bool(s.old_logprobs) == (choice == "trainer")
            assert not s.old_logprobs or max(abs(a - b) for a, b in zip(s.old_logprobs, s.logprobs)) < 1e-4
    assert scored["auto"] == scored["sampler"] == 0 < scored["trainer"]  # fp32: the sampler's are as good
    policy, built, _ = stage(**several)
    policy.model.to(torch.bfloat16)
    built.method.start(policy, None, lambda: None)
    assert built.method.rounds.rescored
    policy, built, _ = stage(method={"name": "grpo", "correction": "masked"})
    built.method.start(policy, None, lambda: None)
    assert built.method.rounds.rescored
    with pytest.raises(ConfigError, match="these would be the same"):
        stage(method={"name": "grpo", "correction": "masked"}, rollouts={"old_logprobs": "sampler"})


# ---- rounds without a live group, and resumes -----------------------------------------------------------------------


def test_a_guard_stops_after_dead_rounds(tmp_path: Path) -> None:
    _, built, _ = stage(rewards=EQUAL, rollouts={"stop_after_dead_rounds": 2})
    (guard,) = built.guards
    assert guard(None, {"dead_rounds": 1}) is None and guard(None, {}) is None
    assert "in 2 rounds in a row" in guard(None, {"dead_rounds": 2})
    _, rows = train(tmp_path / "00", rewards=EQUAL, method="dapo", steps=3)
    assert [row["dead_rounds"] for row in rows] == [1, 2, 3] and all_dead(3, None, rows[-1])
    assert stage()[1].guards == []


@pytest.mark.parametrize(
    "given",
    [
        {"method": "grpo_process", "rewards": "task_steps"},
        {"method": {"name": "dapo", "token_filters": ["top_entropy"], "entropy_share": 0.3, "entropy_target": 5.0}},
        {"method": {"name": "grpo", "kl_target": 1e-3, "kl_gain": 0.5, "entropy_coef": 0.01, "entropy_steepness": 1.0}, "learning_rate": 1e-3},
        {"method": {"name": "dapo", "correction": "truncated"}, "rollouts": {"refill": 2, "overlong_cushion": 10}},
        {"method": {"name": "grpo", "kl_coef": 0.0, "surrogate": "kl_penalty", "penalty_target": 1e-6, "clip_low": None, "clip_high": None}},
    ],
)
def test_stop_inside_a_round_and_resume_is_the_uninterrupted_run(tmp_path: Path, given: dict[str, Any]) -> None:
    given = {"steps": 7, "batch_rows": 4} | given | {"rollouts": {"updates": 2, "passes": 2, **given.get("rollouts", {})}}
    whole, rows = train(tmp_path / "00-whole", **given)
    assert any(row["grad_norm"] for row in rows)
    train(tmp_path / "01-parts", stop_after=3, **given)
    train(tmp_path / "01-parts", stop_after=6, **given)
    parts, again = train(tmp_path / "01-parts", **given)
    assert rows == again
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))
    ledgers = [read_json(StageFolder(tmp_path / name).ledger)["counted"] for name in ("00-whole", "01-parts")]
    assert ledgers[0] == ledgers[1]
