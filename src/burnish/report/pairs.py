"""One system against another on the same questions: the grades, their means, and the paired test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from burnish.config.schema import LIKELIHOOD
from burnish.core.errors import DataError
from burnish.maths.estimators import bootstrap_mean, paired_difference, paired_test, wilson
from burnish.report import units
from burnish.report.files import EvalFile, StrategyRow

SIGNIFICANT = 0.05
Row = dict[str, Any]


def mean_and_interval(grades: Sequence[float]) -> tuple[float, list[float]]:
    """Accuracy and its 95 % interval: Wilson for right and wrong, bootstrap where there is partial credit."""
    mean = sum(grades) / len(grades)
    if all(g in (0, 1) for g in grades):
        return mean, list(wilson(round(sum(grades)), len(grades)))
    return mean, list(bootstrap_mean(list(grades)))


def metric_of(strategies: Sequence[str]) -> str:
    """What an eval measures, by its strategies: held-out rows have one, and nothing is sampled for them."""
    return "likelihood" if LIKELIHOOD in strategies else "accuracy"


def comparison(kind: str, mine: tuple[str, EvalFile, StrategyRow], other: tuple[str, EvalFile, StrategyRow]) -> Row | None:
    """One system against another, or None where they did not answer the same questions in the same order."""
    (stage, file, a), (against, other_file, b) = mine, other
    if not file.item_ids or file.item_ids != other_file.item_ids:
        return None
    try:
        difference, p = paired_difference(a.correct, b.correct), paired_test(a.correct, b.correct)
    except DataError:
        return None
    better = "better" if difference.mean > 0 else "worse"
    made: Row = {
        "eval": file.eval, "kind": kind, "metric": metric_of([a.strategy]),
        "test": "exact McNemar" if all(g in (0, 1) for g in (*a.correct, *b.correct)) else "sign flips", "stage": stage, "strategy": a.strategy, "against_stage": against,
        "against_strategy": b.strategy, "oracle": a.oracle or b.oracle, "n": len(a.correct),
        "accuracy": sum(a.correct) / len(a.correct), "against_accuracy": sum(b.correct) / len(b.correct),
        "difference": difference.mean, "interval": [difference.low, difference.high], "p": p,
        "wins": sum(x > y for x, y in zip(a.correct, b.correct)), "losses": sum(x < y for x, y in zip(a.correct, b.correct)),
        "outcome": better if p < SIGNIFICANT else "no significant change",
    }  # fmt: skip
    return made | {"sentence": _sentence(made)}


def _sentence(c: Row) -> str:
    """The comparison in words, whichever way it went."""
    against = c["against_stage"] if c["kind"] == "stage" else c["against_strategy"]
    what = "likely, in the mean," if c["metric"] == "likelihood" else "right"
    evidence = f"95 % interval {units.points_interval(c['interval'])}, {units.probability(c['p'])}"
    size = units.points(abs(c["difference"])).removeprefix("+")
    if c["outcome"] == "no significant change":
        how = f"not clearly different from {against} at {units.percent(c['against_accuracy'])} ({units.points(c['difference'])} points, {evidence})"
    else:
        how = f"{size} points {'more' if c['difference'] > 0 else 'less'} than {against} ({evidence})"
    return f"On {c['eval']}, {c['stage']} with {c['strategy']} is {what} {units.percent(c['accuracy'])} of the time: {how}."
