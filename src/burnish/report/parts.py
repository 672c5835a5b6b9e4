"""What the sections of the page are made of: sections, tables, facts, prose."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from burnish.report import units
from burnish.report.markup import Child, Markup, join, tag

LONGEST = 300  # characters of a value shown in a table
_JOINED = re.compile(r"(?<=\d) (?=(?:%|[kMGTPE]?FLOP\b|[kMGTPE]\b|[kMGT]?B\b|tokens?\b|points?\b|questions?\b|s\b|min\b|h\b))|(?<=\b[pn]) (?=[<=] )|(?<=\b[pn] [<=]) ")


@dataclass(frozen=True)
class Section:
    """`how` is the one sentence that says how to read it."""

    id: str
    title: str
    how: str
    content: Markup


def prose(words: str) -> str:
    """The same text with a number and its unit held on one line."""
    return _JOINED.sub("\u00a0", words)


def stage_classes(report: Mapping[str, Any]) -> dict[str, str]:
    """The colour class of every stage: grey for the base model, then one after the other."""
    names = [s["name"] for s in report["stages"]]
    return {name: "s0" if i == 0 else f"s{(i - 1) % 4 + 1}" for i, name in enumerate(names)}


def key(report: Mapping[str, Any]) -> Markup:
    """Which colour is which stage, of those that were evaluated."""
    shown = [s["name"] for s in report["stages"] if s["evals"]]
    return tag("p", [tag("span", name, class_=f"key {kind}") for name, kind in stage_classes(report).items() if name in shown], class_="keys")


def cell(value: Child) -> Child:
    """A value of a table; what is absent is said quietly."""
    return tag("span", units.ABSENT, class_="absent") if value is None or value == units.ABSENT else prose(value) if type(value) is str else value


def table(
    caption: str, heads: Sequence[str], rows: Sequence[Sequence[Child]], *, words: Sequence[int] = (), classes: Sequence[str] = (), wide: bool = True
) -> Markup:  # fmt: skip
    """A table whose first column heads its rows; columns in `words` are text, the others numbers.

    On a narrow page a `wide` one becomes a list, each value under the name of its column (the roles keep it a table for
    screen readers); any other scrolls inside itself.
    """
    kinds = [None if i == 0 or i in words else "number" for i in range(len(heads))]
    top = tag("tr", [tag("th", name, scope="col", class_=kind, role="columnheader") for name, kind in zip(heads, kinds)], role="row")
    body = [
        tag("tr", [
            tag("th", cell(value), scope="row", role="rowheader") if i == 0 else tag("td", cell(value), class_=kinds[i], role="cell", data_head=heads[i])
            for i, value in enumerate(row)
        ], class_=(classes[r] or None) if classes else None, role="row")
        for r, row in enumerate(rows)
    ]  # fmt: skip
    made = tag("table", tag("caption", caption), tag("thead", top, role="rowgroup"), tag("tbody", body, role="rowgroup"), class_="wide" if wide else None, role="table")
    return tag("div", made, class_="scroll", tabindex=0, role="region", aria_label=caption)


def facts(pairs: Sequence[tuple[str, Child]]) -> Markup:
    """Names and values, one below the other."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", cell(value))) for name, value in pairs], class_="facts")


def folded(title: str, *content: Child, open_: bool = False, class_: str | None = None) -> Markup:
    return tag("details", tag("summary", title), *content, open=open_, class_=class_)


def quoted(words: str, cut: int) -> Markup:
    """A text as it stands, and how much of it was cut."""
    return join(tag("pre", words, dir="auto"), tag("p", f"{units.many(cut, 'character')} more not shown", class_="quiet") if cut else None)


def within(rows: Sequence[Any], draw: Callable[[Any], Markup], budget: int) -> tuple[list[Markup], int]:
    """As many of the rows as fit the budget of bytes, and how many do not."""
    kept: list[Markup] = []
    for row in rows:
        drawn = draw(row)
        budget -= len(drawn.encode())
        if budget < 0:
            break
        kept.append(drawn)
    return kept, len(rows) - len(kept)


def short(value: Any) -> str:
    """A value of unknown kind on one line."""
    said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return said if len(said) <= LONGEST else said[: LONGEST - 1] + "…"


def flat(values: Mapping[str, Any], under: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, value)."""
    found: list[tuple[str, str]] = []
    for name, value in list(values.items())[:100]:
        called = f"{under}.{name}" if under else str(name)
        found += flat(value, called[:LONGEST]) if isinstance(value, Mapping) and value and under.count(".") < 3 else [(called[:LONGEST], short(value))]
    return found[:200]


def when(text: str | None) -> str:
    """'2026-11-24T02:40:11+0000' -> '24 Nov 2026, 02:40 UTC+00:00'; what is no date is shown as it is."""
    if text is None:
        return units.ABSENT
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text[:40]
    return f"{moment.day} {moment:%b %Y, %H:%M} {moment.tzname() or ''}".strip()
