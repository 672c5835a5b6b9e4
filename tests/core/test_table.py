"""Tables: described without being run, bound with errors a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from burnish.core.errors import ConfigError
from burnish.core.signature import parameters_of, read_source, wanted
from burnish.core.table import (
    About,
    Table,
    bind,
    describe,
    describe_row,
    did_you_mean,
    differences,
    faults_in,
    load_row,
)
from tests.config.tables import tables  # noqa: F401

OWN = '''
open("canary", "w").write("executed")


def mine(engine, *, depth: int = 2, kind: "Literal['a', 'b']" = "a", scale: float):
    """My own search (arXiv:2401.00001)."""
    return depth * scale
'''


def ipo(*, beta: float = 0.1) -> float:
    return beta


def test_a_table_is_a_mapping_that_names_what_was_meant() -> None:
    table = Table("loss", {"dpo": len, "ipo": ipo}, also={"identity": "ipo"}, about={"ipo": About(year=2023)})
    assert table["ipo"] is ipo and list(table) == ["dpo", "ipo"] and len(table) == 2 and "ipo" in table
    assert table.get("kto") is None and "identity" not in table
    with pytest.raises(ConfigError, match=r"'ip0' is not a loss\. Did you mean 'ipo'\? There are: dpo, ipo") as caught:
        table["ip0"]
    assert caught.value.exit_code == 2 and isinstance(caught.value, KeyError)
    with pytest.raises(ConfigError, match="Did you mean 'ipo'"):
        table["identity"]
    with pytest.raises(ValueError, match="kto"):
        Table("loss", {"dpo": len}, also={"unpaired": "kto"})


def test_did_you_mean_ignores_case_and_hyphens_and_stays_silent_when_nothing_is_near() -> None:
    assert did_you_mean("Best-Of", ["vote", "best_of"]) == " Did you mean 'best_of'?"
    assert did_you_mean("xyz", ["vote", "best_of"]) == ""


@pytest.mark.usefixtures("tables")
def test_rows_are_described_from_source_across_modules() -> None:
    rows = describe("method")
    sft, simpo = rows["sft"], rows["simpo"]
    assert [str(p) for p in simpo.parameters] == ["beta=2.0", "gamma=1.0", "steps=None", "tags=[]"]
    assert [p.type for p in simpo.parameters] == [float, float, int | None, list[str]]
    assert sft.parameters[0].type == Literal["completion", "all"]
    assert simpo.summary == "Simple preference optimisation (arXiv:2405.14734)." and simpo.doc.endswith("More words.")
    assert simpo.citation == "arXiv:2405.14734" and sft.citation is None
    assert sft.about == About(taxonomy=("S1",), year=2022) and sft.also == ("supervised",)
    assert simpo.path.name == "pairs.py" and simpo.line == 2 and len(simpo.sha256) == 64


@pytest.mark.usefixtures("tables")
def test_a_row_that_is_an_object_is_described_by_its_module_and_its_literal_keywords() -> None:
    rows = describe("task")
    assert rows["sums"].summary == "Sums with a free order of operations." and rows["sums"].parameters == ()
    assert rows["words"].facts == {"name": "words", "verifier_needs_gold": False, "has_answer_key": False}


@pytest.mark.usefixtures("tables")
def test_names_that_are_no_rows() -> None:
    with pytest.raises(ConfigError, match=r"'supervised' is not a method\. Did you mean 'sft'\?"):
        describe_row("method", "supervised")
    with pytest.raises(ConfigError, match=r"'methods' is not a kind of table\. Did you mean 'method'\?"):
        describe("methods")


@pytest.mark.usefixtures("tables")
def test_your_own_function_is_described_but_not_run_and_its_hash_is_kept() -> None:
    Path("mine.py").write_text(OWN)
    row = describe_row("strategy", "mine.py:mine")
    assert not Path("canary").exists()
    assert row.citation == "arXiv:2401.00001" and [p.required for p in row.parameters] == [False, False, True]
    assert row.parameters[1].type == Literal["a", "b"]
    before = row.sha256
    assert load_row("strategy", "mine.py:mine")(None, scale=3.0) == 6.0
    assert Path("canary").exists()
    Path("mine.py").write_text(OWN + "\n# changed\n")
    assert describe_row("strategy", "mine.py:mine").sha256 != before


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.py:f", None, r"'gone.py' does not exist, seen from"),
        ("own.py:serach", "def search(): ...", r"own.py has no 'serach'. Did you mean 'search'\?"),
        ("own.py:f", "def f(:", r"own.py:1  is not Python"),
        (
            "own.py:f",
            "def f(*, x: dict = {}): ...",
            r"own.py:1  f\(x: dict = \{\}\) is not a setting a recipe can hold",
        ),
        ("own.py:f", "def f(*, x): ...", r"f\(x: nothing\)"),
        ("own.py:f", "import math\ndef f(*, x: float = math.pi): ...", r"own.py:2  f\(x: float = math.pi\)"),
    ],
)
def test_your_own_function_refused(name: str, text: str | None, message: str) -> None:
    if text is not None:
        Path("own.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        describe_row("method", name)


@pytest.mark.usefixtures("tables")
def test_an_own_file_that_raises_when_loaded_is_a_config_error() -> None:
    Path("own.py").write_text("def f(): ...\nraise RuntimeError('boom')")
    with pytest.raises(ConfigError, match=r"own.py  raised RuntimeError\('boom'\) when it was loaded"):
        load_row("method", "own.py:f")


def test_every_simple_annotation_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "f.py"
    path.write_text(
        "def f(*, a: bool = True, b: tuple[int, ...] = (1,), c: list[float] = [-1.5],"
        " d: Literal['x', 2] | None = None, e: tuple[int, str] = (1, 'a'), g: 'int | None' = None): ..."
    )
    source = read_source(path)
    found = {p.name: (p.type, p.default) for p in parameters_of(source, source.functions["f"])}
    assert found == {
        "a": (bool, True),
        "b": (tuple[int, ...], (1,)),
        "c": (list[float], [-1.5]),
        "d": (Literal["x", 2] | None, None),
        "e": (tuple[int, str], (1, "a")),
        "g": (int | None, None),
    }
    assert wanted(Literal["x", 2] | None) == "one of x, 2 or null" and wanted(list[float]) == "a list of a number"


@pytest.mark.usefixtures("tables")
def test_binding_fills_defaults_and_reads_yaml_numbers() -> None:
    row = describe_row("method", "simpo")
    assert bind(row, {}) == {"beta": 2.0, "gamma": 1.0, "steps": None, "tags": []}
    assert bind(row, {"beta": "1e-5", "gamma": 3, "steps": "1e3"}) == {
        "beta": 1e-5,
        "gamma": 3.0,
        "steps": 1000,
        "tags": [],
    }
    lora = describe_row("adapter", "lora")
    assert bind(lora, {"targets": ["q", "v"]})["targets"] == ["q", "v"]


@pytest.mark.usefixtures("tables")
def test_the_error_of_a_misspelt_parameter_is_the_one_of_the_conventions() -> None:
    row = describe_row("schedule", "cosine")
    with pytest.raises(ConfigError) as caught:
        bind(row, {"warmpu": 1}, where="recipes/my.yaml:14")
    assert str(caught.value) == (
        "recipes/my.yaml:14  schedule.warmpu: 'cosine' has no parameter 'warmpu'. Did you mean 'warmup'? "
        "It takes warmup=0.0, floor=0.0."
    )


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    ("params", "fault"),
    [
        ({"beta": "fast"}, ("beta", "'fast' given, wanted a number")),
        ({"beta": True}, ("beta", "true given, wanted a number")),
        ({"beta": None}, ("beta", "null given, wanted a number")),
        ({"beta": float("nan")}, ("beta", "NaN given, wanted a number")),
        ({"beta": "1e999"}, ("beta", "'1e999' given, wanted a number")),
        ({"steps": 1.5}, ("steps", "1.5 given, wanted a whole number or null")),
        ({"steps": "3"}, ("steps", "'3' given, wanted a whole number or null")),
        ({"tags": "a"}, ("tags", "'a' given, wanted a list of text")),
        ({"tags": [1]}, ("tags", "[1] given, wanted a list of text")),
    ],
)
def test_a_value_of_the_wrong_type_is_not_bent_into_the_right_one(params: dict[str, object], fault: object) -> None:
    _, faults = faults_in(describe_row("method", "simpo"), params)
    assert faults == [fault]


@pytest.mark.usefixtures("tables")
def test_all_faults_are_told_and_a_needed_parameter_is_asked_for() -> None:
    Path("mine.py").write_text(OWN)
    _, faults = faults_in(describe_row("strategy", "mine.py:mine"), {"depth": "x", "knid": "a"})
    assert [name for name, _ in faults] == ["knid", "depth", "scale"]
    assert faults[-1][1] == "'mine.py:mine' needs 'scale': a number"


@pytest.mark.usefixtures("tables")
def test_a_parameter_named_after_a_kind_of_table_names_a_row_of_it() -> None:
    Path("own.py").write_text("def f(*, schedule: str = 'cosine'): ...")
    row = describe_row("method", "own.py:f")
    assert bind(row, {"schedule": "constant"}) == {"schedule": "constant"}
    with pytest.raises(ConfigError, match=r"method.schedule: 'cosin' is not a schedule. Did you mean 'cosine'"):
        bind(row, {"schedule": "cosin"})


def test_a_second_name_of_a_function_is_that_function(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def f(*, k: int = 2): ...\ng = f\n")
    assert [str(p) for p in describe_row("method", f"{path}:g").parameters] == ["k=2"]


OBJECTS = '''
from dataclasses import dataclass
from fractions import Fraction
from burnish.core.table import Table


@dataclass(frozen=True, kw_only=True)
class Setting:
    weights: str = "token_mean"
    clip: float | None = None
    filters: tuple[str, ...] = ()
    needed: int


NEAR = Setting(clip=0.2, needed=3)
"""Near (arXiv:2401.00001).

    loss = x
"""

FAR = Setting(weights="sequence_mean", filters=("dead",))
PART = Fraction(1, 3)
"""A number."""

POINTS = Table("point", {"near": NEAR, "far": FAR, "part": PART})
"""Not of a row."""
'''


def test_a_keyword_only_dataclass_shows_its_fields_and_the_string_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "points.py").write_text(OBJECTS)
    monkeypatch.setattr("burnish.core.signature.ROOT", tmp_path)
    monkeypatch.setattr("burnish.core.table.TABLES", {"point": ("toy.points:POINTS",)})
    near, far, part = describe("point").values()
    assert [str(p) for p in near.parameters] == ["weights='token_mean'", "clip=0.2", "filters=()", "needed=3"]
    assert near.doc == "Near (arXiv:2401.00001).\n\nloss = x" and near.citation == "arXiv:2401.00001"
    assert far.parameters[3].required and far.doc == "" and part.parameters == () and part.doc == "A number."
    assert near.facts == {"clip": 0.2, "needed": 3}
    assert differences(near, far) == {
        "weights": ("token_mean", "sequence_mean"),
        "clip": (0.2, None),
        "filters": ((), ("dead",)),
        "needed": (3, None),
    }
    assert differences(near, part)["clip"] == (0.2, ...) and differences(near, near) == {}
    assert bind(near, {"filters": ["a"], "clip": None})["filters"] == ("a",)


def test_a_keyword_that_is_no_literal_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(OBJECTS + "\nimport math\nODD = Setting(clip=math.pi, needed=1)\n")
    with pytest.raises(ConfigError, match=r"Setting\(clip: float \| None = math.pi\) is not a setting"):
        describe_row("point", f"{own}:ODD")
