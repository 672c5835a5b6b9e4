"""Paired comparisons of evals."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.core.errors import ConfigError, DataError
from burnish.evals.statistics import compare


def evaluation(stage: str, ids: list[str] | None = None, **strategies: list[int]) -> dict[str, Any]:
    rows = [
        {
            "strategy": name.replace("_", ":"),
            "oracle": name.startswith("pass"),
            "accuracy": sum(correct) / len(correct),
            "correct": correct,
            "spend": {"sampled_tokens": 100 * (4 if "4" in name else 1)},
        }
        for name, correct in strategies.items()
    ]
    n = len(next(iter(strategies.values())))
    return {"eval": "sums", "stage": stage, "item_ids": ids or [f"i{k}" for k in range(n)], "strategies": rows}


def test_stages_and_strategies_are_compared_item_by_item() -> None:
    base = evaluation("base", greedy=[0, 0, 0, 0, 0, 0, 1, 1], vote_4=[1, 1, 0, 0, 0, 0, 1, 1])
    sft = evaluation("sft", greedy=[1, 1, 1, 1, 1, 1, 1, 0], vote_4=[1] * 8)
    found = compare(base, sft, "greedy")
    assert (found.before, found.after, found.n) == ("base greedy", "sft greedy", 8)
    assert (found.accuracy_before, found.accuracy_after, found.difference) == (0.25, 0.875, 0.625)
    assert found.p == pytest.approx(2 * (1 + 7) / 2**7)  # six won, one lost
    assert found.interval[0] < 0.625 < found.interval[1] and found.interval[0] > -1
    within = compare(sft, sft, "greedy", "vote:4")
    assert (within.difference, within.cost) == (0.125, 4.0)
    backwards = compare(sft, base, "greedy")
    assert backwards.difference == -found.difference and backwards.p == found.p


def test_other_items_are_refused_by_name() -> None:
    a, b = evaluation("base", greedy=[0, 1]), evaluation("sft", ["i0", "other"], greedy=[0, 1])
    with pytest.raises(DataError, match="differ from number 1 on: 'i1' against 'other'"):
        compare(a, b, "greedy")
    with pytest.raises(DataError, match="2 and 3 items"):
        compare(a, evaluation("sft", greedy=[0, 1, 1]), "greedy")
    with pytest.raises(DataError, match="differ from number 0"):
        compare(a, evaluation("sft", ["i1", "i0"], greedy=[0, 1]), "greedy")


def test_oracles_are_not_compared_with_answers() -> None:
    a = evaluation("sft", greedy=[0, 1], pass_4=[1, 1])
    with pytest.raises(ConfigError, match="pass:4  reads the gold answers"):
        compare(a, a, "greedy", "pass:4")
    assert compare(a, a, "pass:4").difference == 0
    with pytest.raises(ConfigError, match="'voting' was not evaluated"):
        compare(a, a, "voting")
