"""A stage that draws: its series, its groups, its doubts, and what the page makes of them."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.core.metrics import METRICS, Metric
from burnish.report.collect import collect
from burnish.report.doubts import warnings
from burnish.report.drawn import COMPLETIONS, GROUPS, POINTS, find
from burnish.report.html import render
from burnish.report.schema import Report
from burnish.report.verdict import summary
from tests.report.page import Node, parse
from tests.report.synthetic import build, draw, grade, packed, write
from tests.report.test_markup import HOSTILE

GRPO = "02-grpo"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build(tmp_path_factory.mktemp("runs") / "r", stages=3, n=4, steps=4)
    for stage, right in (("00-base", 10), ("01-sft", 60), (GRPO, 60)):
        for path in (root / stage / "evals").glob("*.json"):
            path.unlink()
        grade(root, stage, "sums", {"greedy": [1] * right + [0] * (100 - right), "vote:4": [1] * 80 + [0] * 20})
    return root


@pytest.fixture(scope="module")
def run(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(Path(shutil.copytree(empty, tmp_path_factory.mktemp("runs") / "r")))


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return collect(run)


@pytest.fixture(scope="module")
def tree(report: dict[str, Any]) -> Node:
    return parse(render(report))


@pytest.fixture
def drawn(empty: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """drawn(name=value, ...) -> the report of a stage that logged these."""

    def go(rounds: int = 24, **facts: Any) -> dict[str, Any]:
        root = Path(shutil.copytree(empty, tmp_path / "r"))
        return collect(draw(root, rounds=rounds, facts=facts))

    return go


def doubts(report: dict[str, Any], about: str) -> list[tuple[str, str]]:
    return [(w["level"], w["text"]) for w in report["warnings"] if w["about"] == about]


# ---- report.json ----------------------------------------------------------------------------------------------------


def test_the_series_are_the_metrics_of_the_steps_that_logged_them(report: dict[str, Any]) -> None:
    Report.model_validate_json(json.dumps(report, allow_nan=False))
    sft, grpo = report["stages"][1:]
    assert sft["series"] == [] and sft["rounds"] == []
    reward, live, task = find(grpo, "reward_mean"), find(grpo, "live_samples"), find(grpo, "reward_mean", "brief")
    assert reward and live and task
    assert reward["step"] == list(range(1, 48, 2)) and reward["value"] == [0.5] * 24 and reward["per_point"] == 1
    assert live["step"] == list(range(1, 49)) and live["value"][:2] == [0.9, 0.8] and task["value"] == [0.25] * 24
    gap = find(grpo, "sampler_gap_max")
    assert gap and gap["step"] == reward["step"] and set(gap["value"]) == {2e-5}  # where the policy has moved there is no gap to measure
    names = [(s["metric"], s["reward"]) for s in grpo["series"]]
    assert ("loss", None) not in names and ("reward_max", "task") not in names and len(names) == len(set(names))


def test_tenths_and_long_series(drawn: Callable[..., dict[str, Any]]) -> None:
    s = find(drawn(rounds=650, reward_mean=lambda r: r / 100, sampler_gap_max=lambda r: 9e-5 if r == 400 else 1e-6)["stages"][2], "reward_mean")
    assert s and s["per_point"] == pytest.approx(650 / 217) and len(s["value"]) == 217 <= POINTS
    assert s["first"] == pytest.approx(0.32) and s["last"] == pytest.approx(6.17)  # of 650 values, not of the points
    assert s["value"][0] == pytest.approx(0.01) and s["step"][-1] == 1299


def test_groups_are_the_first_of_three_rounds_whole(report: dict[str, Any]) -> None:
    rounds = report["stages"][2]["rounds"]
    assert [r["round"] for r in rounds] == [0, 11, 23] and all(r["prompts"] == 6 and len(r["groups"]) == GROUPS for r in rounds)
    group = rounds[1]["groups"][3]
    assert (group["group"], group["where"], group["prompt"], group["answer"], group["more"]) == (3, "sums/train/3", "11+3=?", "14", 0)
    assert [c["text"] for c in group["completions"]] == [f"r11 g3 s{i}" for i in range(4)]
    assert [c["advantage"] for c in group["completions"]] == [-0.5, 0.5, 1.5, 2.5] and [c["live"] for c in group["completions"]] == [False, True, True, True]
    assert [c["total"] for c in group["completions"]] == [0, 1, 0, None] and [c["tokens"] for c in group["completions"]] == [5, 6, 7, 8]
    assert group["completions"][0]["finish"] == "length" and group["completions"][1]["rewards"] == {"task": 1.0, "brief": 1.0}


def test_what_is_large_is_cut_and_says_so(empty: Path, tmp_path: Path) -> None:
    root = draw(Path(shutil.copytree(empty, tmp_path / "r")), rounds=1, size=COMPLETIONS + 3)
    path = root / GRPO / "trajectories" / "round-000000.jsonl.gz"
    head = {"questions": [5], "round": 0}
    packed(path, [head, *({"group": 0, "tokens": [1], "finish": "stop", "text": "\0<" * 2000, "rewards": {}, "total": 1.0} for _ in range(19))])
    report = collect(root)
    group = report["stages"][2]["rounds"][0]["groups"][0]
    assert len(group["completions"]) == COMPLETIONS and group["more"] == 3 and group["completions"][0]["cut"] == 2000
    grown = json.loads(json.dumps(report))
    grown["stages"][2]["rounds"][0]["groups"] *= 20
    page = render(grown)
    assert "groups left out to keep this file small" in parse(page).one("section", id="groups").text and len(page.encode()) < 2_500_000
    assert "3 completions more left out" in parse(page).one("section", id="groups").text


def test_rounds_without_what_training_made_of_them_are_shown_without_it(run: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(run, tmp_path / "r"))
    for path in (root / GRPO / "trajectories").glob("*credit*"):
        path.unlink()
    (root / GRPO / "trajectories" / "round-000011.jsonl.gz").write_bytes(b"\x1f\x8bnot gzip")
    (root / GRPO / "trajectories" / "round-000023.jsonl.gz").unlink()
    (root / GRPO / "trajectories" / "round-000023.jsonl.gz").symlink_to("/etc/passwd")
    report = collect(root)
    (first,) = report["stages"][2]["rounds"]
    assert first["groups"][0]["prompt"] is None and first["groups"][0]["completions"][0]["advantage"] is None
    assert sum("round-0000" in text for _, text in doubts(report, "damaged")) == 2
    assert "The prompt was not recorded." in parse(render(report)).one("section", id="groups").text


@pytest.mark.parametrize("damage", [b"", b"\x00\xff", b"null\n", b"[1]\n", b'{"questions": 3}\n', b'{"group": "x"}\n', b'{"questions": [1], "n": 1e999}\n{"group": 0, "tokens": "x"}\n'])
def test_damaged_rounds_cost_themselves_only(run: Path, tmp_path: Path, damage: bytes) -> None:
    root = Path(shutil.copytree(run, tmp_path / "r"))
    for path in (root / GRPO / "trajectories").iterdir():
        path.write_bytes(gzip.compress(damage)[:-3] if damage == b"\x00\xff" else gzip.compress(damage))
    report = collect(root)
    Report.model_validate_json(json.dumps(report, allow_nan=False))
    assert report["stages"][2]["rounds"] == [] and len(report["stages"][2]["series"]) > 5 and render(report)


def test_metrics_of_any_kind_are_survived(run: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(run, tmp_path / "r"))
    rows = [{"step": 1, "kind": "train", "completion_tokens": value, "reward_mean": value, "components": value, "unheard_of": value}
            for value in (None, "x", [], {"a": 1}, {"a": {"reward_mean": "x"}}, True, 10**40, 0.5)]  # fmt: skip
    (root / GRPO / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report = collect(root)
    Report.model_validate_json(json.dumps(report, allow_nan=False))
    found = find(report["stages"][2], "reward_mean")
    assert found and found["value"] == [0.5] and find(report["stages"][2], "unheard_of") is None and render(report)


def test_drawing_and_scoring_are_part_of_what_training_took(report: dict[str, Any]) -> None:
    cost = report["verdict"]["cost"]["training"]
    assert cost["tokens"] == 2 * 184_320 + 2_130 and cost["label_tokens"] == 2 * 121_116
    assert cost["executed_flops"] == 2 * 1_292_000_000_000 + 5_000 and cost["seconds"] == pytest.approx(2 * 41.7 + 23)


# ---- stages against each other --------------------------------------------------------------------------------------


def test_a_stage_is_held_against_the_one_before_it_too(report: dict[str, Any], tree: Node) -> None:
    against = {(c["stage"], c["strategy"], c["against_stage"]): c for c in report["comparisons"] if c["kind"] == "stage"}
    assert set(against) == {(s, m, a) for s, a in (("sft", "base"), ("grpo", "base"), ("grpo", "sft")) for m in ("greedy", "vote:4")}
    assert against["grpo", "greedy", "sft"]["difference"] == 0 and against["grpo", "greedy", "base"]["outcome"] == "better"
    assert report["verdict"]["primary"]["difference"] == pytest.approx(0.5)  # still against the base model
    said = " ".join(summary(report).split())
    assert "grpo with greedy is right 60.0 % of the time: not clearly different from sft at 60.0 % (0.0 points" in said
    assert "grpo with vote:4 is right 80.0 % of the time: 20.0 points more than greedy (95 % interval" in said
    rows = tree.one("section", id="comparisons").all("table")[0].one("tbody").all("tr")
    assert [r.one("th").text for r in rows] == ["sft after base", "grpo after sft"]
    assert [r.all("td")[1].text for r in rows] == ["+50.0", "0.0"] and rows[1].all("td")[5].text.endswith("min 05\u00a0s")


def test_a_stage_that_lost_what_the_one_before_had_is_a_doubt(run: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(run, tmp_path / "r"))
    grade(root, GRPO, "sums", {"greedy": [1] * 30 + [0] * 70, "vote:4": [1] * 30 + [0] * 70})
    report = collect(root)
    assert report["verdict"]["outcome"] == "improved"
    found = [text for _, text in doubts(report, "regression")]
    assert "sums with greedy got worse from sft to grpo: from 60.0 % to 30.0 % (p < 0.0001)." in found
    assert "grpo with vote:4 is right 30.0 % of the time: not clearly different from greedy" in summary(report)
    assert not doubts(report, "gain")  # said already, and worse


def test_a_last_stage_that_added_nothing_gets_no_credit(report: dict[str, Any], run: Path, tmp_path: Path) -> None:
    assert report["verdict"]["outcome"] == "improved"
    ((level, text),) = doubts(report, "gain")
    assert level == "note" and text.startswith("What improved is not shown to be the work of grpo: on sums, grpo with greedy is right 60.0 %")
    root = Path(shutil.copytree(run, tmp_path / "r"))
    grade(root, GRPO, "sums", {"greedy": [1] * 90 + [0] * 10})
    assert not doubts(collect(root), "gain")


# ---- doubts: each with what raises it and what does not -----------------------------------------------------------------


def test_a_quiet_run_raises_none(report: dict[str, Any]) -> None:
    abouts = ("reward", "length", "entropy", "dead groups", "truncated rollouts", "sampler gap", "reward errors", "damaged")
    assert [w for w in report["warnings"] if w["about"] in abouts] == []


RISES: Callable[[int], float] = lambda r: 0.3 + 0.02 * r  # noqa: E731
NOISE: Callable[[int], float] = lambda r: 0.5 + 0.1 * (-1) ** r + 0.002 * r  # noqa: E731


def test_a_reward_that_rises_alone(drawn: Callable[..., dict[str, Any]]) -> None:
    ((level, text),) = doubts(drawn(reward_mean=RISES), "reward")
    assert level == "doubt" and "rose from 0.350 to 0.710 while sums with greedy did not clearly rise (0.0 points over sft, p = 1.00)" in text


def test_a_reward_that_rises_within_its_noise(drawn: Callable[..., dict[str, Any]]) -> None:
    assert not doubts(drawn(reward_mean=NOISE), "reward")


def test_a_reward_of_few_rounds(drawn: Callable[..., dict[str, Any]]) -> None:
    assert not doubts(drawn(rounds=11, reward_mean=RISES), "reward")


def test_a_reward_that_rises_with_the_held_out_questions(empty: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(empty, tmp_path / "r"))
    grade(root, GRPO, "sums", {"greedy": [1] * 90 + [0] * 10})
    assert not doubts(collect(draw(root, facts={"reward_mean": RISES})), "reward")
    grade(root, GRPO, "sums", {"greedy": [1] * 40 + [0] * 60})
    assert "got worse (−20.0 points over sft" in doubts(collect(root), "reward")[0][1]


@pytest.mark.parametrize(
    ("about", "raises", "does_not", "words"),
    [
        ("length", {"completion_tokens": lambda r: 20.0 + 2 * r}, {"completion_tokens": lambda r: 20.0 + 0.7 * r}, "grew from 22.0 to 64.0 tokens"),
        ("entropy", {"surprisal": lambda r: 1.0 / (1 + r)}, {"surprisal": lambda r: 1.0 - 0.03 * r}, "The surprisal of grpo fell from 0.611 to 0.0435"),
        ("dead groups", {"dead_groups": 0.7}, {"dead_groups": 0.5}, "70.0 % of the groups of grpo"),
        ("truncated rollouts", {"truncated_share": 0.3}, {"truncated_share": 0.04}, "30.0 % of the completions grpo drew"),
        ("sampler gap", {"sampler_gap_max": lambda r: 3e-4 if r == 7 else 1e-5}, {"sampler_gap_max": 9e-5}, "About step 15 of grpo sampler and trainer were 0.00030"),
        ("reward errors", {"reward_timeouts": lambda r: 2 * (r == 3), "reward_crashes": lambda r: int(r == 5)}, {"reward_abstained": 0.5},
         "failed on 3 completions (timeouts: 2, crashes: 1)"),
    ],
)  # fmt: skip
def test_each_doubt(drawn: Callable[..., dict[str, Any]], tmp_path: Path, about: str, raises: dict[str, Any], does_not: dict[str, Any], words: str) -> None:
    ((_, text),) = doubts(drawn(**raises), about)
    assert words in text
    shutil.rmtree(tmp_path / "r")
    assert not doubts(drawn(**does_not), about)


def test_the_exact_entropy_goes_before_its_estimate(drawn: Callable[..., dict[str, Any]]) -> None:
    learnt = drawn(surprisal=lambda r: 1.0 / (1 + r))
    assert doubts(learnt, "entropy")
    stage = learnt["stages"][2]
    stage["series"].append(find(stage, "surprisal") | {"metric": "entropy", "first": 0.5, "last": 0.4})
    again = warnings(learnt, missing=[], damaged=[], planned=[], chosen=False)
    assert not [w for w in again if w["about"] == "entropy"]


def test_a_gap_in_bfloat16_is_its_nature(run: Path, tmp_path: Path) -> None:
    root = draw(Path(shutil.copytree(run, tmp_path / "r")), facts={"sampler_gap_max": 1e-2})
    assert doubts(collect(root), "sampler gap")
    decisions = json.loads((root / "decisions.json").read_text())
    write(root / "decisions.json", decisions | {"dtype": {"value": "bfloat16", "why": "faster", "measured": {}}})
    assert not doubts(collect(root), "sampler gap")


# ---- the page -------------------------------------------------------------------------------------------------------


def test_only_what_was_logged_is_drawn(tree: Node, drawn: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    part = tree.one("section", id="rollouts")
    said = [f.one("p").text for f in part.all("figure")]
    assert any("surprisal" in s for s in said) and not any("KL" in s or s.startswith("entropy") for s in said)
    reward = part.all("svg", class_="chart")[0]
    assert {t.text for t in reward.all("text", class_="label")} == {"total", "task", "brief"}
    assert "Mean reward of grpo, from 0.500 in the first tenth to 0.500 in the last. task: from 0.500 to 0.500. brief:" in reward.attributes["aria-label"]
    for name in ("kl", "made_up"):
        monkeypatch.setitem(METRICS, name, Metric("nats", f"what {name} is"))
    more = parse(render(drawn(kl=0.03, made_up=lambda r: 1.0 * r))).one("section", id="rollouts")
    said = [f.one("p").text for f in more.all("figure")]
    assert "KL from the reference, nats a token" in said and "made_up: what made_up is" in said  # what no panel knows has a chart of its own


def test_the_gap_stands_against_its_line_and_the_costs_are_split(tree: Node) -> None:
    part = tree.one("section", id="rollouts")
    (gap,) = [f for f in part.all("figure") if "sampler and trainer" in f.text]
    rule = gap.one("line", class_="rule")
    lines = gap.all("polyline")
    heights = [float(line.attributes["points"].split()[0].split(",")[1]) for line in lines]
    assert len(lines) == 2 and float(rule.attributes["y1"]) < min(heights)  # both below 1e-4
    (costs,) = [t for t in part.all("table") if "went into" in t.one("caption").text]
    cells = [[c.text for c in r.all("td")[:4]] + [r.one("th").text] for r in costs.one("tbody").all("tr")]
    assert [row[4] for row in cells] == ["rollouts, reference", "scoring", "training"]
    assert cells[0][1] == "5.0\u00a0kFLOP" and [row[3] for row in cells] == ["20\u00a0s", "3.0\u00a0s", "42\u00a0s"]


def test_a_stage_that_draws_is_not_told_that_a_lower_loss_is_better(tree: Node) -> None:
    assert [h.text for h in tree.one("section", id="training").all("h3")] == ["sft"]
    assert [h.text for h in tree.one("section", id="rollouts").all("h3")] == ["grpo"]


def test_the_groups_stand_under_their_prompt(tree: Node) -> None:
    part = tree.one("section", id="groups")
    shown = part.all("details", class_="group")
    assert len(shown) == 3 * GROUPS and ["open" in d.attributes for d in shown] == [True] + [False] * 11
    assert [h.text for h in part.all("h4")] == [f"Round {n}: the first 4 of 6 prompts" for n in (1, 12, 24)]
    first = shown[0]
    assert first.text.count("0+0=?") == 1 and "mean reward 0.333" in first.one("summary").text
    answers = first.one("div", class_="beside").all("pre")
    assert [a.text for a in answers] == [f"r0 g0 s{i}" for i in range(4)]
    for words in ("1. reward 0, advantage −0.500; task 0, brief 0; 5 tokens, cut at the limit; no gradient", "4. no reward, advantage +2.50", "8 tokens, ended by itself"):
        assert words in first.text.replace("\u00a0", " "), words
    assert [m.text for m in first.all("span", class_="correct")] == ["+0.500", "+1.50", "+2.50"]


def test_what_a_model_wrote_in_a_round_is_text(run: Path, tmp_path: Path, tree: Node) -> None:
    root = Path(shutil.copytree(run, tmp_path / "r"))
    evil = "".join(HOSTILE).replace("\ud800", "")
    folder = root / GRPO / "trajectories"
    for number in (0, 11, 23):
        packed(folder / f"round-{number:06d}.jsonl.gz", [{"questions": [0]}, {"group": 0, "tokens": [1], "finish": evil, "text": evil, "rewards": {evil: 1.0, "b": None}, "total": 1.0}])
        packed(folder / f"round-{number:06d}-credit-0.jsonl.gz", [{"group": 0, "where": evil, "prompt": evil, "answer": evil, "advantages": [1.0], "live": [True]}])
    metrics = [json.loads(line) for line in (root / GRPO / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        row["components"] = {evil: {"reward_mean": 0.5}}
    (root / GRPO / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
    page = render(collect(root))
    poisoned = parse(page)
    assert {n.name for n in poisoned.walk()} <= {n.name for n in tree.walk()} and len(poisoned.all("script")) == 1
    assert {a for n in poisoned.walk() for a in n.attributes} <= {a for n in tree.walk() for a in n.attributes}


def test_every_chart_has_words_and_every_table_heads(tree: Node) -> None:
    for name in ("rollouts", "groups"):
        for svg in tree.one("section", id=name).all("svg", class_="chart"):
            assert svg.attributes["role"] == "img" and len(svg.attributes["aria-label"]) > 20
    ids = [n.attributes["id"] for n in tree.walk() if "id" in n.attributes]
    assert len(ids) == len(set(ids))
