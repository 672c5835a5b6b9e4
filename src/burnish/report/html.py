"""The report as one HTML page: no file beside it, no network, no script or style but its own (held by their hashes).

The page is a column of sections, each with a heading, a sentence on how to read it, and its content beside them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from burnish.report import evidence, learning, material, units
from burnish.report.markup import Markup, join, tag
from burnish.report.parts import Section, prose, when

HERE = Path(__file__).parent
LARGEST = 5_000_000  # bytes of the page; samples and mask rows give way first
Report = Mapping[str, Any]


def render(report: Report) -> str:
    """The whole page. Everything in `report` is treated as hostile text."""
    style, script = (HERE / "style.css").read_text(encoding="utf-8"), (HERE / "script.js").read_text(encoding="utf-8")
    made = (
        evidence.accuracy(report), evidence.price(report), evidence.compared(report), evidence.training(report), learning.rollouts(report),
        learning.groups(report), material.data(report),
        material.samples(report), evidence.ledger(report), material.provenance(report),
    )  # fmt: skip
    shown = _fitting([s for s in made if s is not None], LARGEST - len(style) - len(script) - 500_000)
    body = tag(
        "body", _head(report), tag("main", _warnings(report), _contents(shown), [_section(s) for s in shown]), _foot(report),
        tag("script", Markup(script)),
    )  # fmt: skip
    title = f"{report['run']['name']}: {report['verdict']['headline']}"
    head = tag(
        "head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"), tag("meta", name="referrer", content="no-referrer"),
        tag("meta", name="color-scheme", content="light dark"), tag("title", title), tag("style", Markup(style)),
    )  # fmt: skip
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _fitting(sections: list[Section], budget: int) -> list[Section]:
    """The sections, the largest of them without their content where all together are too large for one page."""
    kept = list(sections)
    while sum(len(s.content.encode()) for s in kept) > budget:
        at = max(range(len(kept)), key=lambda i: len(kept[i].content))
        said = tag("p", "Left out to keep this file small; it is in report.json.", class_="quiet")
        kept[at] = replace(kept[at], content=said)
    return kept


def policy(style: str, script: str) -> str:
    """Content-Security-Policy: nothing is loaded, and only this style and this script apply, whatever else is in the page."""

    def sha(content: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"

    return f"default-src 'none'; style-src {sha(style)}; script-src {sha(script)}; base-uri 'none'; form-action 'none'"


def _head(report: Report) -> Markup:
    run, verdict = report["run"], report["verdict"]
    ended = run["finished"] if run["state"] not in ("running", "crashed") else None
    dates = run["state"] + (f", {when(ended)}" if ended else f", started {when(run['started'])}" if run["started"] else "")
    return tag(
        "header",
        tag("p", "burnish run report", tag("b", run["name"]), tag("span", dates), class_="crumb"),
        tag("h1", _headline(verdict)),
        tag("p", prose(verdict["sentence"]), class_="lead") if verdict["primary"] else None,
        tag("p", run["about"], class_="about") if run["about"] else None,
        _figures(verdict),
    )  # fmt: skip


def _headline(verdict: Mapping[str, Any]) -> Markup:
    """The headline with its outcome in the colour of good or bad news."""
    word, colon, rest = verdict["headline"].partition(":")
    if not colon or verdict["outcome"] not in ("improved", "worse"):
        return join(prose(verdict["headline"]))
    return join(tag("span", word, class_="good" if verdict["outcome"] == "improved" else "bad"), prose(f"{colon}{rest}"))


def _figures(verdict: Mapping[str, Any]) -> Markup | None:
    """The headline numbers."""
    primary, cost = verdict["primary"], verdict["cost"]
    if not primary:
        return None
    training, answer, before = cost["training"], cost["answer"], cost["base_answer"]
    likelihood = primary["metric"] == "likelihood"
    n = f"{units.many(primary['n'], 'row' if likelihood else 'question')} of {primary['eval']}, {primary['strategy']}"
    entries = [
        ("Base model", units.percent(primary["base"]), f"95 % interval {units.interval(primary['base_interval'])}"),
        (f"After {primary['stage']}", units.percent(primary["value"]), f"95 % interval {units.interval(primary['value_interval'])}"),
        ("Difference", f"{units.points(primary['difference'])} points", f"{units.points_interval(primary['interval'])}; {units.probability(primary['p'])}; {n}"),
        ("Training cost", units.flops(training["executed_flops"]), f"{units.tokens(training['tokens'])}, {units.duration(training['seconds'])}"),
        ("Cost of an answer", units.flops(answer["executed_flops"]),
         f"{units.tokens(answer['sampled_tokens'])} sampled; before {units.flops(before['executed_flops'])}, {units.tokens(before['sampled_tokens'])}"),
    ][: 4 if likelihood else 5]  # fmt: skip
    return tag(
        "dl", [tag("div", tag("dt", name), tag("dd", prose(value), class_="figure"), tag("dd", prose(more), class_="more")) for name, value, more in entries],
        class_="figures",
    )  # fmt: skip


def _warnings(report: Report) -> Markup:
    found = report["warnings"]
    if not found:
        return tag("p", "Nothing was found that speaks against these numbers.", class_="quiet", id="warnings")
    items = [tag("li", tag("b", w["level"]), tag("span", prose(w["text"])), class_=w["level"]) for w in found]
    return tag("div", tag("h2", "Before you believe it"), tag("ul", items), class_="warnings", id="warnings")


def _contents(sections: list[Section]) -> Markup:
    return tag("nav", [tag("a", s.title, href=f"#{s.id}") for s in sections], aria_label="Contents")


def _section(section: Section) -> Markup:
    side = tag("div", tag("h2", section.title), tag("p", prose(section.how), class_="how"), class_="side")
    return tag("section", side, tag("div", section.content, class_="content"), id=section.id)


def _foot(report: Report) -> Markup:
    said = f"Written by burnish {report['burnish']} from the files of {report['run']['folder']}. The same numbers for programs: report.json."
    return tag("footer", tag("p", join(said)))
