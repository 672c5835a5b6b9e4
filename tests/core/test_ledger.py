"""The FLOP formulas against sums written out by hand, and the ledger's arithmetic."""

import json

import pytest

from burnish.core.ledger import Ledger, attended, attention_flops, decode_flops, forward_flops, train_flops
from burnish.core.records import ModelShape, Spend

SHAPE = ModelShape(
    layers=3, hidden=8, vocabulary=50, query_heads=4, kv_heads=2, key_width=5, value_width=7, body_parameters=1000,
    parameters=1400, windows=(None, 4, 4),
)  # fmt: skip


@pytest.mark.parametrize("first", [0, 1, 3, 9])
@pytest.mark.parametrize("length", [1, 2, 6, 20])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_attended_is_the_sum_over_queries(first: int, length: int, window: int | None) -> None:
    by_hand = sum(min(p + 1, window or 10**9) for p in range(first, first + length))
    assert attended(first, length, window) == by_hand


def test_attention_counts_every_layer_with_its_own_window() -> None:
    pairs = sum(p + 1 for p in range(6)) + 2 * sum(min(p + 1, 4) for p in range(6))
    assert attention_flops(SHAPE, [(0, 6)]) == 2 * 4 * (5 + 7) * pairs


def test_training_is_three_forwards_and_adapters_save_the_frozen_weight_gradient() -> None:
    spans = [(0, 6)]
    assert train_flops(SHAPE, 6, 2, spans) == 3 * forward_flops(SHAPE, 6, 2, spans)
    from dataclasses import replace

    adapted = replace(SHAPE, trained="adapter", adapter_parameters=10, head_trained=False)
    want = 4 * 1000 * 6 + 6 * 10 * 6 + 4 * 50 * 8 * 2 + 3 * attention_flops(SHAPE, spans)
    assert train_flops(adapted, 6, 2, spans) == want


def test_decoding_token_by_token_costs_what_prefilling_with_all_logits_costs() -> None:
    one_by_one = sum(decode_flops(SHAPE, 1, {None: p + 1, 4: min(p + 1, 4)}) for p in range(6))
    assert one_by_one == forward_flops(SHAPE, 6, 6, [(0, 6)])


def test_ledger_adds_and_round_trips_and_refuses_unknown_units() -> None:
    ledger = Ledger()
    ledger.count("train", stream_tokens=10, useful_flops=100, executed_flops=150)
    ledger.count("train", stream_tokens=5, useful_flops=1, executed_flops=2)
    ledger.spend(Spend(prefill_tokens=3, sampled_tokens=4, useful_flops=5, executed_flops=6))
    ledger.measure("train", 1.5)
    ledger.measure("train", 0.5)
    assert ledger.counted["train"] == {"stream_tokens": 15, "useful_flops": 101, "executed_flops": 152}
    assert ledger.tokens == 15 + 3 + 4 and ledger.flops == 152 + 6
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again.to_json() == ledger.to_json()
    with pytest.raises(ValueError, match="apples"):
        ledger.count("train", apples=1)
