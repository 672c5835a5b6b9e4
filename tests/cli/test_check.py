"""`burnish check`: what would run, or every reason why not; nothing is written either way."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from burnish.cli import invoke
from tests.config.tables import tables  # noqa: F401
from tests.config.test_load import GOOD


@pytest.fixture(autouse=True)
def _recipe(tables: Path) -> None:  # noqa: F811
    (tables / "my.yaml").write_text(GOOD)


def test_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["check", "my.yaml", "--set", "seed=3", "--set", "budget.seconds=60"]) == 0
    assert re.sub(r"\d+ by default", "the rest by default", capsys.readouterr().out) == (
        "my-run: model spark, dtype auto, seed 3\n"
        "  stops at  60 seconds\n"
        "  stage  sft: sft, 8 steps of 64 rows over 512 rows = 1 passes\n"
        "  eval   sums: sums, test fold, 100 rows by 2 models: greedy, vote:4, at most 256,000 sampled tokens\n"
        "  values 15 from the recipe, 2 from --set, the rest by default\n"
        "Nothing is wrong, and nothing was run. To run it: burnish run my.yaml\n"
    )
    assert [p.name for p in Path().iterdir()] == ["my.yaml"]


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["check", "my.yaml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and told["findings"] == [] and told["stages"][0]["steps"] == 8
    assert told["recipe"]["stages"][0]["method"] == {"name": "sft", "mask": "completion", "weights": "token_mean"}
    assert told["given"]["stages.0.train.steps"] == "my.yaml:15"


def test_every_fault_is_told_and_nothing_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text(GOOD.replace("steps: 8", "stepz: 8").replace("1e-3", "fast"))
    assert invoke(["check", "my.yaml"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(
        "error: the recipe has 2 faults\n  my.yaml:15  stages.sft.train.stepz: no such key."
    )
    assert invoke(["check", "my.yaml", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert [fault["where"] for fault in told["error"]["faults"]] == ["my.yaml:15", "my.yaml:17"]
    assert [p.name for p in Path().iterdir()] == ["my.yaml"]


def test_a_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["check", "my.yaml", "--set", "stages.sft.data={file: rows.jsonl}"]) == 2
    assert "error: --set stages.sft.data  stages.sft.data.0.file: file not found: rows.jsonl" in capsys.readouterr().err
