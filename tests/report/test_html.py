"""The page: whole, closed to the world, readable by every reader, and never the author of what a model wrote."""

import base64
import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from burnish.report import html
from burnish.report.collect import collect
from burnish.report.html import render
from burnish.report.markup import visible
from tests.report.page import Node, parse
from tests.report.synthetic import build, change, write
from tests.report.test_markup import HOSTILE

FOLDER = Path(html.__file__).parent
EVIL = "".join(HOSTILE).replace("\ud800", "")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return collect(build(tmp_path_factory.mktemp("runs") / "r"))


@pytest.fixture(scope="module")
def page(report: dict[str, Any]) -> str:
    return render(report)


@pytest.fixture(scope="module")
def tree(page: str) -> Node:
    return parse(page)


def section(tree: Node, name: str) -> Node:
    return tree.one("section", id=name)


def test_the_verdict_stands_first_then_the_warnings_then_the_sections(tree: Node, report: dict[str, Any]) -> None:
    assert tree.one("h1").text == report["verdict"]["headline"].replace(" %", "\u00a0%")
    order = [n.attributes.get("id", n.name) for n in tree.walk() if n.name in ("h1", "section") or n.attributes.get("id") == "warnings"]
    assert order == ["h1", "warnings", "accuracy", "price", "comparisons", "training", "data", "samples", "ledger", "provenance"]
    assert [a.attributes["href"] for a in tree.one("nav").all("a")] == [f"#{name}" for name in order[2:]]
    for part in tree.all("section"):
        assert len(part.all("p", class_="how")) == 1 and part.one("p", class_="how").text
    assert len(tree.one("div", id="warnings").all("li")) == len(report["warnings"])


def test_headline_numbers(tree: Node) -> None:
    figures = {d.one("dt").text: [e.text.replace("\u00a0", " ") for e in d.all("dd")] for d in tree.one("dl", class_="figures").all("div")}
    assert figures["Base model"] == ["31.2 %", "95 % interval 28.4 to 34.1 %"] and figures["After sft"][0] == "58.3 %"
    assert figures["Difference"][0] == "+27.1 points" and "p < 0.0001" in figures["Difference"][1] and "1,000 questions of sums" in figures["Difference"][1]
    assert figures["Training cost"] == ["1.3 TFLOP", "184 k tokens, 42 s"] and figures["Cost of an answer"][0] == "63 MFLOP"


def test_charts_hold_every_number_of_the_report(tree: Node, report: dict[str, Any]) -> None:
    for evaluation, figure in zip(report["stages"][0]["evals"], section(tree, "accuracy").all("figure"), strict=True):
        shown = {t.text for t in figure.all("title")}
        for stage in report["stages"]:
            for row in next(e for e in stage["evals"] if e["eval"] == evaluation["eval"])["strategies"]:
                assert any(t.startswith(f"{row['strategy']}, {stage['name']}: {100 * row['accuracy']:.1f} %") for t in shown)
    for front, figure in zip(report["frontiers"], section(tree, "price").all("figure"), strict=True):
        assert len(figure.all("circle")) == len(front["points"])
        joined = figure.one("polyline", class_="front").attributes["points"].split()
        assert len(joined) == sum(p["on_frontier"] for p in front["points"])
    loss = section(tree, "training").all("figure")[0]
    assert len(loss.one("polyline", class_="main").attributes["points"].split()) == 60 and len(loss.all("circle")) == 6
    assert len(section(tree, "training").all("figure")) == 3  # loss, learning rate, gradient norm
    rows = section(tree, "comparisons").all("tr")
    assert len(rows) == len(report["comparisons"]) + 3


def test_the_ledger_and_provenance_are_there(tree: Node, report: dict[str, Any]) -> None:
    said = section(tree, "ledger").text.replace("\u00a0", " ")
    for words in ("stream", "sampled", "1.2 TFLOP", "91.6 %", "5 min 52 s", "702 MB", "whole run", "Training was as much work as answering 20 k questions"):
        assert words in said, words
    assert "Energynot measured" in said and "Moneynot measured" in said
    said = section(tree, "provenance").text
    for words in (report["provenance"]["resolved"], report["provenance"]["command"], "bfloat16 is slower", "2.13.0", "b87df96db5c78209aca2e2b6fbc4f65aab3249f7"):
        assert words in said


def test_the_mask_view_marks_what_is_learned(tree: Node, report: dict[str, Any]) -> None:
    masks = section(tree, "data").all("div", class_="mask")
    for row, mask in zip(report["stages"][1]["mask_view"], masks, strict=True):
        boxes = mask.one("p", class_="tokens").all("span", class_="t")
        assert len(boxes) == row["total"] and [("on" in b.attributes["class"].split()) for b in boxes] == [learned for _, learned in row["tokens"]]
        assert f"{row['trained']} of {row['total']} tokens learned" in mask.text.replace("\u00a0", " ")


def test_samples_carry_their_marks_for_the_filter(tree: Node, report: dict[str, Any]) -> None:
    shown = section(tree, "samples").all("details", class_="sample")
    assert len(shown) == len(report["samples"]) == 40
    for sample, element in zip(report["samples"], shown):
        marks = json.loads(element.attributes["data-marks"])
        for at, stage in ((0, sample["stages"][0]), (1, sample["stages"][-1])):
            assert {c["strategy"]: c["correct"] for c in stage["completions"]} == {name: pair[at] for name, pair in marks.items()}
        assert element.attributes["data-eval"] == sample["eval"]
    assert tree.one("form").attributes["id"] == "filter" and "hidden" in tree.one("form").attributes  # shown by the script only


# ---- closed to the world --------------------------------------------------------------------------------------------


def test_nothing_is_loaded_and_only_our_style_and_script_apply(tree: Node, page: str) -> None:
    policy = tree.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'" and "unsafe" not in policy and "http" not in policy
    for name, rule in (("style", "style-src"), ("script", "script-src")):
        (element,) = tree.all(name)
        assert element.attributes == {}
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert tree.children[0] == "\n" or page.startswith("<!doctype html>")
    for node in tree.walk():
        assert not {a for a in node.attributes if a.startswith("on") or a in ("src", "srcset", "style", "action", "background", "poster", "xlink:href")}
        assert node.name not in ("link", "img", "iframe", "object", "embed", "base", "audio", "video", "use", "foreignobject")
        assert node.attributes.get("href", "#").startswith("#")
    assert not re.search(r"https?://|@import|url\(", page)


def test_the_policy_comes_before_anything_it_holds(page: str) -> None:
    assert page.index("Content-Security-Policy") < page.index("<title>") < page.index("<style>")


def test_style_and_script_cannot_end_their_element() -> None:
    for name in ("style.css", "script.js"):
        words = (FOLDER / name).read_text(encoding="utf-8").lower()
        assert "</" not in words and "<!--" not in words and words.isascii()


def test_everything_from_outside_is_text(tmp_path: Path, tree: Node) -> None:
    root = build(tmp_path / "r", n=30)
    for path in root.rglob("*.json"):
        data = json.loads(path.read_text())
        write(path, _poisoned(data))
    evil_name = "x" + EVIL[:150]
    change(root / "run.json", about=EVIL, model=EVIL, recipe=EVIL, started=EVIL, finished=EVIL, name=evil_name, status="complete",
           primary={"eval": "sums", "strategy": "greedy"})  # fmt: skip
    (root / "resolved.yaml").write_text(EVIL, encoding="utf-8")
    page = render(collect(root))
    poisoned = parse(page)
    assert {n.name for n in poisoned.walk()} <= {n.name for n in tree.walk()} and len(poisoned.all("script")) == 1
    allowed = {a for n in tree.walk() for a in n.attributes}
    assert {a for n in poisoned.walk() for a in n.attributes} <= allowed
    assert visible("\x1b[31mred") in poisoned.text and EVIL.split("\x1b")[0][:40] in poisoned.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e0fff]", page)
    for name in ("{{7*7}}${7*7}", "😀 👩‍👩‍👧", "עברית"):
        assert name in poisoned.text
    page.encode("utf-8")


def _poisoned(value: Any, key: str = "") -> Any:
    """Every text replaced by a hostile one, but for the words the report acts on; keys of free mappings too."""
    match value:
        case dict():
            free = key in ("dropped", "notices", "measured", "versions", "calibration_gflops", "candidates")
            return {(EVIL[:60] + k if free and key != "measured" else k): _poisoned(v, k) for k, v in value.items()}
        case list():
            return [_poisoned(v, key) for v in value]
        case str() if key not in ("eval", "strategy", "status", "fold", "name", "item_ids", "id", "stage"):
            return EVIL
    return value


# ---- size and states ------------------------------------------------------------------------------------------------


def test_the_page_is_small_and_stays_under_five_megabytes(report: dict[str, Any], page: str) -> None:
    assert len(page.encode()) < 400_000
    big = json.loads(json.dumps(report))
    for sample in big["samples"]:
        for stage in sample["stages"]:
            for c in stage["completions"]:
                c["text"] = "\0<" * 1000
    big["samples"] *= 2
    big["stages"][1]["mask_view"] = [{"where": "x", "tokens": [["\0", True]] * 1200, "total": 1200, "trained": 1200, "cut": 0}] * 8
    big["provenance"]["resolved"] = "\0<" * 50_000
    big["provenance"]["recipe"] = "\0<" * 50_000
    big["provenance"]["environment"] = {f"{i}": "\0<" * 150 for i in range(300)}
    grown = render(big)
    assert 1_000_000 < len(grown.encode()) < html.LARGEST
    assert "left out to keep this file small" in grown.lower() and parse(grown).all("section", id="accuracy")


def test_a_run_with_nothing_is_still_a_page(tmp_path: Path) -> None:
    write(tmp_path / "r" / "run.json", {"schema": 1, "status": "running"})
    tree = parse(render(collect(tmp_path / "r")))
    assert tree.one("h1").text.startswith("No verdict") and [s.attributes["id"] for s in tree.all("section")] == ["provenance"]
    assert "not measured" in section(tree, "provenance").text and "crashed" in tree.one("header").text


def test_what_was_not_measured_is_said_so(tmp_path: Path) -> None:
    root = build(tmp_path / "r", n=300)
    for path in root.rglob("evals/*.json"):
        data = json.loads(path.read_text())
        for row in data["strategies"]:
            row |= {"truncated": None, "unanswered": None, "spend": {}}
        write(path, data)
    for path in root.glob("*/ledger.json"):
        path.unlink()
    tree = parse(render(collect(root)))
    figures = {d.one("dt").text: d.text for d in tree.one("dl", class_="figures").all("div")}
    assert "not measured" in figures["Training cost"] and "not measured" in figures["Cost of an answer"]
    cells = [c.text for r in section(tree, "accuracy").all("tbody")[0].all("tr") for c in r.all("td")[3:]]
    assert set(cells) == {"not measured"}
    assert not tree.all("section", id="price") and not tree.all("section", id="ledger")


def test_resumes_are_drawn(report: dict[str, Any]) -> None:
    resumed = json.loads(json.dumps(report))
    resumed["stages"][1]["curves"]["resumed_after"] = [20, 40]
    tree = parse(render(resumed))
    assert [len(f.all("line", class_="resume")) for f in section(tree, "training").all("figure")] == [2, 2, 2]


# ---- readers --------------------------------------------------------------------------------------------------------


def test_tables_have_heads_and_charts_have_words(tree: Node) -> None:
    for table in tree.all("table"):
        assert table.one("caption").text
        heads = table.all("th", scope="col")
        assert heads and all(h.text for h in heads)
        for row in table.one("tbody").all("tr"):
            assert len(row.all("th", scope="row")) == 1 and len(row.all("td")) == len(heads) - 1
    for svg in tree.all("svg", class_="chart"):
        assert svg.attributes["role"] == "img" and len(svg.attributes["aria-label"]) > 20
    for control in (*tree.all("select"), *tree.all("input")):
        assert any(control in label.walk() for label in tree.all("label"))
    levels = [int(n.name[1]) for n in tree.walk() if re.fullmatch("h[1-6]", n.name)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    ids = [n.attributes["id"] for n in tree.walk() if "id" in n.attributes]
    assert len(ids) == len(set(ids))
    assert tree.one("html").attributes["lang"] == "en"


def _luminance(colour: str) -> float:
    full = "".join(c * 2 for c in colour[1:]) if len(colour) == 4 else colour[1:]
    parts = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_of_text_can_be_read_in_light_dark_and_print() -> None:
    style = (FOLDER / "style.css").read_text()
    schemes = [dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{3,6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]
    assert len(schemes) == 3 and all(len(s) == len(schemes[0]) for s in schemes)
    for scheme in schemes:
        for name in ("ink", "soft", "s0", "s1", "s2", "s3", "s4", "good", "bad"):
            for ground in ("paper", "wash"):
                assert _contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground, scheme)
        assert _contrast(scheme["ink"], scheme["learned"]) >= 4.5
    assert "prefers-color-scheme: dark" in style and "@media print" in style
