"""Reading a recipe: every mistake is told once, with its place, what was wanted and what to type."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.config.faults import RecipeError
from burnish.config.load import load, packaged, resolve
from burnish.config.provenance import Resolved, read
from burnish.core.errors import BurnishError, ConfigError
from tests.config.tables import tables  # noqa: F401

GOOD = """\
burnish: 1
name: my-run
model: spark
evals:
  sums:
    task: sums
    rows: 100
    strategies: [greedy, vote:4]
    temperature: 0.7
stages:
  - name: sft
    method: sft
    data: {task: sums, rows: 512}
    train:
      steps: 8
      batch_rows: 64
      learning_rate: 1e-3
"""

pytestmark = pytest.mark.usefixtures("tables")


def recipe(old: str = "", new: str = "", *overrides: str) -> Resolved:
    assert old in GOOD
    return resolve(read(GOOD.replace(old, new, 1) if old else GOOD, "my.yaml"), overrides)


def faults(old: str = "", new: str = "", *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe(old, new, *overrides)
    assert caught.value.exit_code == 2
    return [f"{f.where}  {f.message} | {f.remedy}" for f in caught.value.faults]


def test_a_good_recipe() -> None:
    found = recipe()
    (stage,) = found.recipe.stages
    assert stage.method.name == "sft" and stage.method.params == {"mask": "completion", "weights": "token_mean"}
    assert stage.train.learning_rate == 1e-3 and stage.train.schedule.params == {"warmup": 0.0}
    assert stage.data[0].task == "sums" and stage.adapter is None and stage.evaluate is None
    assert found.recipe.evals["sums"].strategies == ("greedy", "vote:4")
    assert found.text == GOOD


def test_short_forms_mean_the_long_ones() -> None:
    long = recipe("method: sft", "method: {name: sft}")
    assert long.recipe == recipe().recipe
    listed = recipe("data: {task: sums, rows: 512}", "data:\n      - task: sums\n        rows: 512")
    assert listed.recipe == recipe().recipe


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("steps: 8", "stepz: 8", "my.yaml:15  stages.sft.train.stepz: no such key. Did you mean 'steps'?"),
        ("learning_rate", "lr", "my.yaml:17  stages.sft.train.lr: no such key. Did you mean 'learning_rate'?"),
        ("1e-3", "fast", "stages.sft.train.learning_rate: 'fast' given, wanted the peak step size, a number above 0"),
        ("1e-3", "0", "stages.sft.train.learning_rate: 0 given, wanted the peak step size, a number above 0"),
        ("1e-3", ".inf", "stages.sft.train.learning_rate: Infinity given, wanted the peak step size"),
        ("1e-3", ".nan", "stages.sft.train.learning_rate: NaN given, wanted the peak step size"),
        ("1e-3", "1e999", "stages.sft.train.learning_rate: Infinity given, wanted the peak step size"),
        ("steps: 8", "steps: 8.5", "stages.sft.train.steps: 8.5 given, wanted a whole number"),
        ("steps: 8", "steps: '8'", "wanted a whole number of optimiser steps above 0 | remove the quotes: steps: 8"),
        ("steps: 8", "steps: yes", "stages.sft.train.steps: yes given, wanted a whole number"),
        ("steps: 8", "steps: 010", "my.yaml:15  stages.0.train.steps: YAML reads '010' as a number in another base"),
        ("1e-3", "010", "stages.0.train.learning_rate: YAML reads '010' as a number in another base"),
        ("steps: 8", "steps: 1:30", "stages.0.train.steps: YAML reads '1:30' as a number in another base"),
        (
            "model: spark",
            "model: no",
            'no without quotes is the truth value false to YAML, wanted text | type model: "no"',
        ),
        ("model: spark", "model: 2024", '2024 without quotes is a number to YAML, wanted text | type model: "2024"'),
        (
            "model: spark\n",
            "",
            "model: is missing, wanted a bundled model, a local folder or a hub id | add model: spark",
        ),
        ("model: spark", "model:", "my.yaml:3  model: null given, wanted a bundled model"),
        ("name: my-run", "name: ../../x", "name: '../../x' cannot name a folder"),
        ("name: my-run", "name: CON", "name: 'CON' cannot name a folder"),
        ("name: my-run", f"name: {'x' * 300}", "cannot name a folder"),
        ("  sums:\n", "  Sums/2:\n", "evals.Sums/2: 'Sums/2' cannot name a folder"),
        ("method: sft", "method: {name: simpo, gama: 1}", "'simpo' has no parameter 'gama'. Did you mean 'gamma'?"),
        ("method: sft", "method: simpoo", "stages.sft.method.name: 'simpoo' is not a method. Did you mean 'simpo'?"),
        ("method: sft", "method: [sft]", 'stages.sft.method: ["sft"] given, wanted a method, or {name: sft, ...}'),
        ("method: sft", "method: {beta: 2}", "stages.sft.method.name: is missing"),
        ("task: sums, rows: 512", "task: sum, rows: 512", "data.0.task: 'sum' is not a task. Did you mean 'sums'?"),
        ("vote:4", "self_consistency:4", "strategies.1: 'self_consistency' is not a strategy. Did you mean 'vote'?"),
        ("vote:4", "vote 4", "my.yaml:8  evals.sums.strategies.1: 'vote 4' is not a strategy | type vote:4"),
        ("temperature: 0.7", "temperature: -1", "temperature: -1 given, wanted a number, 0 or more, or a list"),
        ("temperature: 0.7", "temperature: [0.1, x]", "evals.sums.temperature.1: 'x' given, wanted a number"),
        ("temperature: 0.7", "temperature: {a: 1}", 'evals.sums.temperature: {"a": 1} given, wanted a number'),
        (
            "rows: 100",
            "rows: 100\n    fold: train",
            "'train' given, wanted test or validation: an eval is never judged",
        ),
        ("rows: 100", "max_tokens: 3", "evals.sums.max_tokens: no such key. Did you mean 'max_new_tokens'?"),
        (
            "rows: 100",
            "on_long_row: drop",
            "no such key. It is a key of stages.<name>.train; is the indentation right?",
        ),
        (
            "name: my-run",
            "name: my-run\nname: b",
            "my.yaml:3  name: given twice, first at my.yaml:2 | keep one of the two",
        ),
        (
            "model: spark",
            "model: !!python/name:os.system x",
            "the tag !!python/name:os.system has no place in a recipe",
        ),
        ("model: spark", 'model: "\\ud800"', "model: YAML reads '\\ud800' as half of a surrogate pair"),
        ("burnish: 1\n", "", "burnish: is missing, wanted the recipe format, 1 | add burnish: 1"),
        ("burnish: 1", "burnish: 0", "burnish: 0 given, wanted the recipe format, 1"),
        ("burnish: 1", "burnish: 2", "burnish: 2 is a newer recipe format; this burnish reads 1"),
    ],
)
def test_one_mistake(old: str, new: str, fault: str) -> None:
    (told,) = faults(old, new)
    assert fault in told and told.startswith("my.yaml:")


def test_all_mistakes_at_once_in_the_order_of_the_file() -> None:
    text = (
        GOOD.replace("spark", "no").replace("steps: 8", "stepz: 8").replace("1e-3", "fast").replace("vote:4", "vot:4")
    )
    with pytest.raises(RecipeError) as caught:
        resolve(read(text, "my.yaml"))
    assert [f.where for f in caught.value.faults] == ["my.yaml:3", "my.yaml:8", "my.yaml:15", "my.yaml:17"]
    assert str(caught.value).startswith("the recipe has 4 faults\n  my.yaml:3  model: no without quotes")


def test_numbers_yaml_takes_for_text_are_read_where_a_number_is_wanted_and_only_there() -> None:
    found = recipe("steps: 8", "steps: 1e1", "evals.sums.temperature=[1e-1, 0.5]", "evals.sums.validation_rows=9")
    train = found.recipe.stages[0].train
    assert train.steps == 10 and isinstance(train.steps, int)
    assert found.recipe.evals["sums"].temperature == (0.1, 0.5)
    assert found.provenance["stages.0.train.learning_rate"] == "my.yaml:17, the text 1e-3 read as the number 0.001"
    assert found.provenance["stages.0.train.steps"] == "my.yaml:15, the text 1e1 read as the number 10"
    assert recipe("model: spark", "model: 1e-3").recipe.model == "1e-3"
    budget = recipe("model: spark", "model: spark\nbudget: {flops: 1e15, tokens: 1e6}").recipe.budget
    assert (budget.flops, budget.tokens) == (1e15, 10**6)


def test_keys_that_look_like_truth_values_are_keys() -> None:
    assert "on" in recipe("  sums:\n", "  on:\n").recipe.evals


def test_an_alias_is_a_value_like_any_other_and_cannot_multiply_without_end() -> None:
    shared = recipe("rows: 100", "rows: &n 100", "stages.sft.data.rows=600")
    assert shared.recipe.evals["sums"].rows == 100
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
    for text in (bomb, "a: &a [*a]", "x: " + "[" * 5000):
        with pytest.raises(ConfigError, match="nested too deeply"):
            resolve(read(text, "my.yaml"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty, wanted a mapping"),
        (b"# only a comment\n", "is empty, wanted a mapping"),
        (b"- a\n- b\n", "is a list, wanted a mapping"),
        (b"hello", "is a single value, wanted a mapping"),
        (b"a:\n\tb: 1\n", "my.yaml:2  is not YAML: a tab where YAML wants spaces"),
        (b"a: b: c\n", "my.yaml:1  is not YAML: mapping values are not allowed here"),
        (b"a: 1\n---\nb: 1\n", "my.yaml:2  is not YAML: expected a single document"),
        (b"a: [1\n", "is not YAML"),
        (b"a: \x00\n", "is not YAML"),
        (b"a: 1\nb: \xff\n", "my.yaml:2  is not UTF-8: byte 0xff at offset 8"),
        (b"\xef\xbb\xbfa: 1\n", "my.yaml:1  begins with a byte order mark"),
        ("a: 1\n".encode("utf-16"), "is UTF-16, wanted UTF-8"),
        (b"# " + b"x" * 2_000_000, "is larger than 1,000,000 bytes"),
    ],
)
def test_files_that_are_no_recipe(data: bytes, message: str) -> None:
    Path("my.yaml").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load("my.yaml")
    assert message in str(caught.value) and caught.value.exit_code == 2 and len(str(caught.value)) < 400


def test_windows_line_ends_and_a_folder_and_a_missing_file() -> None:
    Path("my.yaml").write_bytes(GOOD.replace("\n", "\r\n").encode())
    assert load("my.yaml").recipe == recipe().recipe
    for name in ("no.yaml", "first_steps/quickstrat", ".", "a\0b", "x" * 5000):
        with pytest.raises(ConfigError, match="no recipe and no file has this name"):
            load(name)
    with pytest.raises(ConfigError, match="Did you mean 'first_steps/quickstart'"):
        load("quickstart")
    assert "first_steps/quickstart" in packaged()


# ---- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["stages.sft.train.steps", "stages.0.train.steps"])
def test_an_override_by_stage_name_or_index(key: str) -> None:
    found = recipe("", "", f"{key}=3")
    assert found.recipe.stages[0].train.steps == 3
    assert found.provenance["stages.0.train.steps"] == f"--set {key}"
    assert found.provenance["stages.0.train.batch_rows"] == "my.yaml:16"
    assert found.provenance["stages.0.train.clip_norm"] == "default"


def test_overrides_make_mappings_replace_rows_and_reach_into_short_forms() -> None:
    found = recipe(
        "",
        "",
        "budget.tokens=1e6",
        "stages.sft.method.mask=all",
        "stages.sft.data.rows=600",
        "evals.sums.strategies.1=vote:8",
    )
    assert found.recipe.budget.tokens == 10**6 and found.recipe.stages[0].method.params["mask"] == "all"
    assert found.recipe.stages[0].data[0].rows == 600 and found.recipe.evals["sums"].strategies == ("greedy", "vote:8")
    other = recipe("method: sft", "method: {name: simpo, beta: 3}", "stages.0.method=sft", "stages.sft.adapter=lora")
    assert other.recipe.stages[0].method.params == {"mask": "completion", "weights": "token_mean"}
    assert other.provenance["stages.0.method.name"] == "--set stages.0.method"
    assert other.provenance["stages.0.method.mask"] == "default"
    assert other.recipe.stages[0].adapter is not None and other.recipe.stages[0].adapter.params["rank"] == 16


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("stages.sft.train.stepz=3", "--set stages.sft.train.stepz  no such key. Did you mean 'steps'?"),
        ("stages.sft.train.steps=many", "--set stages.sft.train.steps  'many' given, wanted a whole number"),
        ("name=2024", '--set name  2024 without quotes is a number to YAML, wanted text | type name: "2024"'),
        ("name", "--set name  wanted key=value | type --set stages.sft.train.steps=10"),
        ("=3", "wanted key=value"),
        ("seed=[1", "--set seed  is not YAML"),
        ("seed={a: 1, a: 2}", "--set seed  a: given twice"),
        ("stages.grpo.train.steps=3", "stages has 1 entries, and 'grpo' is none of them | name one of: sft"),
        ("stages.7.train.steps=3", "stages has 1 entries, and '7' is none of them"),
        ("model.x=3", "--set model.x  model is 'spark', which has no key 'x'"),
        ("train.steps=3", "--set train.steps  train: no such key. It is a key of stages.<name>"),
        ("burnish=2", "--set burnish  burnish: 2 is a newer"),
    ],
)
def test_a_mistaken_override_is_told_as_an_override(override: str, fault: str) -> None:
    told = faults("", "", override)
    assert any(fault in line for line in told), told


def test_an_override_twice() -> None:
    assert "--set seed  given twice" in faults("", "", "seed=1", "seed=2")[0]


# ---- nothing else ever comes out ------------------------------------------------------------------------------------

VALUES: Any = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(allow_nan=False),
    st.sampled_from(["", "sft", "1e-5", "no", "vote:4", "a/b", "\x1b[31m", "é", "own.py:f", "lora", "\u2028"]),
    st.just([]),
    st.just({}),
    st.just([1, "x"]),
    st.just({"name": "sft"}),
    st.just({"a": {"b": 1}}),
)


def places(value: Any, key: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [key] if key else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for name, child in children for place in places(child, (*key, name))]


BASE = yaml.safe_load(GOOD)
BASE["stages"][0]["adapter"] = {"name": "lora", "rank": 4}
BASE["stages"][0]["train"]["schedule"] = {"name": "cosine"}
BASE["report"] = {"primary": {"eval": "sums"}}
BASE["budget"] = {"seconds": 5}


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(places(BASE)), VALUES), min_size=1, max_size=3))
def test_any_value_anywhere_is_a_recipe_or_a_config_error(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    data = copy.deepcopy(BASE)
    for key, value in changes:
        container = data
        try:
            for part in key[:-1]:
                container = container[part]
            container[key[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue
    try:
        resolve(read(yaml.safe_dump(data), "my.yaml"))
    except BurnishError as error:
        assert error.exit_code == 2 and "my.yaml" in str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=40))
def test_any_text_is_refused_in_words(text: str) -> None:
    with pytest.raises(ConfigError):
        resolve(read(text, "my.yaml"))
