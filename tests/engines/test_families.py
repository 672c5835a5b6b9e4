"""Every family: what shares prefixes is sampled from as `generate` does it; what cannot is refused, and still trains.

The long oracle, 32 prompts under three layouts of memory, is in `test_local.py` for the families with the most to get
wrong. Here every family answers a few ragged prompts, some longer than its window.
"""

from __future__ import annotations

import copy

import pytest
import torch

from burnish.core.errors import MachineError
from burnish.core.records import Sampling
from burnish.engines.local.engine import LocalEngine
from burnish.forest.pack import Batch
from burnish.forest.stream import Tree, Unit
from burnish.maths.logprobs import weighted_nll
from burnish.models.policy import Policy
from tests.engines.policies import Letters, generated, policy, prompts
from tests.forest.tiny import PADDED, SHARE, WINDOW, body_of, tiny

PROMPTS, NEW_TOKENS = 8, 10
REASON = {
    "bloom": "only 0 of 2 layers call the registered attention function",
    "falcon": "only 0 of 2 layers call the registered attention function",
    "mamba": "linear_attention layers",
    "lfm2": "conv layers",
    "qwen3_next": "linear_attention layers",
    "llama4": "chunked_attention layers",
}


@pytest.mark.parametrize("name", SHARE)
def test_greedy_is_generate_and_captured_logprobs_are_forest_scoring(name: str, record_property: object) -> None:
    model, given = policy(name), prompts(PROMPTS)
    assert sum(len(p) > WINDOW for p in given) >= 4 and len({len(p) for p in given}) > 3
    engine = LocalEngine(model, rows=4)
    found = engine.sample(
        engine.prefill_many(given), Sampling(temperature=0.0, max_new_tokens=NEW_TOKENS), [(i, 0) for i in range(PROMPTS)]
    )
    assert [t.completion for t in found] == generated(name, PROMPTS, NEW_TOKENS)
    trees = [
        Tree((p, t.completion), (-1, 0), (Unit(1, tuple(range(len(p), len(t.tokens)))),)) for p, t in zip(given, found)
    ]
    (micro,) = Batch(trees).split(10_000)
    scored = model.logprobs(micro)
    captured = torch.tensor([x for t in found for x in t.logprobs])
    assert len(scored) == len(captured) > PROMPTS
    assert (scored - captured).abs().max() < 1e-4
    assert (captured < -1e-3).any()  # certain tokens would agree whatever was computed


@pytest.mark.parametrize("name", PADDED)
def test_what_cannot_share_says_why_and_the_engine_refuses_with_the_reason(name: str) -> None:
    model = policy(name)
    assert REASON[name] in str(model.why_not_shared)
    assert model.decisions["attention"]["value"] == "padded" and REASON[name] in model.decisions["attention"]["why"]
    with pytest.raises(MachineError, match="cannot be sampled from by the local engine") as refused:
        LocalEngine(model)
    assert REASON[name] in str(refused.value)


def _pair() -> Tree:
    """A prompt with two answers, both learned whole, and a third row of another length beside it."""
    root = (5, 9, 3, 40, 8, 11, 96, 7, 20)
    first, second = (31, 4, 17, 60), (12, 80, 33, 9, 71, 26)
    return Tree(
        (root, first, second),
        (-1, 0, 0),
        (Unit(1, tuple(range(9, 13))), Unit(2, tuple(range(9, 15)))),
    )


@pytest.mark.parametrize("name", PADDED)
def test_a_gradient_step_on_padded_rows_is_the_models_own(name: str) -> None:
    # float64: the scan of a state-space model differs from itself by 2e-4 in float32
    plain = tiny(name, dtype=torch.float64)
    trees = [_pair(), Tree.row((6, 6, 50, 12, 44), (False, False, True, True, True))]
    ours = Policy(copy.deepcopy(plain), Letters())
    total = torch.zeros((), dtype=torch.float64)
    for tree in trees:  # every sequence alone through the model's own logits
        for unit in tree.units:
            path = tree.tokens[0] + (tree.tokens[unit.leaf] if unit.leaf else ())
            logits = plain(torch.tensor([path]), use_cache=False).logits[0].log_softmax(-1)
            labels = torch.tensor(unit.labels)
            total = total - logits[labels - 1, torch.tensor(path)[labels]].sum()
    (total / 13).backward()
    whole = Batch(trees)
    assert whole.entries == 13
    (micro,) = whole.split(1000)
    out = ours(micro, weighted_nll(torch.full((13,), 1 / 13, dtype=torch.float64)))
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), total.detach() / 13, rtol=1e-6, atol=1e-7, check_dtype=False)
    want = dict(plain.named_parameters())
    learned = 0
    for n, p in ours.model.named_parameters():
        theirs = want[n].grad
        if theirs is None:
            assert p.grad is None or not p.grad.any(), n
            continue
        assert p.grad is not None, n
        assert float((p.grad - theirs).norm()) <= 1e-5 * float(theirs.norm()) + 1e-9, n
        learned += bool(theirs.any())
    assert learned > 8
    for model in (plain, ours.model):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    ids = torch.tensor([trees[1].tokens[0]])
    with torch.no_grad():
        step = [body_of(m)(input_ids=ids, use_cache=False).last_hidden_state for m in (plain, ours.model)]
    torch.testing.assert_close(*step, rtol=1e-4, atol=1e-5)
