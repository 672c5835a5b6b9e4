"""Every mark stands where its number says: coordinates are read back and turned into values again."""

import math

import pytest

from burnish.report.charts import Dot, Line, Scale, curve, dots, fitted, frontier, share_scale
from tests.report.page import Node, parse


def percent(node: Node, key: str) -> float:
    assert node.attributes[key].endswith("%")
    return float(node.attributes[key][:-1]) / 100


def test_ticks_are_round_inside_the_scale_and_few() -> None:
    assert Scale(0, 1).ticks(5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert Scale(1, 60).ticks(6) == [10, 20, 30, 40, 50, 60]
    assert Scale(0.1, 0.9).ticks(4) == [0.2, 0.4, 0.6, 0.8]
    assert Scale(30, 600, log=True).ticks(5) == [50, 100, 200, 500]
    assert Scale(1, 1e9, log=True).ticks(5) == sorted(Scale(1, 1e9, log=True).ticks(5)) and len(Scale(1, 1e9, log=True).ticks(5)) <= 6
    assert Scale(3, 3).ticks() == [3] and Scale(3, 3).at(3) == 0.5


def test_scales_hold_their_values() -> None:
    assert share_scale([0.31, 0.58]).high == 0.6 and share_scale([0.81]).high == 1.0 and share_scale([]).high == 1.0
    assert share_scale([0.6]).high == 0.6
    for values in ([1.0, 1.0], [0.0, 0.0], [-3.0, 5.0], [1e-9, 2e-9]):
        scale = fitted(values)
        assert all(0 < scale.at(v) < 1 for v in values)
    assert fitted([1.0, 3.0], zero=True).low == 0
    assert Scale(10, 1000, log=True).at(100) == pytest.approx(0.5)


def test_a_curve_goes_through_its_points_and_breaks_at_gaps() -> None:
    steps, loss = [1, 2, 3, 4, 5, 6], [2.0, 1.0, None, 0.5, 0.7, 0.25]
    held_steps, held = [3, 6], [1.5, 0.5]
    svg = parse(curve([Line("training", steps, loss, "main"), Line("validation", held_steps, held, "second", dots=True)], label="x", height=200)).one(
        "svg", class_="chart"
    )
    known = [v for v in loss + held if v is not None]
    up = fitted(known)
    lines = svg.all("polyline", class_="main")
    assert [len(n.attributes["points"].split()) for n in lines] == [2, 3]
    read = [tuple(map(float, p.split(","))) for n in lines for p in n.attributes["points"].split()]
    expected = [((s - 1) / 5 * 1000, 200 * (1 - up.at(v))) for s, v in zip(steps, loss) if v is not None]
    assert read == [pytest.approx(e, abs=0.01) for e in expected]
    assert read[0][1] < read[1][1]  # a higher loss stands higher
    marks = svg.all("circle")
    assert [(percent(m, "cx"), float(m.attributes["cy"])) for m in marks] == [
        pytest.approx(((s - 1) / 5, 200 * (1 - up.at(v))), abs=0.01) for s, v in zip(held_steps, held)
    ]
    assert [m.one("title").text for m in marks] == ["validation, step 3: 1.50", "validation, step 6: 0.500"]
    assert {"training", "validation"} <= {n.text for n in svg.all("text")}


def test_resumes_are_marked_at_their_step_and_only_inside() -> None:
    svg = parse(curve([Line("loss", [1, 101], [1.0, 2.0], "main")], label="x", height=100, resumed=[26, 500]))
    (mark,) = svg.all("line", class_="resume")
    assert percent(mark, "x1") == pytest.approx(0.25) and mark.one("title").text == "resumed after step 26"


def test_a_curve_without_values_is_no_chart_and_one_value_is_a_point() -> None:
    assert curve([Line("loss", [1], [None], "main")], label="x", height=100) == ""
    assert len(parse(curve([Line("loss", [1], [0.5], "main")], label="x", height=100)).all("polyline")) == 1


def test_dots_and_whiskers_stand_at_their_shares() -> None:
    groups = [
        ("greedy", [Dot("base", "greedy", 0.3, [0.25, 0.35], 1000, False, "s0"), Dot("sft", "greedy", 0.58, [0.55, 0.61], 1000, False, "s1")]),
        ("pass@4 (oracle)", [Dot("sft", "pass@4", 0.92, [0.9, 0.94], 1000, True, "s1")]),
    ]
    svg = parse(dots(groups, Scale(0, 1), label="x")).one("svg", role="img")
    assert [percent(c, "cx") for c in svg.all("circle")] == pytest.approx([0.3, 0.58, 0.92])
    whiskers = svg.all("line", class_="whisker")
    assert [(percent(w, "x1"), percent(w, "x2")) for w in whiskers] == [pytest.approx(p) for p in ([0.25, 0.35], [0.55, 0.61], [0.9, 0.94])]
    assert [t.text for t in svg.all("text", class_="value")] == ["30.0 %", "58.0 %", "92.0 %"]
    ys = [float(c.attributes["cy"]) for c in svg.all("circle")]
    assert ys == sorted(set(ys)) and ys[-1] < float(svg.attributes["height"])
    assert svg.all("circle")[0].one("title").text == "greedy, base: 30.0 %, 95 % interval 25.0 to 35.0 %, n = 1,000"
    assert len(svg.all("circle", class_="oracle")) == 1


def point(stage: str, strategy: str, tokens: float | None, accuracy: float, best: bool) -> dict:
    return {"stage": stage, "strategy": strategy, "sampled_tokens": tokens, "executed_flops": None, "accuracy": accuracy,
            "interval": [accuracy - 0.03, accuracy + 0.03], "on_frontier": best, "best_buy": best}  # fmt: skip


def test_the_frontier_is_drawn_on_a_log_axis_and_joins_only_its_points() -> None:
    points = [point("base", "greedy", 30, 0.3, True), point("sft", "vote:4", 120, 0.2, False), point("sft", "vote:16", 480, 0.7, True),
              point("sft", "lost", None, 0.5, False)]  # fmt: skip
    svg = parse(frontier(points, {"base": "s0", "sft": "s1"}, Scale(0, 0.8), axis="sampled_tokens", label="x", height=200)).one("svg", role="img")
    low, high = math.log(30 / 1.35), math.log(480 * 1.35)
    across = [(math.log(t) - low) / (high - low) for t in (30, 120, 480)]
    assert [percent(c, "cx") for c in svg.all("circle")] == pytest.approx(across, abs=1e-5)
    assert [float(c.attributes["cy"]) for c in svg.all("circle")] == pytest.approx([200 * (1 - a / 0.8) for a in (0.3, 0.2, 0.7)], abs=1e-3)
    joined = [tuple(map(float, p.split(","))) for p in svg.one("polyline", class_="front").attributes["points"].split()]
    assert joined == [pytest.approx(p, abs=0.01) for p in ((1000 * across[0], 125), (1000 * across[2], 25))]
    assert {"greedy", "vote:4", "vote:16"} <= {t.text for t in svg.all("text", class_="label")}
    assert svg.all("circle")[2].one("title").text == "vote:16, sft: 70.0 % (67.0 to 73.0 %) for 480 tokens a question"


def test_labels_cover_neither_each_other_nor_a_point() -> None:
    points = [point("sft", f"best_of:{n}@prm(min)", 400 + n, 0.5 + 0.001 * n, False) for n in range(12)]
    svg = parse(frontier(points, {"sft": "s1"}, Scale(0, 1), axis="sampled_tokens", label="x"))
    shown = svg.all("text", class_="label")
    assert 1 <= len(shown) < 12  # where there is no room a name is left out, never drawn over another
    assert len(svg.all("circle")) == 12
