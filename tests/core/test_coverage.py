"""The claims of `burnish coverage` are true: the code exists, the test is collected, the recipe says so."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from burnish.cli import invoke
from burnish.config.load import packaged
from burnish.core import coverage as module
from burnish.core.coverage import Claim, claims, coverage, table_rows
from burnish.core.signature import ROOT as SOURCE
from burnish.core.table import describe_row

ROOT = Path(__file__).resolve().parents[2]


def functions(module_name: str) -> set[str]:
    """What a module of ours defines at its top, read and not run."""
    path = SOURCE.joinpath(*module_name.split(".")).with_suffix(".py")
    nodes = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def lies(claim: Claim) -> Iterator[str]:
    """Everything in a claim that is not so, but for whether its test is collected."""
    kind, slash, row = claim.by.partition("/")
    name = row if slash else claim.by.partition(":")[2]
    if slash and claim.by not in table_rows():
        yield f"there is no {kind} {row!r}"
    elif slash and claim.id not in describe_row(kind, row).about.taxonomy:
        yield f"{claim.by} does not say About(taxonomy=({claim.id!r},))"
    elif not slash and name not in functions(claim.by.partition(":")[0]):
        yield f"there is no function {claim.by}"
    file, _, test = claim.test.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else ""
    if not file.startswith("tests/") or f"\ndef {test}(" not in text:
        yield f"there is no test {claim.test}"
    elif name not in text and not any(name in case.partition("[")[2] for case in cases(claim.test)):
        yield f"{claim.test} does not mention {name!r}"
    recipe = packaged().get(claim.recipe) or ROOT / claim.recipe
    shown = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
    if not (claim.recipe in packaged() or claim.recipe.startswith("benchmarks/")) or not shown:
        yield f"there is no recipe or benchmark {claim.recipe!r}"
    elif claim.says not in "\n".join(line.split(" #")[0] for line in shown.splitlines()):
        yield f"{claim.recipe} does not say {claim.says!r}"
    elif not claim.says or (slash and name not in claim.says):
        yield f"{claim.says!r} does not name {name!r}"


@cache
def cases(test: str) -> tuple[str, ...]:
    """What pytest would run of a test, each with its parameters: over every row of a table it names them there alone."""
    return tuple(sorted(collected_cases([test])))


def collected(tests: Sequence[str]) -> set[str]:
    """Of these tests, those that pytest would run, without their parameters."""
    return {line.split("[")[0] for line in collected_cases(tests)}


def collected_cases(tests: Sequence[str]) -> set[str]:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--collect-only", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    done = subprocess.run([*command, "-m", "not peer", *tests], cwd=ROOT, capture_output=True, text=True, check=False)
    return {line for line in done.stdout.splitlines() if "::" in line and not line.startswith("ERROR")}


TRUE = Claim("T13", "strategy/vote", "tests/search/test_sampling.py::test_vote_counts_keys_and_spends_exactly", "first_steps/quickstart", "vote:16")


@pytest.mark.parametrize("claim", claims(), ids=lambda c: f"{c.id}-{c.by}")
def test_every_claim_is_true(claim: Claim) -> None:
    assert not list(lies(claim))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"by": "strategy/wote"}, "there is no strategy 'wote'"),
        ({"by": "strategy/greedy"}, "does not say About(taxonomy=('T13',))"),
        ({"by": "burnish.maths.votes:majorities"}, "there is no function"),
        ({"by": "burnish.maths.nothing:majority"}, "there is no function"),
        ({"test": "tests/search/test_sampling.py::test_vote"}, "there is no test"),
        ({"test": "tests/search/gone.py::test_vote"}, "there is no test"),
        ({"test": "tests/test_wheel.py::test_quickstart_runs_from_the_wheel"}, "does not mention 'vote'"),
        ({"recipe": "first_steps/slowstart"}, "there is no recipe"),
        ({"recipe": "README.md"}, "there is no recipe"),
        ({"says": "vote:64"}, "does not say 'vote:64'"),
        ({"says": "for voting"}, "does not say 'for voting'"),  # a comment uses nothing
        ({"says": "greedy"}, "does not name 'vote'"),
    ],
)
def test_a_false_claim_is_noticed(change: dict[str, str], said: str) -> None:
    assert not list(lies(TRUE))
    assert said in "; ".join(lies(replace(TRUE, **change)))


def test_every_claimed_test_is_collected() -> None:
    claimed = {claim.test for claim in claims()}
    absent = "tests/search/test_sampling.py::test_that_nobody_wrote"
    found = collected(sorted(claimed))
    assert found == claimed and absent not in collected([absent])


def test_ids_are_those_of_the_taxonomy_and_claimed_once_by_each() -> None:
    rows = coverage()
    ids = [row.id for row in rows]
    assert len(ids) == len(set(ids)) == 318 and {row.priority for row in rows} == {"C", "I", "F"}
    assert {i for claimed in table_rows().values() for i in claimed} <= set(ids)
    made = claims()
    assert {claim.id for claim in made} <= set(ids) and len({(c.id, c.by) for c in made}) == len(made)
    assert all(c.test and c.recipe and c.by for c in made)


def test_a_row_runs_only_with_code_test_and_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taxonomy.tsv").write_text("id\tname\tpriority\nT13\tVotes\tC\nT5\tBest\tC\nQ1\tOther\tI\nX1\tNone\tF\n")
    (tmp_path / "claims.tsv").write_text(
        "id\tby\ttest\trecipe\tsays\nT13\tstrategy/vote\ttests/a.py::test_a\tfirst\tvote\nQ1\tm:f\ttests/b.py::test_b\t\t\n"
    )
    monkeypatch.setattr(module, "HERE", tmp_path)
    rows = {row.id: row for row in coverage()}
    assert [rows[i].runs for i in ("T13", "T5", "Q1", "X1")] == [True, False, False, False]
    assert (rows["T13"].by, rows["T13"].test, rows["T13"].recipe) == ("strategy/vote", "tests/a.py::test_a", "first")
    assert rows["T5"].by == "strategy/best_of" and rows["T5"].test is rows["T5"].recipe is rows["X1"].by is None
    assert (rows["Q1"].by, rows["Q1"].recipe) == ("m:f", None)


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    def out(*words: str) -> str:
        assert invoke(["coverage", *words]) == 0
        return capsys.readouterr().out

    told: list[dict[str, Any]] = json.loads(out("--json"))
    assert len(told) == 318 and set(told[0]) == {"id", "name", "priority", "runs", "by", "test", "recipe"}
    running = {row["id"] for row in told if row["runs"]}
    assert {"F1", "S1", "S3", "S4", "E13", "T5", "T6", "T13", "T17", "B1", "B6", "B7", "Y6"} <= running
    missing = json.loads(out("--missing", "--json"))
    assert {row["id"] for row in missing} == {row["id"] for row in told} - running
    text = out()
    core = [row for row in told if row["priority"] == "C"]
    assert f"{sum(row['runs'] for row in core)} of {len(core)} core, " in text.splitlines()[-1]
    assert "\nT13 C  runs  Self-consistency " in text and "\nT13 " not in out("--missing")
    assert max(map(len, text.splitlines())) <= 120
