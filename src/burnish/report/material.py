"""The sections that show what went in and came out: rows and their loss mask, samples, provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from burnish.report import units
from burnish.report.markup import Child, Markup, join, tag
from burnish.report.parts import Section, facts, flat, folded, quoted, short, table, when, within

Report = Mapping[str, Any]
Row = dict[str, Any]
MASK_BYTES, SAMPLE_BYTES = 700_000, 2_500_000
SHOWN = 90  # characters of a prompt in the line that opens it


def data(report: Report) -> Section | None:
    parts: list[Child] = []
    seen = False
    stages = [s for s in report["stages"][1:] if s["data"] or s["mask_view"]]
    for stage in stages:
        about = stage["data"] or {}
        parts.append(tag("h3", stage["name"]))
        if about:
            parts.append(facts([
                ("Rows to train on", units.whole(about["rows"])), ("Held out for validation", units.whole(about["validation_rows"])),
                ("Rows left out", "; ".join(f"{units.whole(n)}, {why}" for why, n in about["dropped"].items()) or "none"),
                ("Tokens", units.whole(about["tokens"])),
                ("Learned tokens", units.whole(about["label_tokens"]) + (
                    f" ({units.percent(about['label_tokens'] / about['tokens'])})" if about["label_tokens"] is not None and about["tokens"] else "")),
                ("Longest row", units.tokens(about["longest"])), ("Read as", about["format"]), ("From", "; ".join(about["sources"]) or None),
                *(("Note", note) for note in about["notices"]),
            ]))  # fmt: skip
        rows, left = within(stage["mask_view"], _masked, MASK_BYTES // max(1, len(stages)))
        if rows:
            seen = True
            legend = tag("p", tag("span", "learned", class_="t on"), " ", tag("span", "only read", class_="t"), class_="legend")
            parts += [tag("h4", "What the loss sees"), legend, *rows]
        if left:
            parts.append(tag("p", f"{units.many(left, 'row')} left out to keep this file small.", class_="quiet"))
    if not parts:
        return None
    how = "What the model was trained on."
    if seen:
        how += " Each box below is one token: the model learns to produce the marked ones and only reads the others."
    return Section("data", "Data and loss mask", how, join(*parts))


def _masked(row: Row) -> Markup:
    tokens: list[Child] = []
    for words, learned in row["tokens"]:
        shown = words.replace("\r\n", "\n")
        kind = "t on" if learned else "t"
        visible = shown.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") if shown.strip(" \t\n") == "" else shown.replace("\n", "↵")
        tokens.append(tag("span", visible or "∅", class_=kind))
        tokens += [tag("br")] if shown.endswith("\n") else []
    more = f", {units.whole(row['cut'])} more not shown" if row["cut"] else ""
    head = tag("p", tag("b", row["where"] or "row"), f" {units.whole(row['trained'])} of {units.many(row['total'], 'token')} learned{more}", class_="where")
    return tag("div", head, tag("p", tokens, class_="tokens", dir="auto"), class_="mask")


# ---- samples --------------------------------------------------------------------------------------------------------


def samples(report: Report) -> Section | None:
    found = report["samples"]
    if not found:
        return None
    primary = report["verdict"]["primary"]
    strategies = list(dict.fromkeys(c["strategy"] for s in found for e in s["stages"] for c in e["completions"]))
    judged = primary["strategy"] if primary and primary["strategy"] in strategies else "greedy" if "greedy" in strategies else (strategies or [""])[0]
    oracles = {row["strategy"] for s in report["stages"] for e in s["evals"] for row in e["strategies"] if row["oracle"]}
    rows, left = within(found, lambda sample: _sample(sample, judged, oracles, first=sample is found[0]), SAMPLE_BYTES)
    evals = list(dict.fromkeys(s["eval"] for s in found))
    last = report["stages"][-1]["name"] if len(report["stages"]) > 1 else "base"
    content = join(
        _filter(evals, strategies, judged, last), tag("div", rows, class_="samples"),
        tag("p", f"{units.many(left, 'sample')} left out to keep this file small.", class_="quiet") if left else None,
    )  # fmt: skip
    how = "The same questions before and after, as they came: open one to read what was asked and what each strategy answered."
    return Section("samples", "Samples", how, content)


def _filter(evals: list[str], strategies: list[str], judged: str, last: str) -> Markup:
    """Hidden until the script shows it: without the script every sample is there to read."""

    def choice(name: str, title: str, options: list[tuple[str, str]], chosen: str) -> Markup:
        made = [tag("option", words, value=value, selected=value == chosen) for value, words in options]
        return tag("label", tag("span", title), tag("select", made, name=name))

    shows = [("all", "all"), ("right", f"{last} correct"), ("wrong", f"{last} wrong"), ("changed", "changed"), ("fixed", "wrong, then correct"),
             ("broken", "correct, then wrong")]  # fmt: skip
    return tag(
        "form",
        choice("eval", "Eval", [("", "all"), *((e, e) for e in evals)], "") if len(evals) > 1 else None,
        choice("strategy", "Judged by", [(s, s) for s in strategies], judged),
        choice("show", "Show", shows, "all"),
        tag("label", tag("span", "Search"), tag("input", type="search", name="words", autocomplete="off")),
        tag("output", "", name="count", aria_live="polite"),
        id="filter", hidden=True,
    )  # fmt: skip


def _sample(sample: Row, judged: str, oracles: set[str], *, first: bool) -> Markup:
    marks: dict[str, list[bool | None]] = {}
    ends = [sample["stages"][0], sample["stages"][-1]] if sample["stages"] else []
    for at, stage in enumerate(ends):
        for c in stage["completions"]:
            marks.setdefault(c["strategy"], [None, None])[at] = c["correct"]
    names = [e["stage"] for e in ends[: 1 if len(sample["stages"]) < 2 else 2]]
    mine = marks.get(judged, [None, None])
    line = " ".join(sample["prompt"].split())
    summary = tag(
        "summary", tag("span", line[:SHOWN] + ("…" if len(line) > SHOWN else ""), class_="question", dir="auto"),
        tag("span", [tag("span", f"{name} ", _mark(mine[i]), class_="seen", data_at=i) for i, name in enumerate(names)], class_="marks"),
    )  # fmt: skip
    about = [sample["id"], *([f"level {sample['level']}"] if sample["level"] is not None else [])]
    body = tag(
        "div", tag("p", " ".join(about), class_="where"),
        quoted(sample["prompt"], sample["prompt_cut"]) if sample["prompt"].strip() != line or len(line) > SHOWN else None,
        tag("p", "Right answer: ", tag("b", sample["gold"], dir="auto"), class_="gold") if sample["gold"] is not None else None,
        tag("div", [_answers(stage, oracles) for stage in sample["stages"]], class_="beside"),
    )  # fmt: skip
    return tag("details", summary, body, class_="sample", open=first, data_eval=sample["eval"], data_marks=json.dumps(marks, ensure_ascii=True))


def _mark(correct: bool | None) -> Markup:
    words = {True: "correct", False: "wrong", None: "not graded"}[correct]
    return tag("span", words, class_=f"mark {words.split()[0]}")


def _answers(stage: Row, oracles: set[str]) -> Markup:
    made = []
    for c in stage["completions"]:
        said = "no answer found" if c["answer"] is None else f"answer {c['answer']}"
        head = tag("p", tag("b", c["strategy"]), " (oracle) " if c["strategy"] in oracles else " ", _mark(c["correct"]), " ", tag("span", said, dir="auto"), class_="where")
        made.append(join(head, quoted(c["text"], c["cut"]) if c["text"] else None))
    return tag("div", tag("h3", stage["stage"]), made)


# ---- provenance -----------------------------------------------------------------------------------------------------


def provenance(report: Report) -> Section:
    found, run = report["provenance"], report["run"]
    environment = flat(found["environment"])
    parts: list[Child] = [
        facts([
            ("Recipe", run["recipe"]), ("Base model", run["model"]), ("Seed", None if found["seed"] is None else str(found["seed"])),
            ("Started", when(run["started"])), ("Finished", when(run["finished"])), ("Folder", run["folder"]),
        ]),
        tag("h3", "To run it again"),
        tag("pre", found["command"], class_="command") if found["command"] else tag("p", "The resolved recipe is not in the run folder.", class_="quiet"),
    ]  # fmt: skip
    if found["decisions"]:
        rows = [[d["name"], d["value"], d["why"], "; ".join(f"{k} {v}" for k, v in flat(d["measured"])) or None] for d in found["decisions"]]
        parts.append(table("Decisions made by measuring", ("Decision", "Taken", "Why", "Measured"), rows, words=(1, 2, 3)))
    if found["hashes"]:
        rows = [[name, tag("code", short(value))] for name, value in found["hashes"]]
        parts.append(folded("Hashes (sha256)", table("Hashes", ("Of", "sha256"), rows, words=(1,))))
    if environment:
        parts.append(folded("Environment", table("Environment", ("What", "Value"), [list(pair) for pair in environment], words=(1,), wide=False)))
    for name, title in (("resolved", "Resolved recipe: every value, and where it came from"), ("recipe", "Recipe as it was given")):
        if found[name] is not None:
            parts.append(folded(title, tag("pre", found[name], class_="file")))
    how = "Enough to make this run again: what was asked for, what was decided on the way and why, and on what machine."
    return Section("provenance", "Where it came from", how, join(*parts))
