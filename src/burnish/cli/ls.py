"""`burnish ls`: what there is."""

from __future__ import annotations

import re
import textwrap
from typing import Annotated

import typer

from burnish.cli import reply
from burnish.config.load import packaged
from burnish.config.provenance import read
from burnish.config.schema import SECTIONS
from burnish.core.errors import ConfigError
from burnish.core.metrics import METRICS
from burnish.core.table import TABLES, describe, did_you_mean

WIDTH = 100
SENTENCE = re.compile(r"(?<=[a-z0-9)]{3}[.]) (?=[A-Z])")  # `Dr. GRPO` ends none


def ls(
    kind: Annotated[str | None, typer.Argument(help="recipes, keys, metrics, or a kind of table.")] = None,
) -> None:
    """List recipes, rows of tables, keys of a recipe, metrics."""
    kinds = ["recipes", *TABLES, "keys", "metrics"]
    if kind is not None and kind not in kinds:
        message = f"there is no list of {kind!r}.{did_you_mean(kind, kinds)}"
        raise ConfigError(message, where="burnish ls", remedy=f"the lists: {', '.join(kinds)}")
    lists = {each: _lines(each) for each in ([kind] if kind else kinds[:-2])}
    text = "\n\n".join(_block(each, lines) for each, lines in lists.items())
    if kind is None:
        text += "\n\nOne of them in full: burnish show NAME. Keys of a recipe: burnish ls keys."
    reply(
        {each: [{"name": name, "about": about} for name, about in lines.items()] for each, lines in lists.items()}, text
    )


def _lines(kind: str) -> dict[str, str]:
    """Name -> what it is, in one line."""
    if kind == "recipes":
        texts = {name: path.read_text(encoding="utf-8") for name, path in packaged().items()}
        return {name: str((read(text, name).data or {}).get("about", "")) for name, text in texts.items()}
    if kind == "keys":
        fields = [(home, *field) for home, section in SECTIONS.items() for field in section.model_fields.items()]
        return {f"{home}.{name}".removeprefix("the recipe."): info.description or "" for home, name, info in fields}
    if kind == "metrics":
        return {name: f"{metric.meaning} ({metric.unit})" for name, metric in METRICS.items()}
    return {name: SENTENCE.split(row.summary)[0] for name, row in describe(kind).items()}


def _block(title: str, lines: dict[str, str]) -> str:
    wide = max(map(len, lines), default=0)
    short = {name: textwrap.shorten(about, WIDTH - wide - 4, placeholder=" ...") for name, about in lines.items()}
    return "\n".join([title, *(f"  {name:<{wide}}  {about}".rstrip() for name, about in short.items())])
