"""`burnish coverage`: which methods of the two post-training surveys run here, with test and recipe."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Annotated

import typer

from burnish.cli import reply
from burnish.core.coverage import PRIORITIES, Row
from burnish.core.coverage import coverage as rows_of


def coverage(
    missing: Annotated[bool, typer.Option("--missing", help="Only what does not run yet.")] = False,
) -> None:
    """List the methods of the surveys: what runs, by which code, test and recipe."""
    rows = rows_of()
    shown = [row for row in rows if not (missing and row.runs)]
    reply([asdict(row) for row in shown], "\n".join([*map(_line, shown), "", summary(rows)]))


def summary(rows: list[Row]) -> str:
    """`12 of 143 core, 1 of 138 important, 0 of 37 frontier rows run; ...`"""
    counts = [
        f"{sum(r.runs for r in rows if r.priority == p)} of {sum(r.priority == p for r in rows)} {word}" for p, word in PRIORITIES.items()
    ]  # fmt: skip
    begun = sum(not r.runs and r.by is not None for r in rows)
    return f"{', '.join(counts)} rows run" + (f"; {begun} more have code and lack a test or a recipe" if begun else "")


def _line(row: Row) -> str:
    name = row.name if len(row.name) <= 46 else row.name[:45] + "\u2026"
    state = "runs" if row.runs else "begun" if row.by else "-"
    by = textwrap.shorten(row.by or "", 58, placeholder=" ...")
    return f"{row.id:<4}{row.priority}  {state:<6}{name:<47} {by}".rstrip()
