"""The frontier and the best buys, on points small enough to enumerate."""

from __future__ import annotations

import html
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from burnish.report.collect import collect
from burnish.report.frontier import frontiers, sentence
from burnish.report.html import render
from burnish.report.schema import Report
from tests.report.synthetic import build, change, grade


def stage(name: str, *rows: tuple[str, float, float, float, float | None], ledger: Any = None) -> dict[str, Any]:
    """(strategy, accuracy, sampled tokens, scored tokens, executed FLOPs) a question."""
    return {"name": name, "method": "sft", "ledger": ledger, "evals": [{"eval": "e", "strategies": [
        {"strategy": s, "oracle": s == "pass@4", "accuracy": a, "interval": [a, a],
         "per_question": {"sampled_tokens": t, "scored_tokens": scored, "executed_flops": f}} for s, a, t, scored, f in rows
    ]}]}  # fmt: skip


def on(front: dict[str, Any]) -> list[tuple[str, str]]:
    return [(p["stage"], p["strategy"]) for p in front["points"] if p["on_frontier"]]


def test_the_frontier_keeps_what_nothing_beats_at_its_price() -> None:
    tokens, flops = frontiers([
        stage("base", ("greedy", 0.3, 10, 0, 1), ("vote:4", 0.35, 40, 0, 4), ("pass@4", 1.0, 1, 0, 1)),
        stage("sft", ("greedy", 0.5, 12, 0, 1), ("vote:4", 0.5, 48, 0, 5), ("vote:16", 0.6, 200, 0, 20)),
    ])  # fmt: skip
    assert (tokens["axis"], flops["axis"]) == ("sampled_tokens", "executed_flops")
    assert on(tokens) == [("base", "greedy"), ("sft", "greedy"), ("sft", "vote:16")]
    assert on(flops) == [("sft", "greedy"), ("sft", "vote:16")]  # at the same work the worse one is dominated
    assert "pass@4" not in {p["strategy"] for p in tokens["points"]}


@pytest.mark.parametrize(
    ("points", "kept"),
    [
        ([(0.3, 10)], [0]),  # a single point
        ([(0.3, 10), (0.3, 10)], [0, 1]),  # a tie in both: neither beats the other
        ([(0.3, 10), (0.3, 20)], [0]),  # as accurate for less
        ([(0.3, 10), (0.4, 10)], [1]),  # better for as much
        ([(0.4, 20), (0.3, 10)], [0, 1]),
        ([(0.5, 5), (0.4, 10), (0.3, 20)], [0]),
        ([(0.0, 1), (0.0, 2)], [0]),
        ([(0.3, None), (0.2, 10)], [1]),  # a price nobody measured is no price, and beats nothing
    ],
)
def test_ties_dominated_and_single_points(points: list[tuple[float, float | None]], kept: list[int]) -> None:
    found = frontiers([stage("base", *((f"s{i}", a, t, 0, None) for i, (a, t) in enumerate(points)))])[0]  # type: ignore[misc]
    assert [i for i, p in enumerate(found["points"]) if p["on_frontier"]] == kept


def test_on_every_small_set_it_is_what_a_reader_would_keep() -> None:
    """All sets of three points on a 3 x 3 grid: sorted by price, a point stays where it beats every cheaper one."""
    grid = list(product((0.1, 0.2, 0.3), (1, 2, 3)))
    for points in product(grid, repeat=3):
        found = frontiers([stage("base", *((f"s{i}", a, t, 0, None) for i, (a, t) in enumerate(points)))])[0]
        wanted = [max(a for a, t in points if t <= price) == acc and min(t for a, t in points if a >= acc) == price for acc, price in points]
        assert [p["on_frontier"] for p in found["points"]] == wanted, points


def test_where_a_strategy_scores_the_price_is_in_flops_alone() -> None:
    (found,) = frontiers([stage("base", ("greedy", 0.3, 10, 0, 1), ("best_of:4@prm", 0.6, 40, 40, 9))])
    assert found["axis"] == "executed_flops"
    (cannot,) = frontiers([stage("base", ("greedy", 0.3, 10, 0, None), ("best_of:4@prm", 0.6, 40, 40, 9))])
    assert cannot["axis"] == "sampled_tokens"


def test_the_sentence_names_the_best_buy_at_every_price() -> None:
    three = [
        stage("base", ("greedy", 0.3, 41, 0, None)),
        stage("sft", ("greedy", 0.5, 41, 0, None), ("vote:4", 0.6, 160, 0, None), ("vote:16", 0.7, 640, 0, None)),
    ]
    assert frontiers(three)[0]["sentence"] == (
        "For less than 160 tokens an answer, sft greedy is the best buy (50.0 % for 41 tokens); for less than 640 tokens, sft vote:4 "
        "(60.0 % for 160 tokens); from 640 tokens on, sft vote:16 (70.0 % for 640 tokens)."
    )
    one = frontiers([stage("base", ("greedy", 0.3, 10, 0, 2e6), ("vote:4", 0.2, 40, 0, 8e6))])
    assert one[0]["sentence"] == "At any price base greedy is the best buy (30.0 % for 10 tokens an answer)."
    assert one[1]["sentence"] == "At any price base greedy is the best buy (30.0 % for 2.0 MFLOP an answer)."
    tied = frontiers([stage("base", ("sample", 0.3, 10, 0, None), ("best_of:1@logprob", 0.3, 10, 0, None))])[0]
    assert tied["sentence"] == "At any price base sample or base best_of:1@logprob is the best buy (30.0 % for 10 tokens an answer)."
    assert sentence([], "sampled_tokens") == "What an answer costs was not measured."


def report(root: Path, base: dict[str, list[int]], sft: dict[str, list[int]]) -> dict[str, Any]:
    build(root, n=4)
    for at, grades in (("00-base", base), ("01-sft", sft)):
        for name in ("sums", "route"):
            (root / at / "evals" / f"{name}.json").unlink()
        (root / at / "evals" / "held_out.json").unlink()
        grade(root, at, "sums", grades)
    return collect(root)


def test_a_step_that_could_be_chance_is_no_best_buy(tmp_path: Path) -> None:
    """Of 40 questions: greedy 10, vote:4 12 (p = 0.5), vote:8 30 (p < 0.0001 against greedy), vote:16 31 (p = 1)."""

    def right(n: int) -> list[int]:
        return [1] * n + [0] * (40 - n)

    grades = {"greedy": right(10), "vote:4": right(12), "vote:8": right(30), "vote:16": right(31)}
    found = report(tmp_path / "r", {"greedy": right(5)}, grades)
    front = found["frontiers"][0]
    rows = {(p["stage"], p["strategy"]): p for p in front["points"]}
    assert not rows["base", "greedy"]["on_frontier"]  # as dear as sft greedy, and worse
    assert [(p["best_buy"], p["p"]) for p in (rows["sft", s] for s in grades)] == [
        (True, None), (False, 0.5), (True, pytest.approx(2 / 2**20)), (False, 1.0),
    ]  # fmt: skip
    assert front["sentence"] == (
        "For less than 80 tokens an answer, sft greedy is the best buy (25.0 % for 10 tokens); from 80 tokens on, sft vote:8 "
        "(75.0 %, p < 0.0001). Dearer and not clearly better than the best buy below: sft vote:4 (30.0 %, p = 0.50), "
        "sft vote:16 (77.5 %, p = 1.00)."
    )
    Report.model_validate_json(json.dumps(found))


def said(found: dict[str, Any]) -> str:
    """The page's words, its escapes and unbreakable blanks undone."""
    return html.unescape(render(found)).replace("\u00a0", " ")


def test_what_training_took_stands_beside_it(tmp_path: Path) -> None:
    root = build(tmp_path / "r", stages=3)
    found = collect(root)
    for front in found["frontiers"]:
        base, sft, grpo = front["training"]
        assert base == {"stage": "base", "tokens": 0, "label_tokens": 0, "executed_flops": 0, "seconds": 0}
        assert (sft["tokens"], sft["executed_flops"], sft["seconds"]) == (184_320, 1_292_000_000_000, 41.7)
        assert (grpo["tokens"], grpo["executed_flops"]) == (2 * 184_320, 2 * 1_292_000_000_000)
    page = said(found)
    assert "Training up to sft, paid once" in page and "1.3 TFLOP, 184 k tokens, 42 s" in page
    ledger = json.loads((root / "01-sft" / "ledger.json").read_text())
    del ledger["counted"]["train"]["executed_flops"]
    change(root / "01-sft" / "ledger.json", counted=ledger["counted"])
    later = collect(root)["frontiers"][0]["training"]
    assert later[1]["executed_flops"] is later[2]["executed_flops"] is None and later[2]["tokens"] == 2 * 184_320


def test_the_page_shows_both_prices_of_every_eval_and_says_the_sentence(tmp_path: Path) -> None:
    found = collect(build(tmp_path / "r"))
    assert [(f["eval"], f["axis"]) for f in found["frontiers"]] == [
        (name, axis) for name in ("sums", "route") for axis in ("sampled_tokens", "executed_flops")
    ]  # fmt: skip
    page = said(found)
    for front in found["frontiers"]:
        assert front["sentence"] in page and front["sentence"].count("best buy") >= 1
    rng = random.Random(0)
    for front in found["frontiers"]:  # the order in which strategies were measured does not matter
        points = [dict(p) for p in front["points"]]
        rng.shuffle(points)
        assert sentence(points, front["axis"]).split(";")[0] == front["sentence"].split(";")[0]
