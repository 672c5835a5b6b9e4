"""Every row of every table: what is read from its source is what the live function is."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from burnish.core.signature import ROOT, Parameter
from burnish.core.table import TABLES, Table, describe, load_row, load_table

CITED = (
    "method",
    "weights",
    "advantage",
    "ratio",
    "surrogate",
    "correction",
    "kl",
    "sequence_filters",
    "token_filters",
)  # tables of mathematics: each row names its paper, or says that there is none


def written(kind: str) -> bool:
    """True where every module of a table exists."""
    places = (ROOT.joinpath(*place.split(":")[0].split(".")).with_suffix(".py") for place in TABLES[kind])
    return all(place.exists() for place in places)


KINDS = [
    pytest.param(kind, marks=() if written(kind) else pytest.mark.skip(f"the {kind} table is not written yet"))
    for kind in TABLES
]


def live_parameters(function: Any) -> tuple[Parameter, ...]:
    """The keyword-only parameters as Python sees them, their annotations evaluated where they were written."""
    found: list[Parameter] = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            text = p.annotation if isinstance(p.annotation, str) else inspect.formatannotation(p.annotation)
            kind = eval(text, function.__globals__) if isinstance(p.annotation, str) else p.annotation
            required = p.default is p.empty
            found.append(Parameter(p.name, text, kind, required, None if required else p.default))
    return tuple(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_description_is_the_live_signature(kind: str) -> None:
    rows, table = describe(kind), load_table(kind)
    assert list(rows) == list(table)
    for name, row in rows.items():
        live = table[name]
        assert live is load_row(kind, name)
        if not callable(live) or not inspect.isroutine(live):
            assert row.summary, (
                f"{kind} {name}: an object is described by the string below it, or its module's docstring"
            )
            fields = dataclasses.fields(live) if dataclasses.is_dataclass(live) else ()
            settings = [f for f in fields if f.kw_only]
            assert [p.name for p in row.parameters] == [f.name for f in settings], f"{kind} {name}"
            assert {p.name: p.default for p in row.parameters} == {f.name: getattr(live, f.name) for f in settings}
            assert [p.annotation for p in row.parameters] == [ast.unparse(ast.parse(str(f.type))) for f in settings]
            assert all(getattr(live, fact) == value for fact, value in row.facts.items())
            continue
        found = live_parameters(live)
        assert [(p.name, p.type, p.required, p.default) for p in row.parameters] == [
            (p.name, p.type, p.required, p.default) for p in found
        ], f"{kind} {name}"
        assert [ast.unparse(ast.parse(p.annotation)) for p in found] == [p.annotation for p in row.parameters]
        assert row.doc == (inspect.getdoc(live) or "") and row.path == Path(inspect.getsourcefile(live) or "")
        assert row.line == inspect.getsourcelines(live)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_aliases_and_metadata_are_read_as_they_are(kind: str) -> None:
    rows = describe(kind)
    for place in TABLES[kind]:
        module, name = place.split(":")
        table: Table = getattr(importlib.import_module(module), name)
        assert table.kind == kind
        for row in table:
            assert rows[row].also == tuple(alias for alias, target in table.also.items() if target == row)
            assert table.about.get(row, rows[row].about) == rows[row].about


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_says_what_it_is_and_can_be_written_in_a_recipe(kind: str) -> None:
    for name, row in describe(kind).items():
        assert row.summary, f"{kind} {name} has no docstring"
        assert "name" not in {p.name for p in row.parameters}, f"{kind} {name}: `name` names the row itself"
        if kind in CITED:
            assert row.citation or "no paper" in row.doc, f"{kind} {name}: cite arXiv:..., or say (no paper)"
