"""`burnish show`: one thing, in full."""

from __future__ import annotations

import textwrap
from typing import Annotated, Any

import typer

from burnish.cli import reply
from burnish.config.load import packaged
from burnish.core.errors import ConfigError
from burnish.core.metrics import METRICS
from burnish.core.table import (
    TABLES,
    USER_ROW,
    RowDescription,
    describe,
    describe_row,
    did_you_mean,
    differences,
    shown,
    wanted,
)


def show(
    name: Annotated[str, typer.Argument(help="A recipe, a row of a table, kind/row, a metric, or file.py:function.")],
    vs: Annotated[str | None, typer.Option("--vs", help="Another row of the same table: show what differs.")] = None,
) -> None:
    """Show one recipe, row of a table, metric or function in full; or how two rows differ."""
    if vs is not None:
        _compare(name, vs)
    elif name in packaged():
        text = packaged()[name].read_text(encoding="utf-8")
        reply({"recipe": name, "text": text}, text.rstrip("\n"))
    elif name in METRICS:
        metric = METRICS[name]
        text = f"{name} (metric, in {metric.unit}; better: {metric.better})\n  {metric.meaning}"
        reply({"metric": name, **vars(metric)}, text)
    else:
        rows = _rows(name)
        reply({"rows": [_plain(row) for row in rows]}, "\n\n".join(map(_page, rows)))


def _compare(name: str, other: str) -> None:
    """What two rows of one table set differently. Raises ConfigError where they share no table."""
    pairs = [(a, b) for a in _rows(name) for b in _rows(other) if a.kind == b.kind]
    if not pairs:
        message = f"{name!r} and {other!r} are not rows of one table"
        raise ConfigError(message, where="burnish show --vs", remedy="what there is: burnish ls")
    blocks: list[str] = []
    plain: list[dict[str, Any]] = []
    for a, b in pairs:
        found = differences(a, b)
        cells = [("", a.name, b.name), *((key, _value(x), _value(y)) for key, (x, y) in found.items())]
        first, second = (max(len(cell[i]) for cell in cells) for i in (0, 1))
        lines = [f"  {key:<{first}}  {x:<{second}}  {y}".rstrip() for key, x, y in cells]
        nothing = [] if found else ["  They set the same."]
        blocks.append("\n".join([f"{a.name} and {b.name} ({a.kind})", *lines, *nothing]))
        values = {key: [None if v is ... else v for v in pair] for key, pair in found.items()}
        plain.append({"kind": a.kind, "rows": [a.name, b.name], "differences": values})
    reply({"comparisons": plain}, "\n\n".join(blocks))


def _value(value: Any) -> str:
    """A default as a recipe would write it."""
    if value is ...:
        return "takes none"
    return "its own default" if value is None else value if isinstance(value, str) else shown(value)


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
        "bias": row.about.bias,
        "also": row.also,
        "source": f"{row.path}:{row.line}",
        "sha256": row.sha256,
    }


def _page(row: RowDescription) -> str:
    lines = [f"{row.name} ({row.kind})", textwrap.indent(row.doc.strip(), "  "), ""]
    wide = max((len(p.name) for p in row.parameters), default=0)
    for p in row.parameters:
        value = "needed" if p.required else f"default {p.default!r}"
        names = ", ".join(describe(p.name)) if p.name in TABLES else ""
        what = f"one of {names}" if names and p.type is str else f"some of {names}" if names else wanted(p.type)
        lines.append(f"  {p.name:<{wide}}  {what}; {value}")
    if not row.parameters:
        lines.append("  It takes no parameters.")
    lines.append("")
    if row.citation:
        lines.append(f"  paper   {row.citation}" + (f" ({row.about.year})" if row.about.year else ""))
    if row.about.bias:
        lines.append(f"  bias    {row.about.bias}")
    if row.also:
        lines.append(f"  also    {', '.join(row.also)}")
    lines.append(f"  source  {row.path}:{row.line}")
    return "\n".join(line.rstrip() for line in lines)
