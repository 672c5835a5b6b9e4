"""The wheel holds all that quickstart needs: the model, the recipes, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_quickstart_runs_from_the_wheel(tmp_path: Path) -> None:
    made = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(made, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("burnish-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "burnish/assets/spark/model.safetensors" in names
    assert {"burnish/assets/coverage/taxonomy.tsv", "burnish/assets/coverage/claims.tsv"} <= set(names)
    assert {"burnish/recipes/first_steps/quickstart.yaml", "burnish/recipes/first_steps/own_data.yaml"} <= set(names)
    assert not [n for n in names if "test" in n.split("/")[0]]

    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    where = [sys.executable, "-c", "import burnish; print(burnish.__file__)"]
    found = subprocess.run(where, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout
    assert found.startswith(str(tmp_path / "site"))
    short = ["stages.sft.train.steps=3", "evals.sums.rows=8", "evals.sums.validation_rows=4", "evals.route.rows=8"]
    command = [sys.executable, "-m", "burnish", "quickstart", "--json", *(word for s in short for word in ("--set", s))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["verdict"]["outcome"]
    report = json.loads((tmp_path / "runs/quickstart/report.json").read_text())
    assert report["stages"][0]["name"] == "base" and report["stages"][1]["name"] == "sft"
    assert (tmp_path / "runs/quickstart/report.html").stat().st_size > 10_000
    again = subprocess.run(command[:-2 * len(short)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert again.returncode == 0 and json.loads(again.stdout)["verdict"] == json.loads(done.stdout)["verdict"]
