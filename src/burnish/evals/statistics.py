"""Comparing two strategies, or two stages, on the same items: the difference, its interval, and a paired test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from burnish.core.errors import ConfigError, DataError
from burnish.core.table import did_you_mean
from burnish.maths.estimators import paired_difference, paired_test


@dataclass(frozen=True)
class Comparison:
    """after - before over the same items. p: two-sided, paired; cost: sampled tokens after, divided by before."""

    eval: str
    n: int
    before: str
    after: str
    accuracy_before: float
    accuracy_after: float
    difference: float
    interval: tuple[float, float]
    p: float
    cost: float


def row_of(evaluation: Mapping[str, Any], strategy: str) -> Mapping[str, Any]:
    """One strategy's row of an eval. Raises ConfigError with the ones there are."""
    rows = {row["strategy"]: row for row in evaluation["strategies"]}
    if strategy not in rows:
        raise ConfigError(
            f"{strategy!r} was not evaluated.{did_you_mean(strategy, rows)} There are: {', '.join(rows)}",
            where=f"eval {evaluation['eval']} of stage {evaluation['stage'] or '?'}",
        )
    return rows[strategy]


def compare(before: Mapping[str, Any], after: Mapping[str, Any], strategy: str, other: str | None = None) -> Comparison:
    """`other` (default: the same strategy) of eval `after` against `strategy` of eval `before`.

    Raises DataError where the two were not asked the same items in the same order, ConfigError where one of the two is
    an oracle and the other is not: an oracle reads the gold answers.
    """
    ids, theirs = list(before["item_ids"]), list(after["item_ids"])
    if ids != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ids, theirs)) if a != b), min(len(ids), len(theirs)))
        shown = [f"{x[at]!r}" if at < len(x) else "nothing" for x in (ids, theirs)]
        raise DataError(
            f"{len(ids)} and {len(theirs)} items that differ from number {at} on: {shown[0]} against {shown[1]}",
            where=f"eval {before['eval']}",
            remedy="evaluate both on the same rows, levels and seed; a paired comparison needs the same items",
        )
    first, second = row_of(before, strategy), row_of(after, other or strategy)
    if first["oracle"] != second["oracle"]:
        oracle = first if first["oracle"] else second
        raise ConfigError(
            "reads the gold answers: it is a ceiling and beats nothing that has to answer",
            where=str(oracle["strategy"]),
            remedy="compare strategies that answer",
        )
    found = paired_difference(second["correct"], first["correct"])
    spent = first["spend"]["sampled_tokens"]
    return Comparison(
        eval=before["eval"],
        n=len(ids),
        before=_title(before, first),
        after=_title(after, second),
        accuracy_before=first["accuracy"],
        accuracy_after=second["accuracy"],
        difference=found.mean,
        interval=(found.low, found.high),
        p=paired_test(second["correct"], first["correct"]),
        cost=second["spend"]["sampled_tokens"] / spent if spent else float("nan"),
    )


def _title(evaluation: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (evaluation["stage"], row["strategy"])))
