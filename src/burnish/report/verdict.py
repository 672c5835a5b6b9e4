"""Whether the run was worth it: paired comparisons, and the verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from burnish.report import units
from burnish.report.files import EvalFile
from burnish.report.frontier import training_cost
from burnish.report.markup import visible
from burnish.report.pairs import comparison

Row = dict[str, Any]


def comparisons(stages: Sequence[tuple[str, Mapping[str, EvalFile]]]) -> list[Row]:
    """Each later stage against the first, and against the one before it, with the same strategy; and each strategy against
    greedy in the same stage.

    `stages` are (name, evaluations by name) in order; the first is the base model.
    """
    found: list[Row | None] = []
    base_name, base = stages[0]
    for name in dict.fromkeys(name for _, evals in stages for name in evals):
        last: tuple[str, EvalFile] | None = None
        for stage, evals in stages[1:]:
            if name not in evals:
                continue
            earlier = [(base_name, base[name])] if name in base else []
            for other, file in [*earlier, *([last] if last else [])]:
                before = {row.strategy: row for row in file.strategies}
                for row in evals[name].strategies:
                    if row.strategy in before:
                        found.append(comparison("stage", (stage, evals[name], row), (other, file, before[row.strategy])))
            last = stage, evals[name]
        for stage, evals in stages:
            rows = evals[name].strategies if name in evals else []
            greedy = next((row for row in rows if row.strategy == "greedy"), None)
            for row in rows:
                if greedy is not None and row is not greedy:
                    found.append(comparison("strategy", (stage, evals[name], row), (stage, evals[name], greedy)))
    return [row for row in found if row is not None]


def primary_metric(asked: tuple[str, str] | None, stages: Sequence[Row]) -> tuple[str, str] | None:
    """(eval, strategy) the verdict is about: the recipe's, else the first eval, greedy where it has it."""
    if asked is not None:
        return asked
    for evaluation in (e for s in stages for e in s["evals"]):
        usable = [row["strategy"] for row in evaluation["strategies"] if not row["oracle"]]
        if usable:
            return evaluation["eval"], "greedy" if "greedy" in usable else usable[0]
    return None


def _strategy(stage: Row, name: str, strategy: str) -> Row | None:
    rows = [row for e in stage["evals"] if e["eval"] == name for row in e["strategies"]]
    return next((row for row in rows if row["strategy"] == strategy), None)


def verdict(
    asked: tuple[str, str] | None, state: str, stages: Sequence[Row], compared: Sequence[Row], planned: Sequence[str]
) -> Row:
    """What became of the primary metric between the base model and the last stage that was evaluated on it."""
    metric = primary_metric(asked, stages)
    trained = [s for s in stages[1:] if metric and _strategy(s, *metric)]
    reasons = _reasons(metric, state, stages, trained, planned)
    found: Row | None = None
    if metric and trained and not reasons:
        key = {"kind": "stage", "eval": metric[0], "strategy": metric[1], "stage": trained[-1]["name"], "against_stage": stages[0]["name"]}
        found = next((c for c in compared if all(c[k] == v for k, v in key.items())), None)
        if found is None:
            reasons = [f"base and {trained[-1]['name']} were not asked the same questions of {metric[0]}, so they cannot be compared in pairs"]
    if found is None or metric is None:
        said = "; ".join(reasons)
        return {
            "outcome": "invalid", "headline": f"No verdict: {reasons[0]}", "sentence": f"No verdict: {said}.", "cost_sentence": None,
            "reasons": reasons, "primary": None, "cost": None,
        }  # fmt: skip
    judged = trained[-1]
    before, after = _strategy(stages[0], *metric), _strategy(judged, *metric)
    assert before is not None and after is not None
    outcome = {"better": "improved", "worse": "worse"}.get(found["outcome"], "no significant change")
    primary = {
        "eval": metric[0], "strategy": metric[1], "metric": found["metric"], "stage": judged["name"], "n": found["n"],
        "base": before["accuracy"], "base_interval": before["interval"], "value": after["accuracy"], "value_interval": after["interval"],
        "difference": found["difference"], "interval": found["interval"], "p": found["p"],
    }  # fmt: skip
    cost = _cost(stages, judged, before, after)
    last = planned[-1] if planned else judged["name"]
    so_far = "" if judged["name"] == last else f"After {judged['name']}, the last stage measured on it. "
    return {
        "outcome": outcome, "headline": so_far + _headline(outcome, primary), "sentence": _sentence(primary, outcome),
        "cost_sentence": _cost_sentence(cost, found["metric"]), "reasons": [], "primary": primary, "cost": cost,
    }  # fmt: skip


def _reasons(
    metric: tuple[str, str] | None, state: str, stages: Sequence[Row], trained: Sequence[Row], planned: Sequence[str]
) -> list[str]:
    """Why there can be no verdict; empty where there can."""
    if metric is None or not any(s["evals"] for s in stages):
        ended = "the run ended before anything was evaluated"
        return [{"running": "nothing has been evaluated yet", "finished": "nothing was evaluated"}.get(state, ended)]
    name, strategy = metric
    rows = [row for s in stages if (row := _strategy(s, name, strategy))]
    if any(row["oracle"] for row in rows):
        return [f"{strategy} reads the right answers, so its accuracy is a ceiling and not a result"]
    if not planned and len(stages) == 1:
        return ["this run trained nothing, it only measured the base model"]
    if _strategy(stages[0], name, strategy) is None:
        return [f"the base model has no result on {name} with {strategy}, so there is nothing to compare with"]
    if not trained:
        words = {"running": "the run is not there yet", "finished": "no trained stage was evaluated"}
        return [words.get(state, "the run ended before a trained model was evaluated") + f" on {name} with {strategy}"]
    judged = trained[-1]
    if judged["steps"] and judged["skipped_steps"] == judged["steps"]:
        return [f"every one of the {units.many(judged['steps'], 'step')} of {judged['name']} was skipped: the model was never updated"]
    return []


def _cost(stages: Sequence[Row], judged: Row, before: Row, after: Row) -> Row:
    kept = ("sampled_tokens", "executed_flops")
    return {
        "training": training_cost(stages, judged["name"]),
        "answer": {k: after["per_question"][k] for k in kept},
        "base_answer": {k: before["per_question"][k] for k in kept},
    }


def _headline(outcome: str, p: Row) -> str:
    before, after = units.percent(p["base"]), units.percent(p["value"])
    if outcome == "no significant change":
        return f"No significant change: {p['eval']} {before} before, {after} after"
    return f"{outcome.capitalize()}: {p['eval']} from {before} to {after}"


def _sentence(p: Row, outcome: str) -> str:
    if p["metric"] == "likelihood":
        what = (
            f"On {units.many(p['n'], 'row')} of {p['eval']}, {p['stage']} finds the wanted tokens {units.percent(p['value'])} likely "
            f"and the base model {units.percent(p['base'])}"
        )
    else:
        what = (
            f"Answering {units.many(p['n'], 'question')} of {p['eval']} with {p['strategy']}, {p['stage']} is right on {units.percent(p['value'])} "
            f"and the base model on {units.percent(p['base'])}"
        )
    said = (
        f"{what}: a difference of {units.points(p['difference'])} points "
        f"(95 % interval {units.points_interval(p['interval'])}, {units.probability(p['p'])})."
    )
    if outcome == "no significant change":
        reach = max(p["interval"][1] - p["difference"], p["difference"] - p["interval"][0])
        said += f" With {units.many(p['n'], 'row' if p['metric'] == 'likelihood' else 'question')}, a true difference of less than about {100 * reach:.1f} points can go unseen."
    return said


def _cost_sentence(cost: Row, metric: str) -> str:
    t, now, then = cost["training"], cost["answer"], cost["base_answer"]
    trained = [s for s, v in ((units.tokens(t["tokens"]), t["tokens"]), (units.flops(t["executed_flops"]), t["executed_flops"]),
                              (units.duration(t["seconds"]), t["seconds"])) if v is not None]  # fmt: skip
    took = f"Training took {_listed(trained)}." if trained else "What training took was not measured."
    if metric == "likelihood":
        return took
    if now["sampled_tokens"] is None:
        return f"{took} What an answer costs was not measured."
    said = f"{took} An answer costs {units.count(now['sampled_tokens'])} sampled tokens"
    said += "" if now["executed_flops"] is None else f" and {units.flops(now['executed_flops'])}"
    if then["sampled_tokens"] is None:
        return f"{said}."
    said += f"; from the base model it cost {units.count(then['sampled_tokens'])}"
    return said + (f" and {units.flops(then['executed_flops'])}." if then["executed_flops"] is not None else ".")


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def gains(report: Mapping[str, Any]) -> list[Row]:
    """What each stage added to the one before it on the primary metric, and what the other strategies add at the last stage."""
    p = report["verdict"]["primary"]
    if not p:
        return []
    base = report["stages"][0]["name"]
    mine = [c for c in report["comparisons"] if c["eval"] == p["eval"] and not c["oracle"]]
    stages = [c for c in mine if c["kind"] == "stage" and c["strategy"] == p["strategy"] and c["against_stage"] != base]
    return stages + [c for c in mine if c["kind"] == "strategy" and c["stage"] == p["stage"] and stages]


def summary(report: Mapping[str, Any]) -> str:
    """The verdict for a terminal: headline, evidence, cost, and what to doubt."""
    found = report["verdict"]
    lines = [found["headline"]]
    lines += [found["sentence"]] if found["primary"] else []
    lines += [found["cost_sentence"]] if found["cost_sentence"] else []
    best = [f["sentence"] for f in report["frontiers"] if found["primary"] and f["eval"] == found["primary"]["eval"] and len(f["points"]) > 1]
    lines += best[:1]
    lines += [c["sentence"] for c in gains(report)]
    if report["run"]["state"] != "finished":
        lines.append(report["run"]["state_words"])
    lines += [f"{w['level']}: {w['text']}" for w in report["warnings"] if w["about"] != "state"]
    return "\n".join(f"  {' '.join(visible(line).split())}" for line in lines)
