"""The verdict, by hand: small vectors whose answers can be worked out on paper."""

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.report.collect import collect
from burnish.report.html import render
from burnish.report.pairs import mean_and_interval
from burnish.report.schema import Report
from burnish.report.verdict import summary
from tests.report.synthetic import build, change, grade

BASE, SFT = "00-base", "01-sft"


def run(tmp_path: Path, base: dict[str, Any], sft: dict[str, Any], **more: Any) -> dict[str, Any]:
    root = build(tmp_path / "r", n=2)
    for stage in (BASE, SFT):
        for name in ("route", "held_out"):
            (root / stage / "evals" / f"{name}.json").unlink()
    grade(root, BASE, "sums", base)
    grade(root, SFT, "sums", sft)
    if more:
        change(root / "run.json", **more)
    return collect(root)


def test_improved_with_the_numbers_of_the_hand(tmp_path: Path) -> None:
    # 10 questions: 2 right before, 10 after; all 8 that differ are won: p = 2 / 2^8
    report = run(tmp_path, {"greedy": [1, 1] + [0] * 8}, {"greedy": [1] * 10})
    verdict = report["verdict"]
    primary = verdict["primary"]
    assert verdict["outcome"] == "improved" and verdict["headline"] == "Improved: sums from 20.0 % to 100.0 %"
    assert (primary["base"], primary["value"], primary["difference"], primary["p"], primary["n"]) == (0.2, 1.0, 0.8, 2 / 256, 10)
    assert primary["interval"][0] < 0.8 < primary["interval"][1] and primary["interval"][0] > 0
    (row,) = report["comparisons"]
    assert (row["wins"], row["losses"], row["outcome"], row["kind"]) == (8, 0, "better", "stage")
    assert "10 questions of sums with greedy, sft is right on 100.0 % and the base model on 20.0 %" in verdict["sentence"]
    assert "+80.0 points" in verdict["sentence"] and "p = 0.008" in verdict["sentence"]


def test_worse_is_improved_with_the_sign_turned(tmp_path: Path) -> None:
    report = run(tmp_path, {"greedy": [1] * 10}, {"greedy": [1, 1] + [0] * 8})
    verdict = report["verdict"]
    assert verdict["outcome"] == "worse" and verdict["primary"]["difference"] == -0.8 and verdict["primary"]["p"] == 2 / 256
    assert verdict["headline"] == "Worse: sums from 100.0 % to 20.0 %" and "−80.0 points" in verdict["sentence"]
    assert (report["comparisons"][0]["wins"], report["comparisons"][0]["losses"]) == (0, 8)


def test_no_significant_change_says_what_could_go_unseen(tmp_path: Path) -> None:
    # 5 won of 5 that differ: p = 2 / 32 > 0.05
    verdict = run(tmp_path, {"greedy": [0] * 5 + [1] * 5}, {"greedy": [1] * 10})["verdict"]
    assert verdict["outcome"] == "no significant change" and verdict["primary"]["p"] == 2 / 32
    assert verdict["headline"].startswith("No significant change") and "can go unseen" in verdict["sentence"]


def test_intervals_are_wilsons(tmp_path: Path) -> None:
    # 2 of 4: 1/2 -+ z sqrt(1/16 + z^2/64) / (1 + z^2/4), z = 1.959964
    mean, interval = mean_and_interval([1, 0, 0, 1])
    assert mean == 0.5 and interval == pytest.approx([0.150039, 0.849961], abs=1e-6)
    partial, limits = mean_and_interval([0.5] * 6)
    assert partial == 0.5 and limits == [0.5, 0.5]


def test_the_cost_is_said_in_the_same_units(tmp_path: Path) -> None:
    report = run(tmp_path, {"greedy": [0] * 10}, {"greedy": [1] * 10})
    cost = report["verdict"]["cost"]
    assert cost["training"] == {"tokens": 184_320, "label_tokens": 121_116, "executed_flops": 1_292_000_000_000, "seconds": 41.7}
    assert cost["answer"] == {"sampled_tokens": 10.0, "executed_flops": 1000.0} == cost["base_answer"]
    said = "Training took 184 k tokens, 1.3 TFLOP and 42 s. An answer costs 10 sampled tokens and 1.0 kFLOP; from the base model it cost 10 and 1.0 kFLOP."
    assert report["verdict"]["cost_sentence"] == said


def test_the_primary_is_the_last_stage_and_training_costs_add_up(tmp_path: Path) -> None:
    root = build(tmp_path / "r", stages=3, n=100)
    report = collect(root)
    assert report["verdict"]["primary"]["stage"] == "grpo"
    assert report["verdict"]["cost"]["training"]["tokens"] == 2 * 184_320
    (root / "01-sft" / "ledger.json").unlink()
    assert collect(root)["verdict"]["cost"]["training"]["tokens"] is None  # a part that was not measured is not 0


def test_strategies_are_compared_with_greedy_in_their_stage(tmp_path: Path) -> None:
    base = {"greedy": [1, 0, 0, 0, 0, 0, 0, 0], "vote:4": [1, 0, 0, 0, 0, 0, 0, 0]}
    sft = {"greedy": [1, 1, 0, 0, 0, 0, 0, 0], "vote:4": [1] * 8}
    rows = {(c["kind"], c["stage"], c["strategy"]): c for c in run(tmp_path, base, sft)["comparisons"]}
    assert set(rows) == {("stage", "sft", "greedy"), ("stage", "sft", "vote:4"), ("strategy", "base", "vote:4"), ("strategy", "sft", "vote:4")}
    vote = rows["strategy", "sft", "vote:4"]
    assert (vote["against_stage"], vote["against_strategy"], vote["wins"], vote["losses"], vote["p"]) == ("sft", "greedy", 6, 0, 2 / 64)
    same = rows["strategy", "base", "vote:4"]
    assert same["p"] == 1 and same["difference"] == 0 and same["interval"][0] < 0 < same["interval"][1]


def test_oracles_are_flagged_and_stay_out_of_verdict_and_frontier(tmp_path: Path) -> None:
    grades = {"greedy": [1, 0, 0, 0], "pass@4": [1, 1, 1, 1]}
    report = run(tmp_path, grades, grades)
    assert [c["oracle"] for c in report["comparisons"] if "pass@4" in (c["strategy"], c["against_strategy"])] == [True, True, True]
    assert {p["strategy"] for f in report["frontiers"] for p in f["points"]} == {"greedy"}
    asked = run(tmp_path / "2", grades, grades, primary={"eval": "sums", "strategy": "pass@4"})["verdict"]
    assert asked["outcome"] == "invalid" and "ceiling" in asked["reasons"][0] and asked["primary"] is None


def test_likelihood_of_held_out_rows_is_compared_like_grades_and_answers_nothing(tmp_path: Path) -> None:
    before, after = [0.1] * 8, [0.3] * 7 + [0.1]
    report = run(tmp_path, {"greedy": [0, 1]}, {"greedy": [1, 1]}, primary={"eval": "held_out", "strategy": "likelihood"})
    root = tmp_path / "r"
    for where, grades in ((BASE, before), (SFT, after)):
        grade(root, where, "held_out", {"likelihood": grades}, tokens=0)
    report = collect(root)
    verdict = report["verdict"]
    # seven rows rise by the same amount: 2 of 2^7 sign patterns are as far out
    assert verdict["primary"]["p"] == 2 / 128 and verdict["outcome"] == "improved" and verdict["primary"]["metric"] == "likelihood"
    assert verdict["primary"]["difference"] == pytest.approx(0.175) and verdict["primary"]["value"] == pytest.approx(0.275)
    assert verdict["sentence"].startswith("On 8 rows of held_out, sft finds the wanted tokens 27.5 % likely and the base model 10.0 %")
    assert "An answer" not in verdict["cost_sentence"]
    assert {f["eval"] for f in report["frontiers"]} == {"sums"} and {s["eval"] for s in report["samples"]} <= {"sums"}
    assert next(c for c in report["comparisons"] if c["eval"] == "held_out")["test"] == "sign flips"
    Report.model_validate_json(json.dumps(report))
    assert "Likelihood" in render(report)


def test_without_the_same_questions_there_is_no_verdict(tmp_path: Path) -> None:
    root = build(tmp_path / "r", n=4)
    change(root / SFT / "evals" / "sums.json", item_ids=["a", "b", "c", "d"])
    report = collect(root)
    assert report["verdict"]["outcome"] == "invalid" and "not asked the same questions" in report["verdict"]["sentence"]
    assert any(w["about"] == "items" and w["level"] == "doubt" for w in report["warnings"])
    assert not [c for c in report["comparisons"] if c["eval"] == "sums" and c["kind"] == "stage"]


def test_a_primary_nobody_measured_and_a_run_that_trained_nothing(tmp_path: Path) -> None:
    missing = run(tmp_path, {"greedy": [1, 0]}, {"greedy": [1, 0]}, primary={"eval": "words", "strategy": "greedy"})["verdict"]
    assert missing["outcome"] == "invalid" and "no result on words" in missing["reasons"][0]
    only = collect(build(tmp_path / "only", stages=1, n=4))["verdict"]
    assert only["outcome"] == "invalid" and "trained nothing" in only["reasons"][0]


def test_a_model_that_was_never_updated_gets_no_verdict(tmp_path: Path) -> None:
    root = build(tmp_path / "r", n=4)
    change(root / SFT / "stage.json", skipped_steps=60)
    report = collect(root)
    assert report["verdict"]["outcome"] == "invalid" and "never updated" in report["verdict"]["sentence"]


def test_without_a_primary_in_the_recipe_it_says_what_it_chose(tmp_path: Path) -> None:
    report = run(tmp_path, {"greedy": [0] * 10}, {"greedy": [1] * 10}, primary=None)
    assert report["verdict"]["primary"]["strategy"] == "greedy"
    assert [w for w in report["warnings"] if w["about"] == "primary"]


def test_summary_is_for_a_terminal(tmp_path: Path) -> None:
    report = run(tmp_path, {"greedy": [0] * 10}, {"greedy": [1] * 10})
    report["warnings"].append({"level": "doubt", "about": "x", "text": "\x1b[2Jgone\n\u202ex"})
    said = summary(report)
    assert said.splitlines()[0] == "  Improved: sums from 0.0 % to 100.0 %" and "Training took" in said
    assert "\x1b" not in said and "doubt: \\x1b[2Jgone \\u202ex" in said
