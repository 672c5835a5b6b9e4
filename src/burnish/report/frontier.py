"""What accuracy costs: every stage and strategy of an eval by the price of an answer, the frontier, and the best buys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from burnish.config.schema import LIKELIHOOD
from burnish.report import units
from burnish.report.files import EvalFile
from burnish.report.pairs import SIGNIFICANT, comparison

AXES = ("sampled_tokens", "executed_flops")
MAKING = ("prepare", "reward")  # phases of a stage in which it makes what it trains on
PASSED = ("stream", "prefill", "sampled", "scored")  # roles of tokens that went through the model
Row = dict[str, Any]
Judged = Sequence[tuple[str, Mapping[str, EvalFile]]]


def frontiers(stages: Sequence[Row], judged: Judged = ()) -> list[Row]:
    """Per eval and kind of cost, every strategy at every stage; oracles and likelihoods answer nothing and are left out.

    The kinds are sampled tokens and executed FLOPs a question, as far as they were measured; where some strategy also pays
    for scoring, which tokens would hide, FLOPs alone. `judged` are the grades, for the paired tests.
    """
    made: list[Row] = []
    grades = {(stage, name, row.strategy): (stage, file, row) for stage, evals in judged for name, file in evals.items() for row in file.strategies}
    for name in dict.fromkeys(e["eval"] for s in stages for e in s["evals"]):
        rows = [(s, row) for s in stages for e in s["evals"] if e["eval"] == name for row in e["strategies"]
                if not row["oracle"] and row["strategy"] != LIKELIHOOD]  # fmt: skip
        if not rows:
            continue
        measured = [axis for axis in AXES if all(row["per_question"][axis] is not None for _, row in rows)]
        if "executed_flops" in measured and any(row["per_question"]["scored_tokens"] for _, row in rows):
            measured = ["executed_flops"]
        training = [{"stage": s["name"]} | training_cost(stages, s["name"]) for s in stages if any(s is of for of, _ in rows)]
        for axis in measured or AXES[:1]:
            points: list[Row] = [
                {"stage": s["name"], "strategy": row["strategy"], "accuracy": row["accuracy"], "interval": row["interval"],
                 **{a: row["per_question"][a] for a in AXES}}
                for s, row in rows
            ]  # fmt: skip
            _mark(points, axis, {(stage, strategy): at for (stage, of, strategy), at in grades.items() if of == name})
            made.append({"eval": name, "axis": axis, "points": points, "training": training, "sentence": sentence(points, axis)})
    return made


def training_cost(stages: Sequence[Row], judged: str) -> Row:
    """What training all stages up to this one took, the drawing and scoring of what they trained on included; None where a
    part of it was not measured. The base model: nothing.
    """
    names = [s["name"] for s in stages]
    path = [s for s in stages[1 : names.index(judged) + 1] if s["method"] != "none"]

    def total(of: Callable[[Row], Any]) -> Any:
        values: list[Any] = []
        for stage in path:
            phases = (stage["ledger"] or {"phases": {}})["phases"]
            own = of(phases["train"]) if "train" in phases else None
            made = [v for name in MAKING if name in phases and (v := of(phases[name])) is not None]
            values.append(None if own is None else own + sum(made))
        return None if None in values else sum(values)

    def passed(phase: Row) -> int | None:
        known = [n for role, n in phase["tokens"].items() if role in PASSED]
        return sum(known) if known else None

    return {
        "tokens": total(passed), "label_tokens": total(lambda p: p["tokens"].get("label")),
        "executed_flops": total(lambda p: p["executed_flops"]), "seconds": total(lambda p: p["seconds"]),
    }  # fmt: skip


def cost(value: float | None, axis: str) -> str:
    """Of one question: '512 tokens', '63 MFLOP'."""
    return units.flops(value) if axis == "executed_flops" else units.tokens(value)


def _dominates(a: Row, b: Row, axis: str) -> bool:
    """At least as accurate for no more, and not equal in both."""
    if a[axis] is None or a[axis] > b[axis] or a["accuracy"] < b["accuracy"]:
        return False
    return a[axis] < b[axis] or a["accuracy"] > b["accuracy"]


def _mark(points: Sequence[Row], axis: str, grades: Mapping[tuple[str, str], Any]) -> None:
    """Which points nothing dominates; and of those, from the cheapest up, which are clearly better than the buy before."""
    for p in points:
        p |= {"on_frontier": p[axis] is not None and not any(_dominates(other, p, axis) for other in points), "best_buy": False, "p": None}
    bought: Row | None = None
    for p in sorted((p for p in points if p["on_frontier"]), key=lambda p: p[axis]):
        if bought is not None and (p[axis], p["accuracy"]) != (bought[axis], bought["accuracy"]):
            mine, other = (grades.get((each["stage"], each["strategy"])) for each in (p, bought))
            tested = comparison("frontier", mine, other) if mine and other else None
            p["p"] = tested["p"] if tested else None
            if tested and tested["p"] >= SIGNIFICANT:
                continue
        p["best_buy"], bought = True, p


def sentence(points: Sequence[Row], axis: str) -> str:
    """The best buy at every price, in words; then what is on the frontier without being clearly better."""
    bought: dict[float, list[Row]] = {}
    for p in points:
        if p["best_buy"]:
            bought.setdefault(p[axis], []).append(p)
    if not bought:
        return "What an answer costs was not measured."
    prices = sorted(bought)
    said = []
    for i, price in enumerate(prices):
        first = bought[price][0]
        who = " or ".join(f"{p['stage']} {p['strategy']}" for p in bought[price])
        why = units.percent(first["accuracy"]) + (f", {units.probability(first['p'])}" if first["p"] is not None else f" for {cost(price, axis)}")
        if len(prices) == 1:
            said.append(f"At any price {who} is the best buy ({why} an answer)")
        elif i == 0:
            said.append(f"For less than {cost(prices[1], axis)} an answer, {who} is the best buy ({why})")
        elif i + 1 < len(prices):
            said.append(f"for less than {cost(prices[i + 1], axis)}, {who} ({why})")
        else:
            said.append(f"from {cost(price, axis)} on, {who} ({why})")
    text = "; ".join(said) + "."
    close = [p for p in points if p["on_frontier"] and not p["best_buy"]]
    if close:
        names = ", ".join(f"{p['stage']} {p['strategy']} ({units.percent(p['accuracy'])}, {units.probability(p['p'])})" for p in close)
        text += f" Dearer and not clearly better than the best buy below: {names}."
    return text
