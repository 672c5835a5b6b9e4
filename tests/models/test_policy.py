"""A policy's loss, gradient, log-probs and FLOPs against the plain transformers model it wraps."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.utils.flop_counter import FlopCounterMode

from burnish.core.ledger import forward_flops, train_flops
from burnish.forest.pack import Batch
from burnish.forest.stream import Tree
from burnish.maths.logprobs import weighted_nll
from burnish.models.adapters import lora, merge
from burnish.models.policy import Policy
from tests.forest.tiny import tiny

FAMILIES = ["llama", "qwen3", "gemma3", "gemma2"]
WORDS = SimpleNamespace(eos_token_id=2)
ROWS = [[5, 9, 3, 40, 8, 11, 96, 7, 20, 31, 4], [6, 6, 50, 12], [70, 3, 8, 30, 22, 19, 4, 88]]


def batch() -> Batch:
    return Batch([Tree.row(ids, [i >= 2 for i in range(len(ids))]) for ids in ROWS])


def reference(model: torch.nn.Module) -> torch.Tensor:
    """Mean negative log-likelihood of the same labels, one row at a time, through the model's own logits."""
    total, labels = torch.zeros(()), 0
    for ids in ROWS:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].float()
        chosen = logits.log_softmax(-1)[torch.arange(1, len(ids) - 1), torch.tensor(ids[2:])]
        total, labels = total - chosen.sum(), labels + len(chosen)
    return total / labels


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [1000, 12])
def test_loss_and_every_gradient_equal_the_plain_model(family: str, budget: int) -> None:
    plain = tiny(family)
    policy = Policy(copy.deepcopy(plain), WORDS)
    assert policy.why_not_shared is None
    want = reference(plain)
    want.backward()
    whole = batch()
    weight = torch.full((whole.entries,), 1 / whole.entries)
    loss = torch.zeros(())
    for micro in whole.split(budget):
        out = policy(micro, weighted_nll(weight[micro.items]))
        out.loss.backward()
        loss += out.loss.detach()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    theirs = dict(plain.named_parameters())
    for name, ours in policy.model.named_parameters():
        gap = (ours.grad - theirs[name].grad).norm() / theirs[name].grad.norm().clamp_min(1e-8)  # type: ignore[operator,union-attr]
        assert gap < 1e-5, (name, float(gap))


def test_a_model_that_cannot_share_runs_as_padded_rows_with_the_same_loss() -> None:
    plain = tiny("bloom")
    policy = Policy(copy.deepcopy(plain), WORDS)
    assert policy.why_not_shared
    assert "padded" in policy.decisions["attention"]["value"]
    whole = batch()
    (micro,) = whole.split(1000)
    out = policy(micro, weighted_nll(torch.full((whole.entries,), 1 / whole.entries)))
    torch.testing.assert_close(out.loss.detach(), reference(plain).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("field", "value"), [("final_logit_softcapping", 3.0)])
def test_the_head_map_is_found_by_asking_the_model(field: str, value: float) -> None:
    policy = Policy(tiny("gemma2", **{field: value}), WORDS)
    assert policy.logit_map.softcap == value


def test_adapters_start_as_the_identity_train_only_themselves_and_merge_exactly() -> None:
    plain = tiny("qwen3")
    policy = Policy(copy.deepcopy(plain), WORDS)
    policy.requires_grad_(False)
    adapted = lora(policy, rank=4, alpha=8.0)
    whole = batch()
    (micro,) = whole.split(1000)
    objective = weighted_nll(torch.full((whole.entries,), 1 / whole.entries))
    out = adapted(micro, objective)
    torch.testing.assert_close(out.loss.detach(), reference(plain).detach(), rtol=1e-5, atol=1e-6)
    out.loss.backward()
    assert all("lora_" in n for n in adapted.trainable())
    for n, p in adapted.model.named_parameters():
        if "lora_B" in n:
            p.data.add_(p.grad.sign() * -0.05)  # type: ignore[union-attr]
    assert float(adapted(micro, objective).loss.detach()) < float(out.loss.detach())
    before = adapted.logprobs(micro)
    merged = merge(adapted)
    assert not merged.adapted and not any("lora" in n for n, _ in merged.model.named_parameters())
    torch.testing.assert_close(merged.logprobs(micro), before, rtol=1e-4, atol=1e-5)


def test_merging_an_untrained_adapter_is_refused() -> None:
    policy = Policy(tiny("llama"), WORDS)
    with pytest.raises(Exception, match="every B of the adapter is zero"):
        merge(lora(policy, rank=2))


@pytest.mark.parametrize("adapter", [False, True])
def test_executed_flops_agree_with_a_counter_of_matrix_products(adapter: bool) -> None:
    """One row, so that attention is one causal block; the counter sees it on eager attention as a full square."""
    plain = tiny("llama", hidden_size=64, intermediate_size=160, vocab_size=200)
    ids = [(7 * i) % 190 + 3 for i in range(40)]
    whole = Batch([Tree.row(ids, [True] * len(ids))])
    (micro,) = whole.split(1000)
    policy = Policy(copy.deepcopy(plain), WORDS)
    if adapter:
        policy.requires_grad_(False)
        policy = lora(policy, rank=4)
        plain = copy.deepcopy(policy.model)
        for module in plain.modules():
            if isinstance(module, LoraLinear):
                module.__class__ = LoraLinear  # peft's own products: the counter does not know those in place
        plain.set_attn_implementation("eager")  # type: ignore[operator]
    with FlopCounterMode(display=False) as counter:
        out = plain(torch.tensor([ids]), use_cache=False)
        logits = out.logits[0, :-1].float()
        (-logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).mean()).backward()
    ours = policy(micro, weighted_nll(torch.full((whole.entries,), 1 / whole.entries)))
    ours.loss.backward()
    shape, n = policy.shape, len(ids)
    pair = 2 * shape.query_heads * (shape.key_width + shape.value_width) * shape.layers
    attention_square, attention_ours = 3 * pair * n * n, ours.executed_flops(True) - ours_without_attention(policy, n)
    head_of_last_row = (4 if adapter else 6) * shape.vocabulary * shape.hidden  # HF also scores the last position
    assert 0 < attention_ours < attention_square
    launched = ours_without_attention(policy, n) + attention_square + head_of_last_row
    if adapter:  # below the first adapter nothing is trained: its three products need no input gradient (we count it)
        q, k, v = (shape.hidden * shape.key_width * heads for heads in (shape.query_heads, shape.kv_heads, shape.kv_heads))
        launched -= 2 * n * (q + k + v + 3 * 4 * shape.hidden)
    assert counter.get_total_flops() == pytest.approx(launched, rel=0.01)


def ours_without_attention(policy: Policy, n: int) -> int:
    shape = policy.shape
    body = (4 if shape.trained == "adapter" else 6) * shape.body_parameters * n + 6 * shape.adapter_parameters * n
    return body + (6 if shape.head_trained else 4) * shape.vocabulary * shape.hidden * (n - 1)


def test_useful_flops_are_never_more_than_executed() -> None:
    policy = Policy(tiny("gemma3"), WORDS)
    whole = batch()
    (micro,) = whole.split(1000)
    out = policy(micro, weighted_nll(torch.full((whole.entries,), 1 / whole.entries)))
    forward_executed = out.executed_flops(False)
    out.loss.backward()
    layout = micro.stream.layout
    spans = list(zip(layout.first_position, layout.length))
    tokens, rows = len(micro.stream.tokens), len(micro.view.label)
    assert forward_flops(policy.shape, tokens, rows, spans) <= forward_executed
    assert train_flops(policy.shape, tokens, rows, spans) <= out.executed_flops(True)
