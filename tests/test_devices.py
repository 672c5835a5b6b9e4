"""Nothing in a training step, a score or a rollout mixes devices, and a step reads the device as rarely as it can."""

from __future__ import annotations

import pytest
import torch

from burnish.core.records import Sampling
from burnish.engines.local.engine import LocalEngine
from burnish.forest.pack import Batch
from burnish.forest.stream import Tree, Unit
from burnish.maths.logprobs import weighted_nll
from burnish.models.policy import Policy
from burnish.train.optim import Optimiser
from tests.engines.policies import Letters, policy, prompts
from tests.forest.tiny import tiny
from tests.pretended import MixedDevicesError, Pretending, there


def moved(name: str, **more) -> Policy:
    """A tiny policy on the pretended device, not probed there."""
    here = policy(name, **more)
    away = Policy(there(tiny(name, **more)), Letters(), probe=False)
    away.logit_map, away.why_not_shared = here.logit_map, here.why_not_shared
    away.base.set_attn_implementation("burnish_forest" if here.why_not_shared is None else "eager")
    return away


def test_the_pretended_device_has_a_gpus_rules():
    with Pretending() as mode:
        x = torch.arange(6.0, device="pretended").view(2, 3)
        assert x.device.type == "pretended" and (x * 2 + 1).sum().item() == 36 and mode.reads.total() == 1
        assert x[torch.tensor([1])].tolist() == [[3.0, 4.0, 5.0]]  # a host index is fine
        with pytest.raises(MixedDevicesError):
            x + torch.ones(2, 3)
        with pytest.raises(MixedDevicesError):
            torch.ones(4)[x.long()[0]]
        with pytest.raises(MixedDevicesError):
            x.index_select(0, torch.tensor([1]))
        x[0].copy_(torch.zeros(3))
        assert x.cpu().sum() == 12.0


def batch() -> Batch:
    trees = [
        Tree((tuple(range(5, 14)), (20, 21, 22), (23, 24)), (-1, 0, 0), (Unit(1, (9, 10, 11)), Unit(2, (9, 10)))),
        Tree.row(tuple(range(30, 42)), [False] * 4 + [True] * 8),
    ]
    return Batch(trees, group=[0, 0, 1])


def loss_and_step(p: Policy, coupled: bool, device: str) -> list[torch.Tensor]:
    """Two micro-batches and an optimiser step: the loss, the log-probs and the weights after it."""
    optimiser = Optimiser(p, learning_rate=1e-3)
    p.train()
    optimiser.zero()
    whole, out = batch(), []
    for micro in whole.split(14):
        weight = torch.ones(whole.entries, device=device)[micro.items.to(device)]
        couple = whole.group[whole.unit][micro.items] if coupled else None
        made = p(micro, weighted_nll(weight), couple=None if couple is None else couple.to(device), rows=4)
        made.loss.backward()
        out += [made.loss.detach(), made.logprobs]
        made.executed_flops(True)
    norm = optimiser.gradient_norm()
    optimiser.step(1e-3, norm)
    optimiser.close()
    return [*out, norm, *(x.detach().float() for x in p.trainable().values())]


@pytest.mark.parametrize("coupled", [False, True], ids=["tokens", "groups"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gemma2", "gpt_oss"])
def test_a_training_step_stays_on_its_device(name: str, coupled: bool):
    want = loss_and_step(policy(name), coupled, "cpu")
    with Pretending():
        got = [x.cpu() for x in loss_and_step(moved(name), coupled, "pretended")]
    assert all(torch.allclose(x, y, atol=5e-5, rtol=1e-4) for x, y in zip(got, want))


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("qwen3", Sampling(temperature=0.0)),
        ("qwen3", Sampling()),
        ("gemma3", Sampling(top_k=5, top_p=0.9, stop=("z",))),
        ("gemma2", Sampling(top_p=0.9)),
    ],
)
def test_a_rollout_and_a_score_stay_on_their_device(name: str, sampling: Sampling):
    def run(p: Policy):
        engine = LocalEngine(p, rows=3)
        nodes = engine.prefill_many(prompts(4, longest=12))
        made = engine.sample([n for n in nodes for _ in range(2)], sampling, [(i, s) for i in range(4) for s in (0, 1)])
        below = [engine.prefill(t.tokens[len(n.path) :], n) for n, t in zip(nodes, made[::2])]
        return [t.tokens for t in made], engine.score(below)

    sampling = Sampling(**{**vars(sampling), "max_new_tokens": 9})
    tokens, scores = run(policy(name))
    with Pretending():
        there_tokens, there_scores = run(moved(name))
    assert there_tokens == tokens
    for x, y in zip(there_scores, scores):
        assert torch.allclose(torch.tensor(x), torch.tensor(y), atol=1e-4)
