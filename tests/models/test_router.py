"""The router's term of a mixture of experts: the model's own on separate rows, packed, split, adapted and refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from burnish.core.errors import ConfigError, MachineError
from burnish.forest.pack import Batch, Micro
from burnish.forest.stream import Layout, Tree, Unit
from burnish.maths.logprobs import weighted_nll
from burnish.models.adapters import lora, merge
from burnish.models.policy import Output, Policy
from tests.forest.tiny import tiny

WORDS = SimpleNamespace(eos_token_id=2)
ROUTED = ["mixtral", "qwen3_moe", "gpt_oss"]
ON = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
TREES = [
    Tree(
        ((5, 9, 3, 40, 8, 11, 96, 7, 20), (31, 4, 17, 60), (12, 80, 33, 9, 71, 26), (44, 3)),
        (-1, 0, 0, 0),
        tuple(Unit(leaf, tuple(range(9, end))) for leaf, end in ((1, 13), (2, 15), (3, 11))),
    ),
    Tree.row((6, 6, 50, 12, 44), (False, False, True, True, True)),
    Tree(((70, 3, 8), (30, 22), (19,), (4, 88, 5)), (-1, 0, 1, 1), (Unit(2, (4, 5)), Unit(3, (5, 6, 7)))),
]


def of(policy: Policy, micro: Micro) -> Output:
    """The loss with equal weights: the router's share and nothing else where the weights are zero."""
    return policy(micro, weighted_nll(torch.ones(len(micro.items))))


def paths(tree: Tree) -> list[tuple[int, ...]]:
    layout = Layout(tuple(map(len, tree.tokens)), tree.parent)
    flat = torch.tensor([t for segment in tree.tokens for t in segment])
    return [tuple(flat[layout.rows(leaf)].tolist()) for leaf in layout.leaves]


def padded_aux(model: torch.nn.Module, trees: list[Tree]) -> torch.Tensor:
    """The model's own auxiliary loss over all sequences as one padded batch."""
    rows = [row for tree in trees for row in paths(tree)]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}


def assert_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys() and len(want) > 5
    for name, gradient in want.items():
        assert float((got[name] - gradient).norm() / gradient.norm()) < 1e-4, name


@pytest.mark.parametrize("name", ROUTED)
def test_value_and_gradient_equal_the_models_own_on_padded_rows(name: str) -> None:
    plain = tiny(name, **ON)
    policy = Policy(copy.deepcopy(plain), WORDS)
    assert policy.why_not_shared is None and policy.router is not None
    assert policy.decisions["router_loss"]["value"] == 0.7
    (micro,) = Batch(TREES).split(1000)
    assert micro.share == 1.0
    out = policy(micro, weighted_nll(torch.zeros(len(micro.items))))
    want = 0.7 * padded_aux(plain, TREES)
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=0)
    assert out.router_loss is not None and float(out.router_loss) == float(out.loss.detach())
    out.loss.backward()
    want.backward()
    assert_gradients(gradients(policy.model), gradients(plain))
    # a forest without its multiplicities pays another price
    once = Batch([Tree.row(segment, (True,) * len(segment)) for tree in TREES for segment in tree.tokens])
    wrong = padded_aux(plain, list(once.trees))
    assert abs(float(wrong.detach()) * 0.7 - float(out.loss.detach())) > 1e-3


def test_the_term_is_added_to_the_objective_and_said() -> None:
    plain, on = Policy(tiny("mixtral"), WORDS), Policy(tiny("mixtral", **ON), WORDS)
    (micro,) = Batch(TREES).split(1000)
    without, whole = of(plain, micro), of(on, micro)
    assert plain.router is None and without.router_loss is None and "router_loss" not in plain.decisions
    assert whole.router_loss is not None and float(whole.router_loss) > 0.5
    torch.testing.assert_close(whole.loss, without.loss + whole.router_loss)
    assert torch.equal(whole.logprobs, without.logprobs)


@pytest.mark.parametrize("asked", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}])
def test_only_where_the_configuration_asks_for_it(asked: dict[str, object]) -> None:
    assert Policy(tiny("qwen3_moe", **{**ON, **asked}), WORDS).router is None


def test_shares_add_up_and_weigh_each_micro_batchs_own_value() -> None:
    policy = Policy(tiny("mixtral", **ON), WORDS)
    micros = Batch(TREES).split(10)
    assert len(micros) == 3
    # sequences of 13 + 15 + 11, of 5, and of 6 + 8 tokens
    assert [m.share for m in micros] == pytest.approx([39 / 58, 5 / 58, 14 / 58])
    for micro, tree in zip(micros, TREES):
        (alone,) = Batch([tree]).split(1000)
        ours, whole = (policy(m, weighted_nll(torch.zeros(len(m.items)))) for m in (micro, alone))
        torch.testing.assert_close(ours.loss, micro.share * whole.loss)


def test_micro_batches_that_route_alike_give_one_value_and_gradient_under_every_split() -> None:
    policy = Policy(tiny("mixtral", **ON), WORDS)
    batch = Batch([TREES[0]] * 6)
    found = []
    for budget, count in ((1000, 1), (63, 2), (42, 3), (21, 6)):
        micros = batch.split(budget)
        assert len(micros) == count
        policy.zero_grad()
        total = 0.0
        for micro in micros:
            out = policy(micro, weighted_nll(torch.zeros(len(micro.items))))
            out.loss.backward()
            total += float(out.loss.detach())
        found.append((total, gradients(policy.model)))
    for total, gradient in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-5)
        assert_gradients(gradient, found[0][1])


def test_padded_rows_pay_the_same() -> None:
    plain = tiny("qwen3_next", **ON)
    policy = Policy(copy.deepcopy(plain), WORDS)
    assert policy.why_not_shared is not None and policy.router is not None
    (micro,) = Batch(TREES).split(1000)
    out = policy(micro, weighted_nll(torch.zeros(len(micro.items))))
    want = 0.7 * padded_aux(plain, TREES)
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=0)
    out.loss.backward()
    want.backward()
    assert_gradients(gradients(policy.model), gradients(plain))


def test_adapters_keep_the_term_and_merging_does_too() -> None:
    policy = Policy(tiny("qwen3_moe", **ON), WORDS)
    policy.requires_grad_(False)
    (micro,) = Batch(TREES).split(1000)
    before = of(policy, micro).router_loss
    assert before is not None
    adapted = lora(policy, rank=2, targets=("q_proj", "v_proj"))
    out = policy_loss = adapted(micro, weighted_nll(torch.zeros(len(micro.items))))
    assert policy_loss.router_loss is not None
    torch.testing.assert_close(out.router_loss, before)
    out.loss.backward()
    assert gradients(adapted.model)
    for n, p in adapted.model.named_parameters():
        if "lora_B" in n:
            p.data.fill_(0.01)
    assert merge(adapted).router == policy.router


def test_a_model_that_computes_none_or_another_is_refused() -> None:
    with pytest.raises(MachineError, match="which the model does not compute"):
        Policy(tiny("llama4", **ON), WORDS)
    model = tiny("mixtral", **ON)
    model.num_experts_per_tok = 1  # its own loss now counts one expert a token, its routers use two
    with pytest.raises(MachineError, match="where load balancing gives"):
        Policy(model, WORDS)


def test_under_checkpointing_the_router_learns_or_it_is_said() -> None:
    (micro,) = Batch(TREES).split(1000)
    zeros = weighted_nll(torch.zeros(len(micro.items)))
    want = Policy(tiny("mixtral", **ON), WORDS)
    want(micro, zeros).loss.backward()
    for reentrant in (False, True):
        policy = Policy(tiny("mixtral", **ON), WORDS)
        policy.model.train()  # layers only checkpoint in training mode
        policy.base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        policy.base.enable_input_require_grads()
        if reentrant:
            with pytest.raises(ConfigError, match="reaches nothing that is trained"):
                policy(micro, zeros)
        else:
            policy(micro, zeros).loss.backward()
            assert_gradients(gradients(policy.model), gradients(want.model))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])  # packed, padded
def test_layers_run_again_give_the_router_the_same_gradient(name: str) -> None:
    (micro,) = Batch(TREES).split(1000)
    found = []
    for what in ("off", "layers"):
        policy = Policy(tiny(name, **ON), WORDS)
        policy.checkpoint(what)
        policy(micro, weighted_nll(torch.zeros(len(micro.items)))).loss.backward()
        found.append(gradients(policy.model))
    assert_gradients(*found)
