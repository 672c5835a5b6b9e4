"""The recipes that come with burnish, against the real tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.config.check import check
from burnish.config.load import load, packaged, resolve
from burnish.config.provenance import read, write


@pytest.mark.parametrize("name", packaged())
def test_it_loads_and_its_resolved_form_is_the_same_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = load(name)
    assert found.recipe.about and resolve(read(write(found), "resolved.yaml")).recipe == found.recipe
    assert all(f.message.startswith("file not found") for f in check(found).findings if f.level == "error")


def test_the_first_step_needs_nothing_but_what_is_shipped() -> None:
    checked = check(load("first_steps/quickstart"))
    assert checked.ok and not checked.findings


def test_own_data_runs_once_its_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not check(load("first_steps/own_data")).ok
    Path("mine.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 100)
    checked = check(load("first_steps/own_data", ["stages.sft.data.file=mine.jsonl"]))
    (plan,) = checked.stages
    assert checked.ok and plan.rows is not None and plan.rows + plan.held_out == 100 and plan.steps


def test_the_row_shapes_of_the_schema_are_those_the_data_layer_learns_from() -> None:
    from typing import get_args

    from burnish.config.schema import RowShape
    from burnish.data.formats import FORMATS

    assert set(get_args(RowShape)) - {"auto"} == {form.name for form in FORMATS if not form.instead}
