"""`burnish show`: one thing, in full."""

from __future__ import annotations

import textwrap
from typing import Annotated, Any

import typer

from burnish.cli import reply
from burnish.config.load import packaged
from burnish.core.errors import ConfigError
from burnish.core.metrics import METRICS
from burnish.core.table import TABLES, USER_ROW, RowDescription, describe, describe_row, did_you_mean, wanted


def show(
    name: Annotated[str, typer.Argument(help="A recipe, a row of a table, kind/row, a metric, or file.py:function.")],
) -> None:
    """Show one recipe, row of a table, metric or function in full."""
    if name in packaged():
        text = packaged()[name].read_text(encoding="utf-8")
        reply({"recipe": name, "text": text}, text.rstrip("\n"))
    elif name in METRICS:
        metric = METRICS[name]
        text = f"{name} (metric, in {metric.unit}; better: {metric.better})\n  {metric.meaning}"
        reply({"metric": name, **vars(metric)}, text)
    else:
        rows = _rows(name)
        reply({"rows": [_plain(row) for row in rows]}, "\n\n".join(map(_page, rows)))


def _rows(name: str) -> list[RowDescription]:
    """Every row of that name. Raises ConfigError with did-you-mean."""
    if USER_ROW.fullmatch(name):
        return [describe_row("your own function", name)]
    kind, slash, word = name.rpartition("/")
    if slash and kind in TABLES:
        return [describe_row(kind, word)]
    tables = {kind: describe(kind) for kind in TABLES}
    if found := [rows[name] for rows in tables.values() if name in rows]:
        return found
    aliases = {alias: row.name for rows in tables.values() for row in rows.values() for alias in row.also}
    short = {recipe.rsplit("/", 1)[-1]: recipe for recipe in packaged()}
    meant = {**short, **aliases}.get(name)
    names = [*(row for rows in tables.values() for row in rows), *packaged(), *METRICS]
    hint = f" Did you mean {meant!r}?" if meant else did_you_mean(name, names)
    raise ConfigError(f"there is no {name!r}.{hint}", where="burnish show", remedy="what there is: burnish ls")


def _plain(row: RowDescription) -> dict[str, Any]:
    parameters = [
        {"name": p.name, "type": p.annotation, "required": p.required, "default": p.default} for p in row.parameters
    ]
    return {
        "kind": row.kind,
        "name": row.name,
        "about": row.summary,
        "parameters": parameters,
        "documentation": row.doc,
        "paper": row.citation,
        "year": row.about.year,
        "taxonomy": row.about.taxonomy,
        "also": row.also,
        "source": f"{row.path}:{row.line}",
        "sha256": row.sha256,
    }


def _page(row: RowDescription) -> str:
    lines = [f"{row.name} ({row.kind})", textwrap.indent(row.doc.strip(), "  "), ""]
    wide = max((len(p.name) for p in row.parameters), default=0)
    for p in row.parameters:
        value = "needed" if p.required else f"default {p.default!r}"
        what = f"one of {', '.join(describe(p.name))}" if p.name in TABLES and p.type is str else wanted(p.type)
        lines.append(f"  {p.name:<{wide}}  {what}; {value}")
    if not row.parameters:
        lines.append("  It takes no parameters.")
    lines.append("")
    if row.citation:
        lines.append(f"  paper   {row.citation}" + (f" ({row.about.year})" if row.about.year else ""))
    if row.also:
        lines.append(f"  also    {', '.join(row.also)}")
    lines.append(f"  source  {row.path}:{row.line}")
    return "\n".join(line.rstrip() for line in lines)
