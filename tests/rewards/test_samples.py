"""Completions to try rewards on, and the rule that gold scores full marks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.core.errors import DataError
from burnish.rewards.build import build
from burnish.rewards.samples import answers_of_others, gold_in, gold_of_file, gold_of_task, short_of_full, stored


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(name: str, *rows: object) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.mark.parametrize("task", ["sums", "route", "sorting", "letters"])
def test_the_gold_answers_of_every_task_score_full_marks(task: str) -> None:
    for target in ("rationale", "answer"):
        gold = gold_of_task(task, None, 16, target=target)
        with build("task") as rewards:
            scores = rewards.score(gold.prompts, gold.completions, gold.columns, gold.groups)
            assert [one.value for one in scores.total] == [1.0] * 16
            assert short_of_full(rewards, gold, scores, 1.0) == []
            others = answers_of_others(gold)
            assert others and all(a != b for a, b in zip(others.completions, gold.completions))


def test_gold_of_a_file_is_its_completion_or_its_marked_answer() -> None:
    file = rows("a.jsonl", {"prompt": "1+1", "answer": 2}, {"prompt": "2+2", "answer": "so #### 4"})
    gold = gold_of_file(file, {}, None)
    assert gold.completions == ["#### 2", "so #### 4"] and gold.prompts == ["1+1", "2+2"] and gold.where[1] == "a.jsonl:2"
    file = rows("b.jsonl", {"prompt": [{"role": "user", "content": "1+1"}], "solution": "2"})
    gold = gold_of_file(file, {}, None, gold="solution")
    assert gold.completions == [[{"role": "assistant", "content": "#### 2"}]] and gold.shape == "lists of messages"
    file = rows("c.jsonl", {"question": "1+1", "target": "#### 2", "answer": "2"})
    assert gold_of_file(file, {"prompt": "question", "completion": "target"}, None).completions == ["#### 2"]
    with pytest.raises(DataError, match=r"a.jsonl:1  no completion and no column 'gold' to make one from; found: answer"):
        gold_of_file("a.jsonl", {}, None, gold="gold")


def test_stored_completions_are_grouped_by_prompt() -> None:
    file = rows("out.jsonl", {"prompt": "1+1", "completion": "", "answer": 2}, {"prompt": "2+2", "completion": "x", "answer": 4}, {"prompt": "1+1", "completion": "#### 2", "answer": 2, "extra": 1})
    found = stored(file)
    assert found.groups == [0, 1, 0] and found.columns == {"answer": [2, 4, 2]} and len(stored(file, 2).prompts) == 2
    gold = gold_in(found)
    assert gold.prompts == ["1+1", "2+2"] and gold.completions == ["#### 2", "#### 4"]
    with pytest.raises(DataError, match=r"bad.jsonl:1  column 'completion' is missing or neither, wanted a text"):
        stored(rows("bad.jsonl", {"prompt": "p", "completion": 3}))
    with pytest.raises(DataError, match="some completions are texts"):
        stored(rows("bad.jsonl", {"prompt": "p", "completion": "a"}, {"prompt": "p", "completion": [{"role": "assistant", "content": "b"}]}))
