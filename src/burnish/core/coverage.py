"""What of the two post-training surveys runs here: the taxonomy's rows, and who claims each of them.

A row runs only where three things claim it: code, a test and a recipe or benchmark. A row of a table claims by
`About(taxonomy=...)`; assets/coverage/claims.tsv adds the test, the recipe, and the code that is no row of a table. That no
claim is empty (the code exists, the test is collected, the recipe says so) is held by tests/core/test_coverage.py.

In the taxonomy, A is arXiv:2502.21321 and B is arXiv:2503.06072.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from burnish.core.table import TABLES, describe

HERE = Path(__file__).resolve().parents[1] / "assets" / "coverage"
PRIORITIES = {"C": "core", "I": "important", "F": "frontier"}


@dataclass(frozen=True)
class Claim:
    """One line of claims.tsv.

    by      `kind/row` of a table, or `module:function`
    test    `tests/file.py::test_name`
    recipe  a packaged recipe such as `first_steps/quickstart`, or a file such as `benchmarks/sft.py`
    says    what stands in that file and uses the code: for a row of a table its name is in it
    """

    id: str
    by: str
    test: str
    recipe: str
    says: str


@dataclass(frozen=True)
class Row:
    """One row of the taxonomy and its claims; several are separated by a comma and a space."""

    id: str
    name: str
    priority: str
    runs: bool
    by: str | None
    test: str | None
    recipe: str | None


def _lines(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def claims() -> list[Claim]:
    """What claims.tsv says."""
    return [Claim(**line) for line in _lines(HERE / "claims.tsv")]


def table_rows() -> dict[str, tuple[str, ...]]:
    """`kind/row` -> the taxonomy ids it claims itself, over every table."""
    return {f"{kind}/{name}": row.about.taxonomy for kind in TABLES for name, row in describe(kind).items()}


def coverage() -> list[Row]:
    """Every row of the taxonomy in its order, and whether it runs."""
    known, found = table_rows(), claims()
    made: list[Row] = []
    for line in _lines(HERE / "taxonomy.tsv"):
        mine = [c for c in found if c.id == line["id"]]
        by = [row for row, ids in known.items() if line["id"] in ids] + [c.by for c in mine]
        parts = [", ".join(dict.fromkeys(p for p in part if p)) for part in (by, [c.test for c in mine], [c.recipe for c in mine])]
        runs = any(c.by and c.test and c.recipe for c in mine)
        made.append(Row(line["id"], line["name"], line["priority"], runs, *(part or None for part in parts)))
    return made
