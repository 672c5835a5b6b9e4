"""`burnish solve` and `Loaded.solve` on the bundled model: answers, samples and spend agree with each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.api import Loaded, load
from burnish.cli import invoke
from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Spend
from burnish.maths.votes import majority

SUM, WAY = "17+25+38", "Path from A to D: AB BX BC CD CY"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def spark() -> Loaded:
    return load("spark", dtype="float32")


def out(capsys: Capture, *words: str, code: int = 0) -> str:
    assert invoke(["solve", "spark", *words]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def test_a_vote_is_the_majority_of_its_trace_and_pays_for_all_of_it(spark: Loaded) -> None:
    (found,) = spark.solve([SUM], strategy="vote:8", task="sums", max_new_tokens=48)
    assert len(found.trace) == 8 and found.answer == majority([t.answer for t in found.trace])
    (chosen,) = [t for t in found.trace if t.chosen]
    assert (chosen.text, chosen.answer) == (found.text, found.answer)
    assert found.spend.sampled_tokens == sum(t.tokens for t in found.trace)
    assert found.spend.prefill_tokens == 10 and found.spend.executed_flops >= found.spend.useful_flops > 0
    (best,) = spark.solve([SUM], strategy="best_of:8@logprob", task="sums", max_new_tokens=48)
    assert [t.text for t in best.trace] == [t.text for t in found.trace] and best.spend == found.spend
    places = set[int]()
    for seed in range(4):
        (best,) = spark.solve([SUM], strategy="best_of:8@logprob", task="sums", max_new_tokens=48, seed=seed)
        scores = [t.score for t in best.trace if t.score is not None]
        assert len(scores) == 8 and max(scores) < 0
        places.add(scores.index(max(scores)))
        assert [t.chosen for t in best.trace] == [i == scores.index(max(scores)) for i in range(8)]
    assert len(places) > 1


def test_an_answer_is_the_same_alone_and_among_others(spark: Loaded) -> None:
    options: dict[str, Any] = {"strategy": "vote:4", "max_new_tokens": 48}


    def traces(prompts: list[Any], **more: Any) -> list[Any]:
        found = spark.solve(prompts, **options, **more)
        return [(s.prompt, s.answer, s.text, s.trace, s.spend.sampled_tokens) for s in found]

    alone = [traces([p])[0] for p in (SUM, "4+5", WAY)]
    assert traces([WAY, SUM, "4+5", SUM]) == [alone[2], alone[0], alone[1], alone[0]]
    assert traces([[{"role": "user", "content": SUM}]]) == alone[:1]
    assert traces([SUM], seed=1) != alone[:1]


def test_greedy_is_generate_and_without_a_task_the_marked_answer_counts(spark: Loaded) -> None:
    (found,) = spark.solve([SUM], strategy="greedy", max_new_tokens=48)
    assert [found.text] == spark.generate([SUM], max_new_tokens=48)
    assert found.text is not None and found.text.endswith(f"####{found.answer}")
    assert found.trace[0].chosen and found.trace[0].score is None


def test_the_rule_of_a_task_that_reads_no_gold_chooses(spark: Loaded) -> None:
    (found,) = spark.solve([WAY], strategy="best_of:32@rule", task="route", max_new_tokens=48)
    assert {t.score for t in found.trace} <= {0.0, 1.0} and found.answer is not None
    assert (found.answer == "ABCD") == any(t.score for t in found.trace)
    assert all((t.score == 1.0) == (t.answer == "ABCD") for t in found.trace)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "pass@4"}, "pass@4 \\(oracle\\)  reads the right answers.*\n  type vote:4"),
        ({"strategy": "best_of:4@rule", "task": "sums"}, "no rule to choose by that reads no gold answer.*\n.*pass@4"),
        ({"strategy": "best_of:4@rule"}, "no rule to choose by"),
        ({"strategy": "vote:4", "temperature": 0}, "4 samples at temperature 0 are 4 times the same text"),
        ({"strategy": "voting"}, "Did you mean 'vote'"),
        ({"task": "sum"}, "Did you mean 'sums'"),
        ({"budget_tokens": 0}, "0 tokens buy nothing"),
    ],
)
def test_what_is_refused(spark: Loaded, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        spark.solve([SUM], **options)


def test_a_question_the_task_cannot_judge_is_named(spark: Loaded) -> None:
    with pytest.raises(DataError, match="prompt 2  task 'route' cannot judge it: not a route question"):
        spark.solve([WAY, SUM], strategy="best_of:2@rule", task="route", max_new_tokens=24)


def test_a_budget_cuts_the_trace_to_the_token(spark: Loaded) -> None:
    (found,) = spark.solve([SUM], strategy="vote:8", max_new_tokens=48, budget_tokens=50)
    assert found.spend.sampled_tokens == 50 == sum(t.tokens for t in found.trace)
    assert found.trace[-1].finish == "budget" and not found.trace[-1].chosen
    (nothing,) = spark.solve([SUM], strategy="vote:8", max_new_tokens=48, budget_tokens=1)
    assert (nothing.answer, nothing.text, nothing.spend.sampled_tokens) == (None, None, 1)


def test_the_verb(capsys: Capture, spark: Loaded) -> None:
    words = (SUM, "--strategy", "best_of:4@logprob", "--task", "sums", "--max-new-tokens", "48")
    told = json.loads(out(capsys, *words, "--trace", "--json"))
    (row,) = told["solutions"]
    assert told["strategy"] == "best_of:4@logprob" and told["seconds"] > 0 and len(row["trace"]) == 4
    assert Spend(**told["spend"]) == Spend(**row["spend"]) and sum(t["chosen"] for t in row["trace"]) == 1
    text = out(capsys, *words, "--trace")
    assert text.splitlines()[0] == row["answer"] and f"{told['spend']['sampled_tokens']} tokens sampled, 10 read, " in text
    for t in row["trace"]:
        assert f"{t['score']:.4f}" in text and t["text"].replace("\n", " / ") in text
    assert "trace" not in json.loads(out(capsys, *words, "--json"))["solutions"][0] and "* " not in out(capsys, *words)


def test_the_verb_on_a_file(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "17+25+38"}\n{"question": "4+5"}\n')
    words = ("--file", str(file), "--column", "question", "--strategy", "vote:4", "--max-new-tokens", "48")
    told = json.loads(out(capsys, *words, "--json"))
    assert [s["prompt"] for s in told["solutions"]] == ["17+25+38", "4+5"]
    assert told["spend"]["sampled_tokens"] == sum(s["spend"]["sampled_tokens"] for s in told["solutions"])
    assert "for 2 questions" in out(capsys, *words).splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "neither a question nor --file"),
        ((SUM, "--file", "a.jsonl"), "both a question and --file"),
        ((SUM, "--strategy", "greedy", "--temperature", "0.5"), "greedy takes no temperature"),
        ((SUM, "--budget-tokens", "1"), "no answer was finished within 1 token"),
        ((SUM, "--strategy", "vote 16"), "type vote:16"),
    ],
)
def test_the_verb_refuses(capsys: Capture, words: tuple[str, ...], said: str) -> None:
    assert said in out(capsys, *words, code=2)
