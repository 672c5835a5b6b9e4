"""Few-shot prompts: the same solved questions before every row of a stage and of an eval, and none of them a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.config.load import resolve
from burnish.config.provenance import Document
from burnish.config.schema import Eval, Source
from burnish.core.errors import ConfigError
from burnish.core.table import load_row
from burnish.data.chat import ChatFormat
from burnish.data.tasks.base import Item, after_examples, shown
from burnish.evals.accuracy import prompts_of
from burnish.judges import Questions
from burnish.material import read_sources
from burnish.models.load import load_tokenizer


def test_solved_questions_stand_before_the_question_a_blank_line_after_each() -> None:
    solved = [Item("1+2", "3", "1+2=3\n#### 3", "#### 3", 2), Item("4+4", "8", "4+4=8\n#### 8", "#### 8", 2)]
    assert after_examples(solved, "5+1") == "1+2\n1+2=3\n#### 3\n\n4+4\n4+4=8\n#### 8\n\n5+1\n"
    assert after_examples([], "5+1") == "5+1"


def test_a_stage_and_an_eval_of_one_seed_show_the_same_and_train_on_none_of_it() -> None:
    source = Source(task="sorting", levels=(3,), rows=700, shots=8)  # of about 800 questions of the train fold
    found = read_sources([source], seed=5)
    lead = after_examples(shown(load_row("task", "sorting"), (3,), 8, 5), "")[:-1]
    told = [block.split("\n")[0] for block in lead.split("\n\n")[:-1]]
    assert len(told) == 8 and len(found.examples) == 700
    assert all(e.prompt[0].content == f"{lead}{e.columns['question']}\n" for e in found.examples)
    assert not set(told) & {e.columns["question"] for e in found.examples}
    assert read_sources([source], seed=6).examples[0].prompt[0].content.startswith(lead) is False
    chat = ChatFormat(load_tokenizer("spark"))
    judged = Questions.of("e", Eval(task="sorting", levels=(3,), rows=20, shots=8, temperature=(0.5, 1.0), validation_rows=4, strategies=("vote:4",)), 5, chat)
    plain = Questions.of("e", Eval(task="sorting", levels=(3,), rows=20), 5, chat)
    assert [i.question for i in judged.asked] == [i.question for i in plain.asked]
    for items in (judged.asked, judged.validation):
        assert all(i.facts["prompt"][0].content == f"{lead}{i.question}\n" for i in items)
    assert len(prompts_of(chat, judged.asked)[0].ids) > len(prompts_of(chat, plain.asked)[0].ids) + 8 * 6


def test_without_examples_rows_are_what_they_were() -> None:
    few, none = (read_sources([Source(task="sums", levels=(2, 3), rows=30, shots=n)], seed=1) for n in (4, 0))
    assert [e.prompt[0].content for e in none.examples] == [e.columns["question"] for e in none.examples]
    left = [e.columns["question"] for e in few.examples]
    assert set(left[:20]) <= {e.columns["question"] for e in none.examples}


def test_a_file_has_no_examples_to_show(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    made = {"name": "s", "method": "sft", "data": {"file": str(file), "shots": 2}, "train": {"steps": 1, "learning_rate": 1e-3, "batch_rows": 4}}
    with pytest.raises(ConfigError, match="shots is for a task, and this is a file"):
        resolve(Document("test", data={"burnish": 1, "name": "t", "model": "spark", "stages": [made]}))
    with pytest.raises(ValueError, match="shots"):
        Source(task="sums", rows=8, shots=-1)
