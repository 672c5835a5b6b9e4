"""Cutting rollouts by their values: what is not cut is what would have been drawn, what is cut is cut where it was lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from burnish.core.records import Sampling
from burnish.data.chat import ChatFormat
from burnish.data.tasks.base import STEP_END
from burnish.engines.local.engine import LocalEngine
from burnish.forest.pack import Batch
from burnish.forest.stream import Tree
from burnish.methods.pruning import Pruning
from burnish.models.critic import Critic
from burnish.models.load import load_policy
from burnish.models.policy import Policy

PROMPTS = ["12+5+30", "7+8", "41+3+9+27"]
KEYS = [(q, s) for q in range(3) for s in range(6)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("spark", dtype="float32")


def drawn(policy: Policy, sample: Any, limit: int = 40) -> tuple[LocalEngine, list[Any]]:
    from burnish.core.records import Message

    chat = ChatFormat(policy.tokenizer)
    engine = LocalEngine(policy, end_ids=chat.end_ids)
    nodes = engine.prefill_many([chat.prompt((Message("user", text),), where="x") for text in PROMPTS])
    found = sample(engine, [nodes[q] for q, _ in KEYS], Sampling(max_new_tokens=limit, seed=5), KEYS)
    for node in nodes:
        engine.free(node)
    return engine, found


def critic(policy: Policy, scale: float) -> Critic:
    made = Critic(policy, "shared", trains_body=False)
    with torch.no_grad():
        made.weight.normal_(std=scale, generator=torch.Generator().manual_seed(0))
        made.bias.fill_(0.5)
    return made


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_uncut_it_is_the_engines_own_draw(policy: Policy, chunk: int) -> None:
    _, want = drawn(policy, LocalEngine.sample)
    pruning = Pruning(1e-9, STEP_END, chunk)
    pruning.critic = critic(policy, 0.0)  # every state alike
    engine, found = drawn(policy, pruning)
    for a, b in zip(want, found):
        assert (a.id, a.tokens, a.finish, a.text, a.spans, a.parent, a.sampler) == (b.id, b.tokens, b.finish, b.text, b.spans, b.parent, b.sampler)
        assert b.logprobs == pytest.approx(a.logprobs, abs=1e-4)
    assert any(t.finish == "stop" for t in want) and any(len(t.completion) > chunk for t in want)
    assert not engine._nodes
    spend, facts = pruning.take()
    assert facts == {"pruned_share": 0.0} and spend.scored_tokens > 0 and pruning.take()[0].scored_tokens == 0


def test_what_is_cut_lost_its_value_at_a_step_end_and_nothing_before_it_did(policy: Policy) -> None:
    _, whole = drawn(policy, LocalEngine.sample)
    pruning = Pruning(0.6, STEP_END, 8)
    pruning.critic = made = critic(policy, 0.05)
    _, found = drawn(policy, pruning)
    end = policy.tokenizer.convert_tokens_to_ids(policy.tokenizer.tokenize(STEP_END))
    assert len(end) == 1  # so that step ends can be found by id here
    cut = 0
    for a, b in zip(whole, found):
        n = len(b.completion)
        assert a.tokens[: len(b.tokens)] == b.tokens and b.logprobs == pytest.approx(a.logprobs[:n], abs=1e-4)
        row = Tree.row(a.tokens, [i >= len(a.tokens) - len(a.completion) for i in range(len(a.tokens))])
        values = made.values(policy, Batch([row]))
        states = [*values.before.tolist(), float(values.after)]
        lost = [t for t in range(1, len(a.completion) + 1) if a.completion[t - 1] == end[0] and states[t] < 0.6 * max(states[: t + 1])]
        looked = [t for t in lost if t <= len(a.completion) // 8 * 8 and (t - 1) // 8 * 8 + 8 < 40]
        if len(b.tokens) < len(a.tokens):
            cut += 1
            assert n == looked[0] and b.finish == "length" and policy.decode(b.completion).endswith(STEP_END)
        else:
            # not looked at: a chunk in which it ended by itself
            assert not [t for t in looked if (t - 1) // 8 * 8 + 8 < len(a.completion)]
    assert 0 < cut < len(found)
    assert pruning.take()[1] == {"pruned_share": cut / len(found)}


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ([1.0, 0.9, 0.4, 0.9, 0.9], 2),  # behind the token that ends the step
        ([1.0, 0.4, 0.9, 0.9, 0.3], 4),  # at 1 no step ends
        ([1.0, 0.9, 0.5, 0.9, 0.5], None),  # not below half
        ([0.1, 0.1, 0.1, 2.0, 0.9], 4),  # the best on the way
        ([-1.0, -2.0, -3.0, -9.0, -9.0], None),  # a share of a negative best lies above it
    ],
)
def test_lost(policy: Policy, values: list[float], want: int | None) -> None:
    engine = LocalEngine(policy)
    tokens = policy.tokenizer.encode("1\n2\n", add_special_tokens=False)
    assert len(tokens) == 4
    assert Pruning(0.5, "\n", 8).lost(engine, tokens, values) == want
