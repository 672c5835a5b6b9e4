"""TRPO: the Fisher products of a forest, the step measured by an independent model, the search, resume, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from burnish.config.faults import RecipeError
from burnish.core.errors import ConfigError
from burnish.maths.divergences import exact_kl
from burnish.maths.trust_region import conjugate_gradient, fisher_vector_product, line_search, natural_step
from burnish.methods.trpo import Products, TrustRegion, differentiable_twice, second_order_flops, thinned
from burnish.models.load import load_policy
from burnish.train.memory import Plan
from burnish.train.optim import Optimiser
from tests.laws import enumerated
from tests.methods.oracles import distance, first_work, gradient_of, logits_of, logprobs_of, plain_model
from tests.methods.test_policy_gradient import stage, train

ROLLOUTS = {"group_size": 4, "max_new_tokens": 20}


def trust_region(**more: Any) -> tuple[Any, TrustRegion, Any]:
    policy, built, _ = stage(method={"name": "trpo", **more}, rollouts=ROLLOUTS, learning_rate=1.0, batch_rows=4)
    method: TrustRegion = built.method
    return policy, method, first_work(method, policy)


def rows_of(method: TrustRegion) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """(prompt, completion, advantage) of every sample."""
    assert method._round is not None
    found = []
    for q, group in zip(method._round.questions, method._round.groups):
        reward = torch.tensor([s.total for s in group])
        advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
        found += [(method.questions[q].ids, s.tokens, float(a)) for s, a in zip(group, advantage)]
    return found


def test_its_gradient_is_that_of_the_surrogate_on_separate_rows() -> None:
    policy, method, work = trust_region()
    got = gradient_of(method, policy, work)
    plain, rows, loss = plain_model(), rows_of(method), torch.zeros(())
    count = sum(len(tokens) for _, tokens, _ in rows)
    assert work.batch.entries == count  # completions without an advantage are states the KL is over
    for prompt, tokens, advantage in rows:
        loss = loss - advantage * logprobs_of(plain, prompt, tokens).sum() / count
    loss.backward()
    assert distance(got, plain) < 1e-5


@pytest.mark.parametrize("adapted", [False, True])
def test_a_product_is_that_of_the_fisher_matrix_on_separate_rows(adapted: bool) -> None:
    policy, method, work = trust_region()
    named = policy.trainable()
    if adapted:  # only some matrices are trained
        named = {n: p for n, p in named.items() if "q_proj" in n or "down_proj" in n}
    vector = torch.randn(sum(p.numel() for p in named.values()), generator=torch.Generator().manual_seed(0))
    products = [Products(policy, list(named.values()), work.batch, Plan(tokens)) for tokens in (64, 10_000)]
    assert len(products[0].micros) > 2 and len(products[1].micros) == 1
    with differentiable_twice(policy):
        several, whole = (p(vector) for p in products)
        again = products[1](vector)  # from the graph that was kept
    plain: Any = load_policy("spark", dtype="float32", probe=False).model.requires_grad_(True)
    plain.set_attn_implementation("eager")
    mine = dict(plain.named_parameters())
    rows = rows_of(method)

    def kl() -> Tensor:
        total = torch.zeros(())
        for prompt, tokens, _ in rows:
            logprobs = logits_of(plain, prompt, tokens).log_softmax(-1)
            total = total + (logprobs.detach().exp() * (logprobs.detach() - logprobs)).sum()
        return total / work.batch.entries

    wanted = fisher_vector_product(kl, [mine[n] for n in named], damping=0.0)(vector)
    for found in (several, whole, again):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert float(vector @ wanted) > 0


def test_rows_that_are_padded_have_the_same_products() -> None:
    policy, _, work = trust_region()
    vector = torch.randn(sum(p.numel() for p in policy.trainable().values()), generator=torch.Generator().manual_seed(1))
    batch = thinned(work.batch, 0.5)
    assert len(batch.trees) == 2 and batch.trees == work.batch.trees[::2]
    with differentiable_twice(policy):
        forest = Products(policy, list(policy.trainable().values()), batch, Plan(200))(vector)
    policy.base.set_attn_implementation("sdpa")
    policy.why_not_shared = "to see the padded rows"
    with differentiable_twice(policy):
        padded = Products(policy, list(policy.trainable().values()), batch, Plan(200))(vector)
    assert float((forest - padded).norm() / padded.norm()) < 1e-5


def test_the_step_is_what_an_independent_model_measures() -> None:
    policy, method, work = trust_region(fisher_share=1.0, iterations=6)
    before = plain_model()
    optimiser = Optimiser(policy, learning_rate=1.0)
    optimiser.zero()
    for micro in work.batch.split(200):
        objective, couple = method.objective(work, micro)
        policy(micro, objective, couple=couple).loss.backward()
    assert method.update(policy, optimiser, work, Plan(200), 1.0)
    after = plain_model()
    after.load_state_dict(copy.deepcopy(policy.model.state_dict()))
    kl = gain = 0.0
    rows = rows_of(method)
    count = sum(len(tokens) for _, tokens, _ in rows)
    with torch.no_grad():
        for prompt, tokens, advantage in rows:
            old, new = (logits_of(m, prompt, tokens).log_softmax(-1) for m in (before, after))
            kl += float((old.exp() * (old - new)).sum()) / count
            ratio = (logprobs_of(after, prompt, tokens) - logprobs_of(before, prompt, tokens)).exp()
            gain += float(((ratio - 1) * advantage).sum()) / count
    assert 0 < kl <= method.region.max_kl and gain > 0
    assert work.facts["step_kl"] == pytest.approx(kl, rel=1e-3)
    assert work.facts["surrogate_gain"] == pytest.approx(gain, rel=1e-3)
    assert work.facts["step_fraction"] in [0.5**n for n in range(10)] and kl > 0.05 * method.region.max_kl


def test_where_no_part_of_the_step_is_good_nothing_moves() -> None:
    policy, method, work = trust_region(backtracks=1, iterations=1)
    optimiser = Optimiser(policy, learning_rate=1.0)
    optimiser.zero()
    for micro in work.batch.split(200):
        objective, couple = method.objective(work, micro)
        policy(micro, objective, couple=couple).loss.backward()
    before = optimiser.weights()
    assert method.update(policy, optimiser, work, Plan(200), 300.0)  # three hundred times too far
    assert torch.equal(optimiser.weights(), before)
    assert (work.facts["step_fraction"], work.facts["step_kl"], work.facts["surrogate_gain"]) == (0.0, 0.0, 0.0)


def test_on_a_policy_that_is_written_out_the_limit_holds_and_the_reward_rises() -> None:
    logits = enumerated.table(7).detach().requires_grad_()
    reward = torch.arange(len(enumerated.COMPLETIONS)).double().cos()
    old = logits.detach().clone()

    def visits(table: Tensor) -> Tensor:  # of each prefix, by the old policy
        p = enumerated.completion_logprobs(old).exp()
        return torch.zeros(len(table), dtype=torch.float64).index_add(0, enumerated.STATE, p[enumerated.UNIT])

    def kl(table: Tensor) -> Tensor:  # every prefix counted by how often it is met, over the mean length
        return (visits(old) * exact_kl(old.log_softmax(1), table.log_softmax(1))).sum() / visits(old).sum()

    def surrogate(table: Tensor) -> Tensor:
        return (enumerated.completion_logprobs(table) - enumerated.completion_logprobs(old)).exp().mul(
            enumerated.completion_logprobs(old).exp() * (reward - reward.mean())
        ).sum()

    gradient = torch.autograd.grad(surrogate(logits), logits)[0].flatten()
    product = fisher_vector_product(lambda: kl(logits), [logits], damping=0.01)
    step = natural_step(product, gradient, max_kl=0.02, iterations=30)
    assert float((product(conjugate_gradient(product, gradient, iterations=30)) - gradient).norm() / gradient.norm()) < 1e-4

    def measure(fraction: float) -> tuple[float, float]:
        with torch.no_grad():
            moved = old + fraction * step.view_as(old)
            return float(surrogate(moved) - surrogate(old)), float(kl(moved))

    found = line_search(measure, float(gradient @ step), max_kl=0.02)
    assert found.fraction > 0 and 0 < found.kl <= 0.02
    moved = old + found.fraction * step.view_as(old)
    value = [(enumerated.completion_logprobs(t).exp() * reward).sum() for t in (old, moved)]
    assert_close(torch.tensor(found.gain).double(), surrogate(moved) - surrogate(old))
    assert value[1] > value[0]


def test_flops_of_a_product_are_those_counted() -> None:
    policy, _, work = trust_region()
    (micro,) = thinned(work.batch, 0.25).split(10_000)
    parameters = list(policy.trainable().values())
    vector = torch.ones(sum(p.numel() for p in parameters))
    products = Products(policy, parameters, thinned(work.batch, 0.25), Plan(10_000))
    with differentiable_twice(policy), FlopCounterMode(display=False) as counter:
        products(vector)
    assert products.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    first, second = second_order_flops(policy.shape, micro, 0)
    assert second == 2 * first


def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    given = {"method": {"name": "trpo", "iterations": 3}, "rollouts": ROLLOUTS | {"updates": 2}, "learning_rate": 1.0}
    whole, rows = train(tmp_path / "00-whole", **given)
    train(tmp_path / "01-parts", stop_after=3, **given)
    parts, again = train(tmp_path / "01-parts", **given)
    assert rows == again and any(row.get("step_fraction") for row in rows)
    assert all(row["step_kl"] <= 0.01 for row in rows if "step_kl" in row)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))


@pytest.mark.parametrize(
    ("more", "said"),
    [({"max_kl": 0.0}, "max_kl"), ({"damping": -1.0}, "damping"), ({"shrink": 1.0}, "shrink"), ({"fisher_share": 0.0}, "fisher_share"),
     ({"iterations": 0}, "iterations"), ({"backtracks": 0}, "backtracks"), ({"advantage": "gae"}, "value")],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stage(method={"name": "trpo", **more}, learning_rate=1.0)


def test_keys_of_an_optimiser_that_is_not_used_are_refused() -> None:
    for name, value in (("weight_decay", 0.1), ("clip_norm", 0.5), ("adam_beta2", 0.9), ("learning_rate", 2.0)):
        with pytest.raises(RecipeError, match=name):
            stage(method="trpo", **{"learning_rate": 1.0, name: value})
    stage(method="grpo", weight_decay=0.1, clip_norm=0.5, adam_beta2=0.9, learning_rate=2.0)


def test_half_precision_is_refused(tmp_path: Path) -> None:
    _, method, _ = trust_region()
    half = load_policy("spark", dtype="bfloat16")
    with pytest.raises(ConfigError, match="dtype: float32"):
        method.start(half, None, lambda: None)  # type: ignore[arg-type]
