"""docs/families.md has one row for every family the tests run, and says of each what the tests show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forest.tiny import PADDED, SHARE

PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*SHARE, *PADDED])
def test_every_family_has_one_row_that_says_how_it_runs(name: str) -> None:
    (row,) = (line for line in PAGE.splitlines() if line.startswith("|") and f"(`{name}`)" in line)
    family, special, runs, hidden, gradient, engine, tests = (cell.strip() for cell in row.strip("|").split("|"))
    assert family and special and tests
    if name in SHARE:
        assert runs.startswith("forest") and engine == "yes" and float(hidden) < 1e-5 and float(gradient) < 1e-5
    else:
        assert runs.startswith("padded:") and engine == "no" and not hidden and not gradient
