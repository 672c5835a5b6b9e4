"""Checkpointing changes neither loss nor gradient, keeps less, and is counted as the work it is."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from burnish.core.errors import MachineError
from burnish.forest.pack import Batch
from burnish.forest.stream import Tree, Unit
from burnish.maths.logprobs import weighted_nll
from burnish.models.adapters import lora
from burnish.models.policy import Policy
from burnish.models.recompute import layers_of, recomputed_parameters
from burnish.train.activations import Watch
from tests.forest.tiny import tiny

FAMILIES = ["llama", "qwen3", "gemma3", "gemma2", "gpt_oss", "mixtral", "bloom", "lfm2"]
WORDS = SimpleNamespace(eos_token_id=2)


def batch() -> Batch:
    rows = [[5, 9, 3, 40, 8, 11, 96, 7, 20, 31, 4], [6, 6, 50, 12], [70, 3, 8, 30, 22, 19, 4, 88]]
    pair = Tree(((5, 6, 7), (8, 9), (10, 11, 12)), (-1, 0, 0), (Unit(1, (3, 4)), Unit(2, (3, 4, 5))))
    return Batch([*(Tree.row(ids, [i >= 2 for i in range(len(ids))]) for ids in rows), pair])


def step(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients and executed FLOPs of one forward and backward in training mode, from one state of the dice."""
    whole = batch()
    (micro,) = whole.split(1000)
    policy.zero_grad()
    torch.manual_seed(7)
    policy.train()
    out = policy(micro, weighted_nll(torch.full((whole.entries,), 1 / whole.entries)))
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}
    return out.loss.detach(), gradients, out.executed_flops(True)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_equal_bit_for_bit(family: str, adapter: bool) -> None:
    policy = Policy(tiny(family), WORDS)
    if adapter:
        policy.requires_grad_(False)
        policy = lora(policy, rank=2, dropout=0.0 if family == "mixtral" else 0.3)  # peft adapts experts without
        for n, p in policy.model.named_parameters():
            if "lora_B" in n:
                p.data.normal_(generator=torch.Generator().manual_seed(1))
    loss, gradients, flops = step(policy)
    policy.checkpoint("layers")
    again, others, more = step(policy)
    assert torch.equal(loss, again) and gradients.keys() == others.keys()
    assert all(torch.equal(gradients[n], others[n]) for n in gradients)
    assert more > flops
    policy.checkpoint("off")
    assert step(policy)[2] == flops


def test_it_keeps_one_row_a_layer_and_the_model_is_left_as_it_was() -> None:
    policy = Policy(tiny("llama", num_hidden_layers=6), WORDS)
    layers = layers_of(policy.body)
    assert len(layers) == 6
    kept = {}
    ids = [(7 * i) % 90 + 3 for i in range(256)]
    whole = Batch([Tree.row(ids, [i == 255 for i in range(256)])])
    (micro,) = whole.split(1000)
    for what in ("off", "layers"):
        policy.checkpoint(what)
        with Watch() as watch:
            out = policy(micro, weighted_nll(torch.ones(1)))
            kept[what] = watch.live
            del out
    assert kept["layers"] < kept["off"] / 4
    assert kept["layers"] >= 6 * 256 * policy.shape.hidden * 4
    assert not any("forward" in layer.__dict__ for layer in layers)
    assert not any(m.training for m in policy.model.modules())


def test_no_layer_is_kept_for_a_forward_without_gradient() -> None:
    policy = Policy(tiny("llama"), WORDS)
    policy.checkpoint("layers")
    (micro,) = batch().split(1000)
    with torch.no_grad():
        policy(micro, weighted_nll(torch.ones(len(micro.items))))
    assert policy.logprobs(micro).shape == micro.items.shape


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_executed_flops_count_what_is_run_again_as_torch_counts_it(family: str, adapter: bool) -> None:
    """One row: the difference in products that the counter sees is ours, less attention, which the plan counts."""
    n = 60
    more = {"sliding_window": n} if family == "gemma3" else {}
    plain = tiny(family, hidden_size=64, attention="eager", **more)
    policy = Policy(copy.deepcopy(plain), WORDS)
    if adapter:
        policy.requires_grad_(False)
        policy = lora(policy, rank=4)
    ids = [(7 * i) % 90 + 3 for i in range(n)]
    (micro,) = Batch([Tree.row(ids, [True] * n)]).split(1000)

    def ours() -> int:
        out = policy(micro, weighted_nll(torch.full((n - 1,), 1 / n)))
        out.loss.backward()
        return out.executed_flops(True)

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            policy.hidden(micro.stream).sum().backward()
        return sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))

    kept, once = ours(), counted()
    policy.checkpoint("layers")
    again, twice = ours(), counted()
    shape = policy.shape
    pairs = (n * n if policy.why_not_shared else n * (n + 1) // 2) * shape.layers  # padded rows are whole squares
    attention = 2 * shape.query_heads * (shape.key_width + shape.value_width) * pairs
    assert again - kept - attention == pytest.approx(twice - once, rel=0.01)
    assert 0.6 * 2 * shape.body_parameters * n < twice - once <= 2 * (shape.body_parameters + shape.adapter_parameters) * n


def test_layers_that_do_not_engage_are_refused() -> None:
    policy = Policy(tiny("llama"), WORDS)
    stream = batch().split(1000)[0].stream
    trained = list(policy.trainable().values())
    with pytest.raises(MachineError, match="does not engage") as caught:
        recomputed_parameters(lambda: policy.hidden(stream).detach().requires_grad_(), layers_of(policy.body), trained)
    assert caught.value.exit_code == 4
    with pytest.raises(MachineError, match="no layers"):
        layers_of(nn.Linear(2, 2))
