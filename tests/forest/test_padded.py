"""Padded rows against the same rows one at a time, on models that can share a prefix and on models that cannot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.core.errors import ConfigError
from burnish.forest.attention import register
from burnish.forest.padded import _batches, padded_hidden, padded_positions
from burnish.forest.stream import Layout, Stream
from tests.forest.tiny import PADDED, VOCABULARY, body_of, tiny
from tests.forest.trees import bounded, random_trees

LAYOUT = Layout((9, 5, 4, 10, 3, 6), (-1, 0, 1, 1, 0, -1))


def stream() -> Stream:
    return Stream(torch.randint(3, VOCABULARY, (LAYOUT.size,), generator=torch.Generator().manual_seed(3)), LAYOUT)


@pytest.mark.parametrize("name", [*PADDED, "llama", "gemma3", "gpt_oss"])
def test_every_segment_is_what_its_own_sequence_gives(name: str):
    model, s = tiny(name), stream()
    body = body_of(model)
    weight = torch.randn(LAYOUT.size, 32, generator=torch.Generator().manual_seed(1))
    hidden = padded_hidden(body, s, token_budget=60)
    (hidden * weight).sum().backward()
    got = {n: p.grad.clone() for n, p in body.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = []
    for i in range(len(LAYOUT.length)):  # the sequence that ends with this segment, and nothing else
        row = body(input_ids=s.tokens[LAYOUT.rows(i)][None], use_cache=False).last_hidden_state[0]
        alone.append(row[-LAYOUT.length[i] :])
    want = torch.cat(alone)
    (want * weight).sum().backward()
    assert float((hidden - want).detach().norm() / want.detach().norm()) < 1e-5
    for n, p in body.named_parameters():
        if p.grad is not None:
            assert float((got[n] - p.grad).norm()) <= 1e-4 * float(p.grad.norm()) + 1e-5, n


@pytest.mark.parametrize("budget", [1, 25, 60, 1000])
def test_the_budget_changes_the_batches_and_not_the_rows(budget: int):
    body, s = body_of(tiny("gemma3", attention="sdpa")), stream()
    with torch.no_grad():
        want = padded_hidden(body, s, token_budget=1)
        assert torch.allclose(padded_hidden(body, s, token_budget=budget), want, atol=1e-5)


@bounded
@given(st.data(), st.integers(1, 60))
def test_every_leaf_is_in_one_batch_inside_the_budget(data: st.DataObject, budget: int):
    layout = Stream.of(data.draw(random_trees())).layout
    batches = _batches(layout, budget)
    assert sorted(leaf for b in batches for leaf in b) == list(layout.leaves)
    positions = [len(b) * max(len(layout.rows(leaf)) for leaf in b) for b in batches]
    assert all(n <= budget or len(b) == 1 for n, b in zip(positions, batches))
    assert padded_positions(layout, token_budget=budget) == sum(positions)


def test_forest_attention_would_discard_the_padding_mask():
    model = tiny("llama")
    model.set_attn_implementation(register())
    with pytest.raises(ConfigError, match="takes no padding"):
        padded_hidden(body_of(model), stream())
    with pytest.raises(ConfigError, match="token_budget"):
        padded_hidden(body_of(tiny("llama")), stream(), token_budget=0)
