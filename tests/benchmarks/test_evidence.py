"""Evidence: what runs are made, which are kept, what is computed from them, and when it counts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from benchmarks.machine import ROOT

from benchmarks import evidence, report
from burnish.config.load import load
from burnish.maths.settings import POLICY_GRADIENT

spec = importlib.util.spec_from_file_location("evidence_tool", ROOT / "tools/evidence.py")
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
import sys  # noqa: E402

sys.modules["evidence_tool"] = tool  # dataclasses look their module up
spec.loader.exec_module(tool)


def run_folder(root: Path, name: str, before: list[int], after: list[int]) -> Path:
    """What a run leaves of what is read here."""
    home = root / name
    for stage, grades in (("00-base", before), ("01-reinforce", after)):
        (home / stage / "evals").mkdir(parents=True)
        (home / stage / "stage.json").write_text("{}")
        row = {"strategy": "greedy", "oracle": False, "accuracy": sum(grades) / len(grades), "correct": grades, "spend": {"sampled_tokens": 10}}
        found = {"eval": "sums", "stage": stage, "item_ids": [f"i{k}" for k in range(len(grades))], "strategies": [row]}
        (home / stage / "evals/sums.json").write_text(json.dumps(found))
    (home / "environment.json").write_text('{"commit": "abc"}')
    stage = {"train": {"batch_rows": 4}, "rollouts": {"group_size": 8}}
    (home / "run.json").write_text(json.dumps({"resolved": {"stages": [stage]}}))
    steps = [(1e-6, 0.5, 0.5), (None, 0.5, 0.5), (3e-6, 0.6, 0.4), (None, None, None), (None, 0.7, 0.3)]
    rows = [{"sampler_gap": gap, "reward_mean": mean, "reward_std": std} for gap, mean, std in steps]
    (home / "01-reinforce/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {
        "counted": {"decode": {"sampled_tokens": 50}, "score": {"scored_tokens": 7}, "sampling": {"executed_flops": 10}, "train": {"stream_tokens": 60, "executed_flops": 30}},
        "measured": {"seconds": {"train": 5.0, "save": 1.0}},
    }  # fmt: skip
    (home / "01-reinforce/model").mkdir()
    (home / "01-reinforce/model/manifest.json").write_text(json.dumps({"stage": {"steps": 9, "training": training}}))
    return home


def test_the_gain_is_over_the_items_of_all_seeds_and_the_test_is_mcnemars(tmp_path: Path) -> None:
    # seed 0: 10 items, 2 right before and 8 after, one of the two lost; seed 1: 5 items, 1 and 3
    runs = {
        0: run_folder(tmp_path, "a", [1, 1, 0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 1, 1, 1, 0]),
        1: run_folder(tmp_path, "b", [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]),
    }
    found = tool.summary("grpo", runs, "sums")
    assert found["n"] == 15 and found["before"] == pytest.approx(3 / 15) and found["gain"] == pytest.approx((11 - 3) / 15)
    wins, losses = 7 + 2, 1
    assert found["p"] == pytest.approx(2 * sum(comb(10, k) for k in range(losses + 1)) / 2**10) and wins + losses == 10
    assert [s["gain"] for s in found["seeds"]] == pytest.approx([0.6, 0.4])
    seed = found["seeds"][0]
    assert (seed["steps"], seed["sampled_tokens"], seed["scored_tokens"], seed["trained_tokens"], seed["flops"], seed["seconds"]) == (9, 50, 7, 60, 40, 6.0)
    assert (seed["commit"], seed["sampler_gap"]) == ("abc", 3e-6)
    error = ((0.5**2 + 0.3**2) / 32) ** 0.5  # of two rounds of 32 samples; the second step of the first round says it again
    assert seed["reward"].pop("curve") == [0.5, 0.6, 0.7]
    assert seed["reward"] == pytest.approx({"first": 0.5, "last": 0.7, "error": error, "rounds": 3})


def row(gain: float = 0.05, p: float = 1e-4, each: tuple[float, ...] = (0.05, 0.04, 0.06)) -> dict[str, Any]:
    cost = {"sampled_tokens": 2e5, "trained_tokens": 1e5, "flops": 2e12, "seconds": 50.0, "steps": 30}
    return {"row": "grpo", "n": 3000, "before": 0.6, "after": 0.6 + gain, "gain": gain, "interval": [gain - 0.02, gain + 0.02], "p": p,
            "seeds": [{"seed": i, "gain": g, **cost} for i, g in enumerate(each)]}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "met"),
    [
        (row(), True), (row(gain=0.0399), False), (row(p=0.01), False), (row(each=(0.09, 0.06, 0.0)), False),
        ({"row": "ppo", "not_measured": "it needs a critic"}, None),
    ],
)  # fmt: skip
def test_four_points_that_are_sure_and_in_every_seed(given: dict[str, Any], met: bool | None) -> None:
    assert evidence.criterion(given).met is met


@pytest.mark.parametrize(("last", "met"), [(0.6, True), (0.45, True), (0.39, False)])
def test_a_short_run_may_not_fall_clearly(last: float, met: bool) -> None:
    short = row()
    for seed in short["seeds"]:
        seed["reward"] = {"first": 0.5, "last": 0.55, "error": 0.05, "rounds": 20}
    short["seeds"][1]["reward"]["last"] = last
    (found,) = evidence.criteria({"id": evidence.SHORT, "rows": [short]})
    assert found.met is met and f"-> {last:.3f}" in found.measured
    assert evidence.not_falling({"row": "opo", "not_measured": "diverged"}).met is None


@pytest.mark.parametrize(("last", "met"), [(0.6, True), (0.53, False), (0.4, False)])
def test_a_recipes_training_reward_has_to_rise_and_is_shown_by_tenths(last: float, met: bool, tmp_path: Path) -> None:
    one = row(each=(0.05,)) | {"row": "gemma_grpo"}
    one["seeds"][0] |= {"reward": {"first": 0.5, "last": last, "error": 0.02, "rounds": 20, "curve": [k / 100 for k in range(20)]}, "commit": "abcdef0123456789"}
    stored = {"schema": 1, "id": evidence.GEMMA, "date": "2026-11-25", "command": "c", "about": "How.", "items": 400, "environment": {"threads": 2}, "rows": [one]}
    assert [c.met for c in evidence.criteria(stored)] == [True, met]
    report.store(stored, tmp_path)
    text = report.page(report.newest(tmp_path))
    assert "| gemma_grpo | 0.005 | 0.025 |" in text and "0.185 |" in text and "runs of commit abcdef012345, 2 threads a run" in text
    assert evidence.curve({"row": "x", "seeds": [{"reward": {"curve": [0.1, 0.2]}}]})[1:] == ["0.100"] * 5 + ["0.200"] * 5  # fewer rounds than tenths


def test_every_row_has_its_run() -> None:
    assert sorted([*tool.ROWS, *tool.OTHERS]) == sorted(POLICY_GRADIENT)


def test_the_section_says_gain_test_seeds_and_cost(tmp_path: Path) -> None:
    stored = {
        "schema": 1, "id": evidence.ID, "date": "2026-11-25", "command": "python tools/evidence.py", "about": "How.", "items": 1000,
        "environment": {"commit": "abc", "threads": 1}, "rows": [row(), {"row": "ppo", "not_measured": "ended with 2: no | critic\nmore"}],
    }  # fmt: skip
    report.store(stored, tmp_path)
    text = report.page(report.newest(tmp_path))
    assert "| grpo | 60.0 / 65.0 | **+5.0** (+3.0 to +7.0) | 1.0e-04 | +5.0, +4.0, +6.0 | 200 k / 100 k | 2.00 | 50 | 30 |" in text
    assert "| grpo | >= 4 points, p < 0.01, each seed above 0 | +5.0, p = 1.0e-04, by seed +5.0, +4.0, +6.0 | met |" in text
    assert "not measured: ended with 2: no / critic |" in text and "Not measured yet: `python tools/evidence.py --recipe" in text


def test_rows_start_from_one_model_and_are_judged_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[dict[str, Any]] = []

    def runner(recipe: dict[str, Any]) -> Path:
        made.append(recipe)
        if recipe["name"].startswith("rloo"):
            raise tool.Failed("rloo ended with 5: diverged")
        if recipe["name"].startswith("start"):
            return tmp_path / recipe["name"]
        return run_folder(tmp_path, recipe["name"], [0] * 20, [1] * 20)

    found = tool.over_rows(["grpo", "rloo", "dr_grpo"], [0, 1], runner, 2, {"train.steps": 3, "rollouts.top_p": 0.9})
    assert [r.get("gain") for r in found] == [1.0, None, 1.0] and found[1]["not_measured"] == "rloo ended with 5: diverged"
    starts = {r["seed"]: r for r in made if r["name"].startswith("start")}
    rest = [r for r in made if r not in starts.values()]
    assert len(starts) == 2 and len(rest) == 6 and len({r["name"] for r in made}) == 8
    for recipe in rest:
        assert recipe["model"] == str(tmp_path / starts[recipe["seed"]]["name"] / "01-sft/model")
        assert recipe["evals"]["sums"]["rows"] == 1000 and recipe["evals"]["sums"]["strategies"] == ["greedy"]
        assert recipe["stages"][0]["train"]["steps"] == 3 and recipe["stages"][0]["rollouts"]["top_p"] == 0.9
    for recipe in made:  # burnish takes them
        Path("r.yaml").write_text(yaml.safe_dump(recipe))
        assert load("r.yaml").recipe.name == recipe["name"]
    assert tool.named(rest[0], "x")["name"] != tool.named({**rest[0], "seed": 9}, "x")["name"]


def test_a_finished_run_is_kept_and_an_unfinished_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[list[str]] = []
    code = 0

    def run(command: list[str], **given: Any) -> Any:
        words.append(command)
        given["stdout"].write("one\nlast words\n")
        assert given["env"]["OMP_NUM_THREADS"] == "1" and given["cwd"] == tmp_path
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    runner, recipe = tool.Runner(tmp_path, 1), {"name": "grpo-0-12345678", "seed": 0}
    home = runner(recipe)
    assert home == tmp_path / "runs/grpo-0-12345678" and words[-1][-1] == str(tmp_path / "grpo-0-12345678.yaml")
    home.mkdir(parents=True)
    for status, calls in (("interrupted", 2), ("complete", 2)):
        (home / "run.json").write_text(json.dumps({"status": status}))
        runner(recipe)
        assert len(words) == calls and words[-1][-1] == "--resume"
    (home / "run.json").write_text(json.dumps({"status": "failed"}))
    code = 5
    with pytest.raises(tool.Failed, match=r"ended with 5: .*last words"):
        runner(recipe)
