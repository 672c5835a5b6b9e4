"""The sections that carry numbers: accuracy, its price, comparisons, training, ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from burnish.report import charts, units
from burnish.report.drawn import draws
from burnish.report.frontier import cost, training_cost
from burnish.report.markup import Child, Markup, join, tag
from burnish.report.parts import Section, cell, facts, folded, key, prose, stage_classes, table
from burnish.report.verdict import gains

Report = Mapping[str, Any]
Row = dict[str, Any]
ROLES = {
    "stream": "sent through the model in training and validation",
    "label": "of those, the ones the loss is taken on",
    "prefill": "of prompts, read before answering",
    "sampled": "drawn while answering",
    "scored": "scored without being drawn",
}
ACTIVITIES = {
    "training": ("train",),
    "making batches": ("prepare",),
    "scoring rewards": ("reward",),
    "validating": ("validation",),
    "answering": ("prefill", "decode", "score", "sampling", "evaluate"),
    "loading, saving": ("load", "save"),
}


def _evals(report: Report) -> dict[str, list[tuple[str, Row]]]:
    """Eval -> (stage, its result), in order."""
    found: dict[str, list[tuple[str, Row]]] = {}
    for stage in report["stages"]:
        for evaluation in stage["evals"]:
            found.setdefault(evaluation["eval"], []).append((stage["name"], evaluation))
    return found


def _strategies(places: list[tuple[str, Row]]) -> list[str]:
    """Every strategy of an eval, those that read the gold answer last."""
    rows = {row["strategy"]: row["oracle"] for _, e in places for row in e["strategies"]}
    return sorted(rows, key=lambda name: rows[name])


def _conditions(evaluation: Row) -> str:
    """Under what settings an eval was made, in words."""
    settings = evaluation["settings"]
    if evaluation["metric"] == "likelihood":
        nats = settings.get("nats_per_label")
        said = f"likelihood of the wanted tokens in {units.many(evaluation['n'], 'row')} held out of training, not accuracy"
        return said + (f"; {nats:.3f} nats a token at the end" if isinstance(nats, float) else "")
    parts = [f"{units.many(evaluation['n'], 'question')}" + (f" of the {evaluation['fold']} fold" if evaluation["fold"] else "")]
    temperature, chosen = settings.get("temperature"), settings.get("chosen_on")
    if isinstance(temperature, int | float) and any(row["strategy"] != "greedy" for row in evaluation["strategies"]):
        measured = isinstance(chosen, str) and chosen and chosen != "given"
        parts.append(f"temperature {temperature:g}" + (f" (chosen on {chosen[:80]})" if measured else ""))
    limit = settings.get("max_new_tokens")
    if isinstance(limit, int):
        parts.append(f"at most {units.many(limit, 'token')} an answer")
    return ", ".join(parts)


def accuracy(report: Report) -> Section | None:
    evals, classes = _evals(report), stage_classes(report)
    limits = [row["interval"][1] for places in evals.values() for _, e in places for row in e["strategies"]]
    if not limits:
        return None
    scale = charts.share_scale(limits)
    figures, tables = [], []
    oracle = False
    for name, places in evals.items():
        groups, said, rows, kinds = [], [], [], []
        for strategy in _strategies(places):
            group = []
            for stage, e in places:
                for row in (r for r in e["strategies"] if r["strategy"] == strategy):
                    oracle |= row["oracle"]
                    group.append(charts.Dot(stage, strategy, row["accuracy"], row["interval"], row["n"], row["oracle"], classes[stage]))
                    rows.append(_result(strategy, stage, row))
                    kinds.append("oracle" if row["oracle"] else "")
            groups.append((strategy + (" (oracle)" if group[0].oracle else ""), group))
            said.append(f"{strategy}: " + ", ".join(f"{d.stage} {units.percent(d.value)}" for d in group))
        metric = places[-1][1]["metric"].capitalize()
        label = f"{metric} on {name}. " + "; ".join(said) + "."
        heads = ("Strategy", "Stage", metric, "95 % interval", "Cut off", "No answer", "Sampled tokens", "Work")
        word = "row" if metric == "Likelihood" else "question"
        tables.append(table(f"{name}, {units.many(places[-1][1]['n'], word)}; tokens and work per {word}", heads, rows, words=(1,), classes=kinds))
        caption = tag("figcaption", tag("h3", name), tag("p", _conditions(places[-1][1])))
        figures.append(tag("figure", caption, charts.dots(groups, scale, label=label)))
    how = "Each dot is the share of questions answered correctly; the true share lies on the line through it with 95 % confidence."
    if oracle:
        how += " An oracle reads the right answers: a ceiling, no way to answer."
    content = join(key(report), tag("div", figures, class_="pair"), folded("The same in numbers", *tables))
    return Section("accuracy", "Accuracy", how, content)


def _result(strategy: str, stage: str, row: Row) -> list[Child]:
    cost = row["per_question"]
    return [
        strategy, stage, units.percent(row["accuracy"]), units.interval(row["interval"]), units.percent(row["truncated_share"]),
        units.percent(row["unanswered_share"]), units.count(cost["sampled_tokens"]), units.flops(cost["executed_flops"]),
    ]  # fmt: skip


def price(report: Report) -> Section | None:
    classes = stage_classes(report)
    every = [p["interval"][1] for f in report["frontiers"] for p in f["points"]]
    figures = []
    for front in report["frontiers"]:
        axis = front["axis"]
        points = [p for p in front["points"] if p[axis]]
        if len(points) < 2:
            continue
        best = [f"{p['strategy']} at {p['stage']} ({units.percent(p['accuracy'])}, {cost(p[axis], axis)})"
                for p in sorted(points, key=lambda p: p[axis]) if p["on_frontier"]]  # fmt: skip
        label = f"Accuracy against cost per question on {front['eval']}. On the frontier: {'; '.join(best)}."
        what = "executed FLOPs" if axis == "executed_flops" else "sampled tokens"
        chart = charts.frontier(points, classes, charts.share_scale(every), axis=axis, label=label)
        caption = tag("figcaption", tag("h3", front["eval"]), tag("p", f"accuracy, by {what} per question"))
        figures.append(tag("figure", caption, chart, tag("p", prose(front["sentence"]), class_="aside")))
    if not figures:
        return None
    how = (
        "Up is better and right is dearer; the line joins what nothing else beats at its price or below. A best buy, in bold, is also clearly "
        "better than the one below it, in a paired test at 0.05. Oracles are left out: they answer nothing."
    )
    if any(e["per_question"]["scored_tokens"] for s in report["stages"] for v in s["evals"] if v["metric"] == "accuracy" for e in v["strategies"]):
        how += " Where a strategy also scores, work is counted in FLOPs alone: sampled tokens would hide it."
    return Section("price", "What accuracy costs", how, join(key(report), tag("div", figures, class_="pair"), _trained(report)))


def _trained(report: Report) -> Markup | None:
    """What training took to have each stage: the part of the price that is paid once."""
    paid = {t["stage"]: t for front in report["frontiers"] for t in front["training"] if t["stage"] != report["stages"][0]["name"]}
    if not paid:
        return None
    said = [
        (f"Training up to {stage}, paid once", f"{units.flops(t['executed_flops'])}, {units.tokens(t['tokens'])}, {units.duration(t['seconds'])}")
        for stage, t in paid.items()
    ]  # fmt: skip
    return facts(said)


def compared(report: Report) -> Section | None:
    rows = report["comparisons"]
    if not rows:
        return None
    tables: list[Child] = [_stages(report)]
    for name in dict.fromkeys(c["eval"] for c in rows):
        mine = [c for c in rows if c["eval"] == name]
        mine.sort(key=lambda c: (c["oracle"], c["kind"] != "stage"))
        body = [_compared(c) for c in mine]
        kinds = [("oracle" if c["oracle"] else c["outcome"].split()[0]) for c in mine]
        metric = mine[0]["metric"]
        heads = ("System", metric.capitalize(), "Points", "95 % interval", "Won : lost", "p")
        tables.append(table(f"{name}, {units.many(mine[0]['n'], 'row' if metric == 'likelihood' else 'question')}", heads, body, classes=kinds))
    n = sum(not c["oracle"] for c in rows)
    tests = dict.fromkeys(c["test"] for c in rows)
    how = (
        "Won and lost count the questions on which one did better than the other; p is how often chance alone would split those so unevenly "
        f"({' and '.join(tests)} test). Of {n} comparisons about {max(1, round(n * 0.05))} would fall below 0.05 by chance."
    )
    return Section("comparisons", "Is the difference real?", how, join(*tables))


def _stages(report: Report) -> Markup | None:
    """What each stage added to the one before it on the primary metric, and what it took; with one stage the table below says it."""
    found = gains(report)
    p, stages = report["verdict"]["primary"], report["stages"]
    steps = [c for c in found if c["kind"] == "stage"]
    if not steps:
        return None
    first = next((c for c in report["comparisons"] if c["kind"] == "stage" and (c["eval"], c["strategy"]) == (p["eval"], p["strategy"])
                  and c["stage"] == steps[0]["against_stage"]), None)  # fmt: skip
    rows: list[list[Child]] = []
    for c in ([first] if first else []) + steps:
        took = training_cost([stages[0], *(s for s in stages if s["name"] == c["stage"])], c["stage"])
        rows.append([
            join(f"{c['stage']} ", tag("small", f"after {c['against_stage']}")), units.percent(c["accuracy"]), tag("b", units.points(c["difference"])),
            units.points_interval(c["interval"]), units.probability(c["p"]).removeprefix("p ").removeprefix("= "),
            units.flops(took["executed_flops"]), units.duration(took["seconds"]),
        ])  # fmt: skip
    kinds = [c["outcome"].split()[0] for c in ([first] if first else []) + steps]
    heads = ("Stage", p["metric"].capitalize(), "Points over the stage before", "95 % interval", "p", "Its training", "Time")
    beside = [c["sentence"] for c in found if c["kind"] == "strategy"]
    return join(
        table(f"Stage by stage: {p['eval']}, {p['strategy']}", heads, rows, classes=kinds),
        tag("p", prose(" ".join(c["sentence"] for c in steps) + " " + " ".join(beside)), class_="aside"),
    )


def _compared(c: Row) -> list[Child]:
    against = f"{c['against_stage']}" if c["kind"] == "stage" else c["against_strategy"]
    name = join(f"{c['stage']} {c['strategy']} ", tag("small", f"against {against}" + (", oracle" if c["oracle"] else "")))
    share = f"{units.percent(c['against_accuracy']).removesuffix(' %')} → {units.percent(c['accuracy'])}"
    p = units.probability(c["p"]).removeprefix("p ").removeprefix("= ")
    points, limits = tag("b", units.points(c["difference"])), units.points_interval(c["interval"])
    return [name, share, points, limits, f"{units.whole(c['wins'])} : {units.whole(c['losses'])}", p]


def training(report: Report) -> Section | None:
    parts: list[Child] = []
    for stage in report["stages"][1:]:
        if draws(stage):
            continue  # a section of its own shows it
        curves = stage["curves"]
        heading = tag("h3", stage["name"])
        if curves is None or not any(v is not None for v in curves["loss"]):
            parts += [heading, tag("p", "No training step was recorded.", class_="quiet")]
            continue
        loss = [v for v in curves["loss"] if v is not None]
        lines = [charts.Line("training", curves["step"], curves["loss"], "main")]
        said = f"Training loss of {stage['name']}, from {units.plain(loss[0])} to {units.plain(loss[-1])} in {units.many(stage['steps'] or curves['step'][-1], 'step')}."
        held = [v for v in curves["validation_loss"] if v is not None]
        if held:
            lines.append(charts.Line("validation", curves["validation_step"], curves["validation_loss"], "second", dots=True))
            said += f" Validation loss from {units.plain(held[0])} to {units.plain(held[-1])}."
        marks = curves["resumed_after"]
        small = [
            tag("figure", tag("figcaption", tag("p", caption)), charts.curve(
                [charts.Line(caption, curves["step"], curves[name], "main")], height=90, resumed=marks, zero=True,
                label=f"{caption.capitalize()} of {stage['name']}, highest {units.plain(max(v for v in curves[name] if v is not None))}.",
            ))
            for name, caption in (("lr", "learning rate"), ("grad_norm", "gradient norm, before clipping"))
            if any(v is not None for v in curves[name])
        ]  # fmt: skip
        every = curves["steps_per_point"]
        note = f"loss in nats per learned token, by step{f'; each point is the mean of {every} steps' if every > 1 else ''}"
        parts += [
            heading,
            tag("figure", tag("figcaption", tag("p", note)), charts.curve(lines, height=230, resumed=marks, label=said), class_="large"),
            tag("div", small, class_="pair"),
            facts([
                ("Method", stage["method"]), ("Steps", units.whole(stage["steps"])), ("Skipped", units.whole(stage["skipped_steps"])),
                ("Loss", f"{units.plain(loss[0])} → {units.plain(loss[-1])}"),
                ("Validation loss", f"{units.plain(held[0])} → {units.plain(held[-1])}" if held else None),
                ("Speed", None if curves["median_tokens_per_s"] is None else f"{units.count(curves['median_tokens_per_s'])} tokens/s, the median"),
            ]),
        ]  # fmt: skip
    if not parts:
        return None
    how = (
        "Loss is how surprised the model is by the tokens it should learn; lower is better, and what counts is validation, measured on rows it "
        "never trains on."
    )
    return Section("training", "Training", how, join(*parts))


def ledger(report: Report) -> Section | None:
    stages = [s for s in report["stages"] if s["ledger"]]
    if not stages:
        return None
    whole = report["ledger"]
    several = len(stages) > 1
    columns = [(s["name"], s["ledger"]) for s in stages] + ([("run", whole)] if several else [])
    roles = [*(r for r in ROLES if any(r in led["tokens"] for _, led in columns)), *sorted(set(whole["tokens"]) - set(ROLES))]
    tokens = table(
        "Tokens by role", ("Role", *(name for name, _ in columns)),
        [[join(f"{role} ", tag("small", ROLES.get(role, ""))), *(_counted(led, role) for _, led in columns)] for role in roles],
        wide=len(columns) > 4,
    )  # fmt: skip
    total: list[Child] = ["whole run", units.flops(whole["useful_flops"]), units.flops(whole["executed_flops"]), units.percent(whole["work_efficiency"]),
                          units.duration(whole["seconds"]), ""]  # fmt: skip
    parts = [(f"{s['name']}, {activity}", names, s["ledger"]) for s in stages for activity, names in _activities(s["ledger"]).items()]
    work = work_table("Work and time", parts, total if several else None)
    rest = facts([
        ("Peak memory", units.size(whole["peak_memory_bytes"])), ("Energy", None if whole["joules"] is None else f"{units.count(whole['joules'])} J"),
        ("Money", None if whole["money"] is None else f"{whole['money']:.4g}"),
    ])  # fmt: skip
    how = (
        "Useful is the least work the result needs and executed what was launched: their ratio is the work efficiency, and the rest was done "
        "twice or for nothing. Tokens and FLOPs are counted and the same on every machine; time is this machine's."
    )
    return Section("ledger", "What it cost", how, join(tokens, work, _equivalent(report), rest))


def _activities(ledger: Row) -> dict[str, list[str]]:
    """Activity -> the phases of this ledger that belong to it; a phase nobody foresaw is its own."""
    found = {name: [p for p in phases if p in ledger["phases"]] for name, phases in ACTIVITIES.items()}
    known = {p for phases in ACTIVITIES.values() for p in phases}
    found |= {p: [p] for p in ledger["phases"] if p not in known}
    return {name: phases for name, phases in found.items() if phases}


def _counted(ledger: Row, role: str) -> Child:
    """A stage that keeps a ledger and lists no such token has counted none, which is not the same as not measured."""
    return units.count(ledger["tokens"][role]) if role in ledger["tokens"] else tag("span", "none counted", class_="absent")


def work_table(caption: str, parts: Sequence[tuple[str, list[str], Row]], total: list[Child] | None = None) -> Markup:
    """FLOPs and time of (title, phases, the ledger that has them), the time as a bar too."""
    longest = max((_seconds(names, led) or 0 for _, names, led in parts), default=0)
    rows = [_work(title, names, led, longest) for title, names, led in parts] + ([total] if total else [])
    kinds = [""] * len(parts) + (["sum"] if total else [])
    heads = ("Activity", "Useful", "Executed", "Efficiency", "Time", "Time, as a bar")
    return table(caption, heads, rows, words=(5,), classes=kinds)


def _seconds(names: list[str], ledger: Row) -> float | None:
    known = [s for name in names if (s := ledger["phases"][name]["seconds"]) is not None]
    return sum(known) if known else None


def _work(title: str, names: list[str], ledger: Row, longest: float) -> list[Child]:
    phases = [ledger["phases"][name] for name in names]
    useful = [p["useful_flops"] for p in phases if p["useful_flops"] is not None]
    executed = [p["executed_flops"] for p in phases if p["executed_flops"] is not None]
    seconds = _seconds(names, ledger)
    share = sum(useful) / sum(executed) if useful and len(useful) == len(executed) and sum(executed) else None
    bar = charts.bar(seconds / longest, units.duration(seconds)) if seconds is not None and longest else Markup("")
    return [title, units.flops(sum(useful)) if useful else None, units.flops(sum(executed)) if executed else None, cell(units.percent(share)),
            units.duration(seconds), bar]  # fmt: skip


def _equivalent(report: Report) -> Markup | None:
    """Training and answering are counted in one unit, so one can be said in terms of the other."""
    primary, cost = report["verdict"]["primary"], report["verdict"]["cost"]
    if not primary or not cost["training"]["executed_flops"] or not cost["answer"]["executed_flops"]:
        return None
    questions = cost["training"]["executed_flops"] / cost["answer"]["executed_flops"]
    said = f"Training was as much work as answering {units.count(round(questions))} questions with {primary['stage']} {primary['strategy']}."
    return tag("p", said, class_="aside")
