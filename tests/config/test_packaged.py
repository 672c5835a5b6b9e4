"""The recipes that come with burnish, against the real tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.config.check import check
from burnish.config.load import load, packaged, resolve
from burnish.config.provenance import read, write
from burnish.core.table import describe


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


ALGEBRA = sorted(name for name, row in describe("method").items() if {"advantage", "surrogate"} <= {p.name for p in row.parameters})


@pytest.mark.parametrize("row", ALGEBRA)
def test_every_policy_gradient_row_has_a_recipe_that_differs_from_grpos_by_what_it_says(row: str) -> None:
    """After the same supervised stage, on the same questions, to the same budget: what differs is the method and its own dials."""
    here, base = load(f"policy_gradient/{row}"), load("policy_gradient/grpo")
    assert check(here).ok and here.recipe.name == row
    before, stage = here.recipe.stages
    assert stage.method.name == row and stage.budget.tokens and stage.budget == base.recipe.stages[1].budget
    assert before == base.recipe.stages[0] and stage.data == base.recipe.stages[1].data and here.recipe.evals == base.recipe.evals
    published = {p.name: p.default for p in describe("method")[row].parameters}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in stage.method.params.items()} == published
    rollouts = stage.rollouts
    assert rollouts is not None and rollouts.group_size * stage.train.batch_rows in (256, 128)
