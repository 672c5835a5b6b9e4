"""report.json against the files it was made from: finished, running, interrupted, crashed, missing and damaged."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from burnish.core.errors import ConfigError
from burnish.core.runs import RunFolder
from burnish.report.collect import POINTS, SAMPLES, collect
from burnish.report.html import render
from burnish.report.schema import Report, json_schema
from burnish.report.write import write_report
from tests.report.synthetic import build, change, grade, lines, metrics, write

FILES = ("run.json", "recipe.yaml", "resolved.yaml", "environment.json", "decisions.json", "00-base/stage.json", "00-base/ledger.json",
         "00-base/evals/sums.json", "01-sft/stage.json", "01-sft/ledger.json", "01-sft/metrics.jsonl", "01-sft/timing.jsonl",
         "01-sft/evals/sums.json")  # fmt: skip


def valid(report: dict[str, Any]) -> dict[str, Any]:
    """The report as another program reads it; fails where it is not of its schema."""
    text = json.dumps(report, allow_nan=False)
    Report.model_validate_json(text)
    return json.loads(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One eval of eight questions and two samples: quick to read a thousand times."""
    root = build(tmp_path_factory.mktemp("runs") / "small", n=8, steps=6)
    for stage in root.glob("0*"):
        (stage / "evals" / "route.json").unlink()
        (stage / "evals" / "held_out.json").unlink()
        path = stage / "evals" / "sums.json"
        change(path, samples=json.loads(path.read_text())["samples"][:2])
    return root


def copy(small: Path, tmp_path: Path) -> Path:
    shutil.copytree(small, tmp_path / "r")
    return tmp_path / "r"


def texts(report: dict[str, Any], about: str) -> list[str]:
    return [w["text"] for w in report["warnings"] if w["about"] == about]


def test_the_report_is_of_its_schema_and_begins_with_the_base_model(whole: Path) -> None:
    report = valid(collect(whole))
    assert report["schema"] == 1 and [s["name"] for s in report["stages"]] == ["base", "sft"]
    assert [e["eval"] for e in report["stages"][0]["evals"]] == ["sums", "route", "held_out"]  # the primary one first, likelihoods last
    assert report["run"]["state"] == "finished" and report["verdict"]["outcome"] == "improved"


def test_the_shipped_schema_is_the_one_the_code_has() -> None:
    shipped = Path(json_schema.__code__.co_filename).with_name("schema.json").read_text(encoding="utf-8")
    assert shipped == json_schema(), "python -m burnish.report.schema > src/burnish/report/schema.json"
    assert json.loads(shipped)["properties"]["schema"]["const"] == 1


def test_a_report_of_another_shape_is_refused(whole: Path) -> None:
    report = collect(whole)
    for wrong in ({"schema": 2}, {"stages": []}, {"more": 1}):
        with pytest.raises(ValueError):
            valid(report | wrong)


def test_accuracies_and_costs_per_question(tmp_path: Path) -> None:
    root = build(tmp_path / "r", n=8)
    grade(root, "01-sft", "sums", {"greedy": [1, 1, 1, 0], "vote:4": [1, 1, 1, 1], "pass@4": [1, 1, 1, 1]}, tokens=7, flops=100)
    rows = {r["strategy"]: r for r in collect(root)["stages"][1]["evals"][0]["strategies"]}
    assert rows["greedy"]["accuracy"] == 0.75 and rows["greedy"]["n"] == 4
    assert rows["greedy"]["per_question"] == {"prefill_tokens": 5, "sampled_tokens": 7, "scored_tokens": 0, "useful_flops": 50, "executed_flops": 100}
    assert rows["vote:4"]["per_question"]["sampled_tokens"] == 28 and rows["vote:4"]["completions"] == 16
    assert [r["oracle"] for r in rows.values()] == [False, False, True]


def test_the_grades_count_and_not_the_accuracy_beside_them(small: Path, tmp_path: Path) -> None:
    root = copy(small, tmp_path)
    path = root / "01-sft" / "evals" / "sums.json"
    data = json.loads(path.read_text())
    data["strategies"][0]["accuracy"] = 0.99
    write(path, data)
    report = collect(root)
    row = report["stages"][1]["evals"][0]["strategies"][0]
    assert row["accuracy"] == sum(data["strategies"][0]["correct"]) / 8
    assert any("says 0.9900" in t for t in texts(report, "damaged"))


def test_the_ledger_adds_up(whole: Path) -> None:
    report = collect(whole)
    base, sft, run = report["stages"][0]["ledger"], report["stages"][1]["ledger"], report["ledger"]
    assert sft["tokens"] == {"prefill": 78_428, "sampled": 1_573_000, "scored": 0, "stream": 184_320 + 36_864, "label": 121_116 + 24_223}
    assert sft["useful_flops"] == 2_910_000_000_000 + 1_184_000_000_000
    assert sft["executed_flops"] == 3_304_000_000_000 + 1_292_000_000_000 + 81_000_000_000
    # validation says only what it executed, so it is in neither half of the ratio
    assert sft["work_efficiency"] == pytest.approx((2910 + 1184) / (3304 + 1292))
    assert sft["seconds"] == pytest.approx(157.2 + 41.7 + 3.1 + 0.8) and sft["phases"]["train"]["seconds"] == 41.7
    assert run["tokens"]["sampled"] == base["tokens"]["sampled"] + 1_573_000 and run["peak_memory_bytes"] == 702_000_000
    assert run["seconds"] == pytest.approx(base["seconds"] + sft["seconds"]) and run["work_efficiency"] == pytest.approx((2910 * 2 + 1184) / (3304 * 2 + 1292))
    assert run["joules"] is None and run["money"] is None  # not measured, not 0
    assert "stream" not in base["tokens"]


def test_the_curves_are_the_metrics(small: Path) -> None:
    rows = [json.loads(line) for line in (small / "01-sft" / "metrics.jsonl").read_text().splitlines()]
    curves = collect(small)["stages"][1]["curves"]
    train = [r for r in rows if r["kind"] == "train"]
    for name in ("step", "loss", "grad_norm", "lr"):
        assert curves[name] == [r[name] for r in train]
    assert curves["steps_per_point"] == 1 and curves["resumed_after"] == []


def test_long_curves_are_averaged_and_spikes_survive(small: Path, tmp_path: Path) -> None:
    root = copy(small, tmp_path)
    rows = metrics(random.Random(0), 1500)
    train = [r for r in rows if r["kind"] == "train"]
    train[700] |= {"grad_norm": 99.0}
    train[701] |= {"loss": None, "grad_norm": None}
    lines(root / "01-sft" / "metrics.jsonl", rows)
    curves = collect(root)["stages"][1]["curves"]
    assert curves["steps_per_point"] == 3 and len(curves["step"]) == 500 <= POINTS and curves["step"][-1] == 1500
    assert curves["loss"][0] == pytest.approx(sum(r["loss"] for r in train[:3]) / 3)
    assert curves["loss"][233] == pytest.approx((train[699]["loss"] + train[700]["loss"]) / 2) and max(curves["grad_norm"]) == 99.0
    assert curves["validation_step"][-1] == 1500


def test_resumes_are_taken_from_the_timing(small: Path, tmp_path: Path) -> None:
    root = copy(small, tmp_path)
    lines(root / "01-sft" / "timing.jsonl", [{"step": 1, "seconds": 1, "train_tokens_per_s": 10}, {"step": 3, "kind": "resume"}, {"step": 4, "train_tokens_per_s": 30}])
    change(root / "run.json", starts=2)
    report = collect(root)
    assert report["stages"][1]["curves"]["resumed_after"] == [3] and report["stages"][1]["curves"]["median_tokens_per_s"] == 20
    assert texts(report, "resumed") == ["The run was resumed once."]


def test_samples_stand_side_by_side(whole: Path) -> None:
    samples = collect(whole)["samples"]
    assert len(samples) == 2 * SAMPLES and {s["eval"] for s in samples} == {"sums", "route"}
    assert all([e["stage"] for e in s["stages"]] == ["base", "sft"] for s in samples)
    source = json.loads((whole / "01-sft" / "evals" / "sums.json").read_text())["samples"][3]
    mine = next(s for s in samples if s["id"] == source["id"])
    assert [(c["strategy"], c["text"], c["correct"]) for c in mine["stages"][1]["completions"]] == [
        (c["strategy"], c["text"], c["correct"]) for c in source["completions"]
    ]


def test_long_texts_are_cut_and_say_so(small: Path, tmp_path: Path) -> None:
    root = copy(small, tmp_path)
    path = root / "00-base" / "evals" / "sums.json"
    data = json.loads(path.read_text())
    data["samples"][0]["completions"][0] |= {"text": "x" * 5000, "answer": 12}
    data["samples"][0]["completions"][1] |= {"text": None, "answer": None}
    write(path, data)
    first, second = collect(root)["samples"][0]["stages"][0]["completions"][:2]
    assert (len(first["text"]), first["cut"], first["answer"]) == (2000, 3000, "12") and (second["text"], second["answer"]) == ("", None)


# ---- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "state"), [("complete", "finished"), ("stopped by budget", "stopped by budget"), ("interrupted", "interrupted"),
                                               ("failed", "failed"), ("running", "crashed"), ("odd", "unknown"), (None, "unknown")])  # fmt: skip
def test_it_says_what_became_of_the_run(small: Path, tmp_path: Path, status: str | None, state: str) -> None:
    root = copy(small, tmp_path)
    change(root / "run.json", status=status)
    report = valid(collect(root))
    assert report["run"]["state"] == state
    assert bool(texts(report, "state")) == (state != "finished")


def test_a_run_whose_lock_is_held_is_running(small: Path, tmp_path: Path) -> None:
    root = copy(small, tmp_path)
    change(root / "run.json", status="running")
    with RunFolder(root):
        assert collect(root)["run"]["state"] == "running"
        write_report(root)  # reading and writing the report needs no lock
    assert collect(root)["run"]["state"] == "crashed"


def test_crashed_in_the_middle_of_training(small: Path, tmp_path: Path) -> None:
    root = copy(small, tmp_path)
    change(root / "run.json", status="running", finished=None)
    change(root / "01-sft" / "stage.json", status="running", steps=None)
    shutil.rmtree(root / "01-sft" / "evals")
    (root / "01-sft" / "ledger.json").unlink()
    path = root / "01-sft" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]) + '{"step": 4, "kind"')
    report = valid(collect(root))
    assert report["stages"][1]["status"] == "not finished" and report["stages"][1]["curves"]["step"] == [1, 2, 3]
    assert report["verdict"]["outcome"] == "invalid" and "ended before a trained model was evaluated" in report["verdict"]["headline"]
    assert not texts(report, "damaged") and not texts(report, "missing")  # a torn line and files not yet written are its nature
    assert report["verdict"]["primary"] is None and report["stages"][1]["ledger"] is None


def test_crashed_before_anything(tmp_path: Path) -> None:
    root = tmp_path / "r"
    primary = {"eval": "sums", "strategy": "greedy"}
    write(root / "run.json", {"schema": 1, "name": "r", "status": "running", "primary": primary, "resolved": {"stages": [{"name": "sft"}]}})
    report = valid(collect(root))
    assert [s["name"] for s in report["stages"]] == ["base"] and report["stages"][0]["status"] == "missing"
    assert report["verdict"]["headline"] == "No verdict: the run ended before anything was evaluated"
    assert texts(report, "stage") == ["The stage base is missing.", "The stage sft is in the recipe and never began."]
    write_report(root)


def test_stages_that_never_began_and_a_verdict_so_far(small: Path, tmp_path: Path) -> None:
    root = copy(small, tmp_path)
    change(root / "run.json", resolved={"stages": [{"name": "sft"}, {"name": "grpo"}]}, status="interrupted")
    report = collect(root)
    assert texts(report, "stage") == ["The stage grpo is in the recipe and never began."]
    assert report["verdict"]["headline"].startswith("After sft, the last stage measured on it.")


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_warnings_are_found_and_doubts_come_first(small: Path, tmp_path: Path) -> None:
    root = copy(small, tmp_path)
    path = root / "01-sft" / "evals" / "sums.json"
    data = json.loads(path.read_text())
    data["settings"] |= {"chosen_on": "validation, n=50, vote:4", "max_new_tokens": 48}
    data["strategies"][0] |= {"truncated": 4, "unanswered": 2}
    write(path, data)
    change(root / "00-base" / "evals" / "sums.json", settings=data["settings"])
    change(root / "01-sft" / "stage.json", skipped_steps=2, status="stopped by budget", stopped_by="budget: stage tokens 9 of 8", output="00" * 32,
           data={"rows": 90, "dropped": {"too long": 9, "empty": 1}, "tokens": 5, "label_tokens": 3})  # fmt: skip
    held = [{"step": s, "kind": "validation", "loss": v} for s, v in ((10, 1.0), (20, 0.5), (30, 0.9))]
    lines(root / "01-sft" / "metrics.jsonl", [{"step": 1, "kind": "train", "loss": 1.0}, *held])
    report = valid(collect(root))
    levels = [w["level"] for w in report["warnings"]]
    assert levels == sorted(levels)  # doubt before note
    assert texts(report, "truncated")[0].startswith("50.0 % of the completions of greedy at sft were cut at 48 tokens (max_new_tokens)")
    assert "25.0 %" in texts(report, "unanswered")[0]
    assert texts(report, "dropped") == ["sft left out 10 rows of 100 (too long: 9, empty: 1)."]
    assert texts(report, "skipped")[0].startswith("sft skipped 2 steps of 6")
    assert texts(report, "budget") == ["sft was stopped by its budget after 6 steps (stage tokens 9 of 8)."]
    assert texts(report, "unchanged") and "only 8 questions" in texts(report, "n")[0] and "50 questions" in texts(report, "temperature")[0]
    assert "lowest at step 20 (0.500) and ended at 0.900" in texts(report, "overfitting")[0]


def test_a_regression_elsewhere_is_a_doubt(tmp_path: Path) -> None:
    root = build(tmp_path / "r", n=8)
    for name, before, after in (("sums", [0] * 10, [1] * 10), ("route", [1] * 10, [0] * 10)):
        grade(root, "00-base", name, {"greedy": before})
        grade(root, "01-sft", name, {"greedy": after})
    report = collect(root)
    assert report["verdict"]["outcome"] == "improved"
    assert texts(report, "regression") == ["route with greedy got worse at sft: from 100.0 % to 0.0 % (p = 0.002)."]


def test_a_clean_run_has_nothing_to_warn_about(tmp_path: Path) -> None:
    root = build(tmp_path / "r")
    for stage in ("00-base", "01-sft"):
        for path in (root / stage / "evals").glob("*.json"):
            data = json.loads(path.read_text())
            write(path, data | {"strategies": [s | {"truncated": 0} for s in data["strategies"]]})
    data = json.loads((root / "01-sft" / "stage.json").read_text())["data"]
    change(root / "01-sft" / "stage.json", data=data | {"dropped": {}})
    assert collect(root)["warnings"] == []


# ---- what is no run, missing, damaged ---------------------------------------------------------------------------------


def test_what_is_no_run_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such run folder"):
        collect(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        collect(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no run") as caught:
        collect(tmp_path / "empty")
    assert caught.value.remedy


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_costs_its_part_and_is_named(small: Path, tmp_path: Path, name: str) -> None:
    root = copy(small, tmp_path)
    (root / name).unlink()
    report = valid(collect(root))
    assert render(report)
    if "evals" not in name:
        assert name in " ".join(texts(report, "missing"))
    assert len(report["stages"]) == 2


DAMAGE = {
    "empty": b"", "torn": b'{"schema": 1, "name": "s', "binary": b"\x00\xff\xfe\x80", "null": b"null", "list": b"[1, 2]", "text": b'"x"', "number": b"7",
    "nan": b'{"n": NaN, "status": 1e999}', "deep": b"[" * 100_000, "newer": b'{"schema": 99}', "odd": b'{"schema": 1, "status": 5, "strategies": 3, "n": "x"}',
    "huge": b'{"n": ' + b"9" * 5000 + b"}", "surrogate": b'{"name": "\\ud800", "status": "complete\\u0000"}',
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_never_costs_more_than_its_part(small: Path, tmp_path: Path, name: str) -> None:
    root = copy(small, tmp_path)
    for damage in DAMAGE.values():
        (root / name).write_bytes(damage)
        report = valid(collect(root))
        assert render(report)
        assert [s["name"] for s in report["stages"]] == ["base", "sft"]
        assert "Traceback" not in json.dumps(report)


def test_damage_is_said_with_file_and_key(small: Path, tmp_path: Path) -> None:
    root = copy(small, tmp_path)
    change(root / "01-sft" / "stage.json", steps="many", mask_view=[])
    change(root / "00-base" / "ledger.json", schema=2)
    path = root / "01-sft" / "evals" / "sums.json"
    data = json.loads(path.read_text())
    data["strategies"][1]["correct"] = [1]
    data["strategies"].append(data["strategies"][0])
    write(path, data)
    found = " ".join(texts(collect(root), "damaged"))
    assert "01-sft/stage.json: steps: " in found and "got 'many'" in found
    assert "00-base/ledger.json was written by a newer burnish (schema 2, this one reads 1)" in found
    assert "vote:4 has 1 grades for 8 items" in found and "lists greedy twice" in found


def test_links_and_folders_in_place_of_files_are_not_followed(small: Path, tmp_path: Path) -> None:
    root = copy(small, tmp_path)
    (root / "environment.json").unlink()
    (root / "environment.json").symlink_to("/etc/passwd")
    (root / "decisions.json").unlink()
    (root / "decisions.json").mkdir()
    report = valid(collect(root))
    assert report["provenance"]["environment"] == {} and len(texts(report, "damaged")) == 2


def test_values_of_any_type_anywhere_are_survived(small: Path, tmp_path: Path) -> None:
    """Replace one value after the other, anywhere in any file, by something of another kind."""
    root = copy(small, tmp_path)
    rng = random.Random(0)
    odd = [None, -1, 0, 2**70, 1.5, "", "x", "\u202e<script>", [], {}, [[]], {"a": {"b": []}}, True]
    for _ in range(80):
        name = rng.choice([f for f in FILES if f.endswith(".json")])
        original = (root / name).read_text()
        data = json.loads(original)
        parent, key = rng.choice(list(_places(data)))
        parent[key] = rng.choice(odd)
        write(root / name, data)
        assert render(valid(collect(root)))
        (root / name).write_text(original)


def _places(value: Any) -> Any:
    for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(child, dict | list):
            yield from _places(child)


def test_a_report_is_the_same_when_written_again(small: Path, tmp_path: Path) -> None:
    root = copy(small, tmp_path)
    write_report(root)
    first = (root / "report.json").read_bytes(), (root / "report.html").read_bytes()
    write_report(root)
    assert first == ((root / "report.json").read_bytes(), (root / "report.html").read_bytes())
    assert [p.name for p in root.glob(".*")] == []
