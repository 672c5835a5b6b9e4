"""benchmarks/gpu.sh, tiny and without a GPU; its equality checks one by one where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmarks.suite import GPU

from benchmarks import gpu, gpu_checks, report

ROOT = Path(__file__).resolve().parents[1]
NOT_THERE = ("pydantic", "pytest", "trl", "datasets", "jaxtyping", "beartype")  # only torch, transformers and peft are


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the dry run holds the CPU to the same checks")
@pytest.mark.parametrize("name", gpu_checks.CHECKS)
def test_a_check_holds(name: str) -> None:
    found = list(gpu_checks.CHECKS[name](torch.device("cuda", 0)))
    assert found and not [(what, error, limit) for what, error, limit in found if not error <= limit]


def test_a_dry_run_measures_every_item_with_little_installed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({NOT_THERE}))\n")
    env = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(["bash", str(ROOT / "benchmarks/gpu.sh"), "--dry"], env=env, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, [line for line in lines if "error" in line or line.get("ok") is False] or done.stderr[-2000:]
    figures = " ".join(line["figure"] for line in lines)
    assert all(f"equality of {name}" in figures for name in gpu_checks.CHECKS)
    assert all(figure in figures for figure in ("GPU1 SFT full", "GPU1 SFT LoRA", "GPU2", "GPU3", "GPU4"))
    assert not any(line.get("refused") for line in lines)
    names = {p.name for p in (tmp_path / "benchmarks" / "results").iterdir()}
    assert {name for name in names if name.startswith("gpu-")} == {f"gpu-{name}.json" for name in gpu.ITEMS}
    assert sorted(name[11:] for name in names if not name.startswith("gpu-")) == [f"GPU{i}.json" for i in range(5)]
    assert not report.newest(tmp_path / "benchmarks" / "results")  # a dry run measures nothing
    (sft,) = [x for x in json.loads((tmp_path / "benchmarks/results/gpu-sft-0.6b.json").read_text()) if "mfu" in x]
    assert sft["tokens_per_s"] > 0


def test_an_item_that_fails_is_a_line_and_keeps_what_came_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(setting: gpu.Setting) -> Iterator[gpu.Line]:
        yield {"figure": "first", "value": 1}
        raise torch.OutOfMemoryError("no room")

    setting = gpu.Setting(torch.device("cpu"), True)
    assert not gpu.run_item("breaks", gpu.Item("GPU4", 5, breaks), setting, tmp_path)
    kept = json.loads((tmp_path / "gpu-breaks.json").read_text())
    assert [line["figure"] for line in kept] == ["first", "error", "seconds"] and "no room" in kept[1]["error"]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_each_item_runs_apart_and_one_over_its_time_does_not_cost_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And what was measured until then is where the report finds it."""
    started: list[str] = []
    folder = tmp_path / "benchmarks" / "results"
    facts = {"figure": "device", "device": "a GPU", "dry": False, "python": "3.12.1", "torch": "2.11.0"}

    def run(line: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        name = line[-1]
        started.append(name)

        def found(setting: gpu.Setting) -> Iterator[gpu.Line]:
            yield {"figure": f"{name} one", "tokens_per_s": 1234.5678, "mfu": None}
            if name == "equality":
                yield {"figure": "equality of head", "ok": False, "failed": [["a|b", 1.0, 0.1]]}
            if name == "decode-8b":
                raise RuntimeError("lost the device")

        setting = gpu.Setting(torch.device("cpu"), False)
        done = gpu.run_item(name, gpu.Item(gpu.ITEMS[name].id, 5, found), setting, folder, facts)
        if name == "head":
            raise subprocess.TimeoutExpired(line, timeout)
        return subprocess.CompletedProcess(line, 0 if done else 1)

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.main([]) == 1
    assert started == list(gpu.ITEMS)
    codes = json.loads(capsys.readouterr().out.splitlines()[-1])["codes"]
    assert codes["equality"] == codes["decode-8b"] == 1 and codes["head"] == "over its 40 s" and codes["grpo-0.6b"] == 0
    stored = report.newest(folder)
    assert set(stored) == set(GPU)
    assert [c["figure"] for c in stored["GPU1"][1]["cases"]] == [f"{n} one" for n, item in gpu.ITEMS.items() if item.id == "GPU1"]
    text = report.page(stored)
    assert "| equality one | tokens_per_s 1235 |" in text and "| equality of head | ok False; failed [['a/b', 1.0, 0.1]] |" in text
    assert "a GPU: 4 figures, **1 failed**" in text and "**stopped early:** decode-8b: RuntimeError: lost the device" in text
    assert "device a GPU, python 3.12.1, torch 2.11.0" in text and "unmeasured: run" not in text

    monkeypatch.setattr(gpu.subprocess, "run", lambda line, timeout: subprocess.CompletedProcess(line, 137))
    assert gpu.main(["--only", "head"]) == 1  # killed before its first line: the earlier run's lines do not stand for it
    assert not (folder / "gpu-head.json").exists() and (folder / "gpu-sft-0.6b.json").exists()


def test_every_check_and_every_id_is_in_the_suite() -> None:
    assert {item.id for item in gpu.ITEMS.values()} == set(GPU)


def test_the_budgets_add_up_to_less_than_nine_minutes() -> None:
    assert sum(item.seconds for item in gpu.ITEMS.values()) <= gpu.DEADLINE_S < 9 * 60


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--here", "--only", "head"]) == 4
    assert "try --dry" in capsys.readouterr().out
