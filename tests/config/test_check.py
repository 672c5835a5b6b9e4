"""Contradictions with their arithmetic, missing files, and the numbers of what would run."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.config.check import check
from burnish.config.contradictions import contradictions
from burnish.config.faults import RecipeError
from burnish.config.load import load, resolve
from burnish.config.provenance import Resolved, read
from burnish.config.schema import Recipe
from tests.config.tables import tables  # noqa: F401
from tests.config.test_load import GOOD, recipe

pytestmark = pytest.mark.usefixtures("tables")
DATA = "data: {task: sums, rows: 512}"


@pytest.mark.parametrize(
    ("old", "new", "where", "message"),
    [
        ("steps: 8", "steps: 8\n      epochs: 2", 16, "both steps (8) and epochs (2): each says when to stop"),
        ("      steps: 8\n", "", 14, "neither steps nor epochs: the stage would do nothing"),
        ("batch_rows: 64", "batch_rows: 600", 16, "a step takes 600 rows and the data has 512: 512 < 600"),
        (
            "batch_rows: 64",
            "batch_rows: 500\n      validate_every: 4\n      validation_rows: 20",
            16,
            "a step takes 500 rows and the data has 512 less 20 held out for validation: 492 < 500",
        ),
        (
            "steps: 8",
            "steps: 8\n      validate_every: 4",
            16,
            "there are no rows to validate on: validation_rows is null",
        ),
        ("rows: 100", "rows: 100\n    levels: [2, 2]", 8, "[2, 2] names a level twice"),
        ("vote:4", "sample:4", 8, "sample:4: 'sample' has no parameter 'n'. It takes no parameters."),
        ("vote:4", "vote:4@prm", 8, "vote:4@prm: 'vote' has no parameter 'scorer'. It takes n=16."),
        ("vote:4", "best_of:4", 8, "best_of:4: 'best_of' needs 'scorer': one of rule, prm"),
        ("vote:4", "best_of:4@verifier", 8, "best_of:4@verifier: 'verifier' is not a scorer. Did you mean 'rule'?"),
        ("vote:4", "best_of:4@rule(min)", 8, "best_of:4@rule(min): 'rule' has no parameter 'aggregation'"),
        ("vote:4", "best_of:4@prm(max)", 8, "best_of:4@prm(max): 'max' given, wanted one of min, last"),
        ("rows: 100", "rows: 100\n    levels: [2, 9]", 8, "'sums' has no level 9; it has 2, 3, 4"),
        (DATA, "data: {task: sums, rows: 512, file: a.jsonl}", 13, "both task and file"),
        (DATA, "data: {rows: 512}", 13, "neither task nor file"),
        (DATA, "data: {task: sums}", 13, "makes as many rows as asked for, and none are"),
        (DATA, "data: {file: a.jsonl, rows: 512}", 13, "rows is for a task, and this is a file: it would do nothing"),
        (DATA, "data: {file: a.jsonl, fold: test}", 13, "fold is for a task, and this is a file"),
        (DATA, "data: {task: sums, rows: 512, limit: 9}", 13, "limit is for a file, and this is a task"),
        (DATA, "data: {task: sums, rows: 512, columns: {a: b}}", 13, "columns is for a file, and this is a task"),
        (DATA, "data: {task: sums, rows: 512, fold: test}", 13, "trains on the test fold of 'sums', which eval 'sums'"),
        ("    rows: 100\n", "", 5, "task 'sums' makes as many rows as asked for, and none are"),
        ("    task: sums\n    rows: 100\n", "", 5, "neither task nor file"),
        ("temperature: 0.7", "temperature: 0", 9, "4 samples at temperature 0 are 4 times the same text"),
        ("temperature: 0.7", "temperature: [0, 1]\n    validation_rows: 9", 9, "temperature 0 with vote:4"),
        (
            "temperature: 0.7",
            "temperature: [0.5, 1]",
            9,
            "a list is chosen from on validation rows, and none are asked",
        ),
        (
            "temperature: 0.7",
            "validation_rows: 9",
            9,
            "validation_rows chooses among temperatures, and there is one: 1",
        ),
        (
            "temperature: 0.7",
            "temperature: [0.5, 1]\n    validation_rows: 9\n    fold: validation",
            9,
            "the temperature would be chosen on the fold it is judged on",
        ),
        ("temperature: 0.7", "temperature: [0.5, 0.5]\n    validation_rows: 9", 9, "names a temperature twice"),
        (
            "[greedy, vote:4]\n    temperature: 0.7",
            "[greedy]\n    temperature: [1, 2]\n    validation_rows: 3",
            9,
            "nothing to choose",
        ),
        ("vote:4", "vote:4, vote:4", 8, "vote:4 is listed twice"),
        (
            "vote:4",
            "best_of:4@rule",
            8,
            "the rule of 'sums' reads the gold answer, so best_of:4@rule could not be used",
        ),
        ("task: sums\n", "task: words\n", 8, "'words' has no answer key to count votes by"),
        (
            "method: sft",
            "method: sft\n    evaluate: [sum]",
            13,
            "there is no eval 'sum'. Did you mean 'sums'? There are: sums",
        ),
        ("method: sft", "method: sft\n    evaluate: [sums, sums]", 13, "eval 'sums' is named twice"),
        ("name: sft", "name: base", 11, "'base' is what reports call the model before the first stage"),
        ("model: spark", "model: spark\nreport: {primary: {eval: x}}", 4, "there is no eval 'x'"),
        (
            "model: spark",
            "model: spark\nreport: {primary: {eval: sums, strategy: vote:8}}",
            4,
            "'vote:8' is not a strategy of eval 'sums', which has greedy, vote:4",
        ),
    ],
)
def test_contradictions(old: str, new: str, where: int, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(old, new)
    told = [f"{f.where}  {f.message}" for f in caught.value.faults]
    assert any(line.startswith(f"my.yaml:{where}  ") and message in line for line in told), told


def test_stages_of_one_name_and_nothing_to_do() -> None:
    twice = GOOD + GOOD[GOOD.index("  - name: sft") :]
    with pytest.raises(RecipeError, match=r"my.yaml:18  stages.sft.name: stage 2 has the name 'sft' of stage 1"):
        resolve(read(twice, "my.yaml"))
    with pytest.raises(RecipeError, match="neither stages nor evals"):
        resolve(read("burnish: 1\nname: x\nmodel: spark\n", "my.yaml"))


def test_training_and_judging_by_one_file_however_it_is_written() -> None:
    Path("sub").mkdir()
    Path("rows.jsonl").write_text("{}\n")
    text = GOOD.replace("task: sums\n    rows: 100", "file: rows.jsonl").replace(
        DATA, "data: {file: sub/../rows.jsonl}"
    )
    with pytest.raises(RecipeError, match=r"trains on sub/../rows.jsonl, the file eval 'sums' is judged on"):
        resolve(read(text, "my.yaml"))


def test_a_file_lends_no_rule_to_choose_by() -> None:
    text = GOOD.replace("task: sums\n    rows: 100", "file: rows.jsonl").replace("vote:4", "best_of:4@rule")
    with pytest.raises(RecipeError, match=r"the rule of 'rows.jsonl' reads the gold answer, so best_of:4@rule could not"):
        resolve(read(text, "my.yaml"))


def test_a_file_gives_no_validation_fold() -> None:
    text = GOOD.replace("task: sums\n    rows: 100", "file: rows.jsonl").replace(
        "0.7", "[0.5, 1.0]\n    validation_rows: 3"
    )
    with pytest.raises(RecipeError, match="a file has no validation fold"):
        resolve(read(text, "my.yaml"))


def test_a_recipe_built_in_python_meets_the_same_contradictions() -> None:
    bare = Recipe.model_validate({"burnish": 1, "name": "x", "model": "spark"})
    assert [message for _, message, _ in contradictions(bare)] == ["neither stages nor evals: there is nothing to run"]


def test_derived_numbers() -> None:
    found = check(recipe("steps: 8", "steps: 8\n      max_tokens: 100\n      checkpoint_every: 9"))
    (stage,), (judged,) = found.stages, found.evals
    assert (stage.rows, stage.rows_per_step, stage.steps, stage.epochs) == (512, 64, 8, 1.0)
    assert stage.tokens_at_most == 8 * 64 * 100
    assert (judged.rows, judged.times) == (100, 2)
    assert judged.sampled_tokens_at_most == 2 * 100 * (1 + 4) * 256
    assert found.ok and [f.level for f in found.findings] == ["note"]
    assert "every 9 steps is never before the end of 8" in found.findings[0].message


def test_epochs_become_steps_that_show_every_row() -> None:
    found = check(recipe("steps: 8", "epochs: 1.5\n      validate_every: 2\n      validation_rows: 12"))
    assert found.stages[0].rows == 500 and found.stages[0].steps == 12  # ceil(750 / 64)


def test_choosing_a_temperature_is_counted() -> None:
    found = check(recipe("temperature: 0.7", "temperature: [0.5, 1.0]\n    validation_rows: 10"))
    assert found.evals[0].sampled_tokens_at_most == 2 * 256 * (100 * 5 + 10 * 2 * 4)


def own_data(path: str) -> Resolved:
    return recipe(DATA, f"data: {{file: {path}, limit: 100}}")


def test_a_missing_file_is_a_finding_with_its_line_and_where_it_was_looked_for() -> None:
    found = check(own_data("rows.jsonl"))
    assert not found.ok
    with pytest.raises(RecipeError) as caught:
        found.refuse()
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("my.yaml:13  stages.sft.data.0.file: file not found: rows.jsonl, seen from /")


def test_a_file_that_lies_beside_the_recipe_is_pointed_at() -> None:
    Path("sub").mkdir()
    Path("sub/rows.jsonl").write_text("{}\n")
    Path("sub/my.yaml").write_text(GOOD.replace(DATA, "data: {file: rows.jsonl}"))
    (finding,) = check(load("sub/my.yaml")).findings
    assert finding.remedy == "there is one beside the recipe: type sub/rows.jsonl"


def test_rows_of_a_jsonl_file_are_counted_up_to_the_limit() -> None:
    Path("rows.jsonl").write_text("{}\n\n" * 80)
    assert check(own_data("rows.jsonl")).stages[0].rows == 80
    Path("rows.jsonl").write_text("{}\n" * 500)
    assert check(own_data("rows.jsonl")).stages[0].rows == 100
    Path("rows.jsonl").write_text("{}\n" * 10)
    (finding,) = check(own_data("rows.jsonl")).findings
    assert finding.level == "error" and finding.message == "a step takes 64 rows and the data has 10"
    Path("rows.csv").write_text("a\n1\n")
    assert check(own_data("rows.csv")).stages[0].rows is None


def test_a_local_model_folder_must_exist_and_greedy_alone_is_noted() -> None:
    found = check(recipe("model: spark", "model: ./models/x"))
    assert found.findings[0].key == "model" and "folder not found" in found.findings[0].message
    found = check(recipe("[greedy, vote:4]", "[greedy]"))
    assert found.ok and "greedy takes neither temperature" in found.findings[0].message


def test_rows_a_stage_holds_out_are_an_eval_of_their_own() -> None:
    text = GOOD.replace("steps: 8", "steps: 8\n      validation_rows: 12")
    primary = "report: {primary: {eval: held_out, strategy: likelihood}}\n"
    found = resolve(read(text + primary, "my.yaml"), ["stages.sft.evaluate=[held_out]"])
    assert found.recipe.held_out == {"held_out": "sft"} and check(found).stages[0].held_out == 12
    with pytest.raises(RecipeError, match="'greedy' is not a strategy of eval 'held_out', which has likelihood"):
        resolve(read(text + primary.replace("likelihood", "greedy"), "my.yaml"))
    with pytest.raises(
        RecipeError, match="'held_out' is what the likelihood of the rows held out of stage 'sft' is called"
    ):
        resolve(read(text.replace("  sums:\n", "  held_out:\n"), "my.yaml"))


def test_a_strategy_without_a_number_is_counted_by_its_rows_default() -> None:
    assert check(recipe("vote:4", "vote")).evals[0].sampled_tokens_at_most == 2 * 100 * (1 + 16) * 256
