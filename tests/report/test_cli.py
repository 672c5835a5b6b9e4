"""`burnish report`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.cli import invoke
from tests.report.synthetic import build


def test_it_writes_both_files_and_says_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = build(tmp_path / "quickstart", n=30)
    for words in ([str(root)], ["quickstart", "--runs", str(tmp_path)]):
        assert invoke(["report", *words]) == 0
        said = capsys.readouterr().out
        assert "sums" in said and str(root / "report.html") in said
        assert json.loads((root / "report.json").read_text())["schema"] == 1 and (root / "report.html").read_text().startswith("<!doctype html>")
        (root / "report.html").unlink()


def test_json_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = build(tmp_path / "r", n=30)
    assert invoke(["report", str(root), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["state"] == "finished" and said["verdict"]["primary"]["eval"] == "sums" and Path(said["html"]).is_file()


def test_a_wrong_name_is_a_usage_error_that_names_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "mine", n=4)
    assert invoke(["report", "other", "--runs", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no such run" in said and "mine" in said and "Traceback" not in said


def test_reading_a_run_needs_no_torch(tmp_path: Path) -> None:
    root = build(tmp_path / "r", n=4)
    code = f"import sys; from burnish.report.write import write_report; write_report({str(root)!r}); import burnish.cli.report; print([m for m in sys.modules if m in ('torch', 'transformers')])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
