"""What is told of a batch: values apart from abstentions and errors, groups that teach nothing, components that cancel."""

from __future__ import annotations

import statistics as reference

import pytest

from burnish.core.metrics import METRICS
from burnish.core.records import Scored
from burnish.rewards.statistics import describe, spread, warnings


def test_mean_and_deviation_are_over_values_only() -> None:
    values = [0.0, 1.0, 1.0, 0.3]
    found = describe([*map(Scored, values), Scored(), Scored(error="timeout"), Scored(error="infra"), Scored(error="infra")])
    assert found["reward_mean"] == pytest.approx(reference.fmean(values)) and found["reward_std"] == pytest.approx(reference.pstdev(values))
    assert (found["reward_min"], found["reward_max"], found["reward_abstained"]) == (0.0, 1.0, 1 / 8)
    assert [found[f"reward_{kind}"] for kind in ("timeouts", "crashes", "invalid", "infra")] == [1, 0, 0, 2]
    assert found.keys() <= METRICS.keys()
    nothing = describe([Scored(), Scored(error="crash")])
    assert nothing["reward_mean"] is None and nothing["reward_std"] is None


def test_flat_groups_and_groups_that_cancel() -> None:
    a = [Scored(v) for v in (1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 5.0)]
    b = [Scored(v) for v in (0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 5.0)]
    both = [Scored((x.value or 0) + (y.value or 0)) for x, y in zip(a, b)]
    found = spread({"a": a, "b": b}, both, [0, 0, 1, 1, 2, 2, 3])  # cancels, flat, live, alone
    assert found == {"reward_flat_groups": 2 / 3, "reward_cancelled_groups": 1 / 3}
    assert spread({"a": a[:1]}, both[:1], [0]) == {"reward_flat_groups": None, "reward_cancelled_groups": None}


def test_sums_that_differ_by_rounding_alone_are_flat() -> None:
    parts = {n: [Scored(x), Scored(y)] for n, x, y in (("a", 0.1, 0.3), ("b", 0.2, 0.2), ("c", 0.3, 0.1))}
    sums = [Scored(0.1 + 0.2 + 0.3), Scored(0.3 + 0.2 + 0.1)]
    assert sums[0] != sums[1] and spread(parts, sums, [0, 0]) == {"reward_flat_groups": 1.0, "reward_cancelled_groups": 1.0}


def test_warnings_in_words() -> None:
    def row(std: float, abstained: float = 0.0) -> dict[str, float]:
        return {"reward_std": std, "reward_abstained": abstained}

    weights = {"a": 1.0, "b": 1.0, "c": 0.0}
    fine = {"reward_flat_groups": 0.5, "reward_cancelled_groups": 0.0}
    assert warnings({"a": row(0.5), "b": row(0.1)}, fine, weights) == []
    (cancel,) = warnings({"a": row(0.5)}, {"reward_flat_groups": 0.5, "reward_cancelled_groups": 0.25}, weights)
    assert "in 25% of the groups the components vary but their sum does not" in cancel
    (flat,) = warnings({"a": row(0.5)}, {"reward_flat_groups": 1.0, "reward_cancelled_groups": 0.0}, weights)
    assert "every sample of every group has the same reward" in flat
    (scale,) = warnings({"a": row(500.0), "b": row(0.5)}, fine, weights)
    assert "'a' varies 1,000 times as much as 'b' after weighting" in scale
    assert warnings({"a": row(500.0), "b": row(0.5)}, fine, {"a": 0.01, "b": 1.0}) == []
    assert warnings({"a": row(5e9), "c": row(0.5)}, fine, weights) == []
    (silent,) = warnings({"a": row(0.0, 1.0)}, fine, weights)
    assert silent == "'a' abstained on every sample"
