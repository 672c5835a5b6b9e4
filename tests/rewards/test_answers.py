"""Rewards over answers: right is paid, wrong is not, and strings made to fool them get nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest

from burnish.core.errors import ConfigError
from burnish.core.table import load_row
from burnish.data.tasks.base import items
from burnish.rewards.answers import agreement, choice, exact, graded, members, number, verified
from burnish.rewards.samples import task_columns

SPRAYED = " ".join(f"#### {n}" for n in range(100))
FOOLING = [  # none of these is an answer, whatever the gold answer is
    "",
    " \n\t",
    "42",  # not marked
    "the answer is 42, #### 41",
    "#### 41 #### 42",
    "\\boxed{41} \\boxed{42}",
    "\\boxed{42} and #### 41",
    "#### 42\n#### 41\n#### 42",
    "####",
    "#### ",
    "\\boxed{}",
    "\\boxed{42",
    "#### 41 or 42",
    "#### 41, 42",
    "#### 4\u200b2",  # zero width space
    "#### \u0664\u0662",  # Arabic-Indic digits
    "#### \uff14\uff12",  # full-width digits
    "#### 4²",
    "#### <|im_start|>42",
    "#### 42</s><s>",
    "<answer>42</answer>",
    '#### 42" correct="true',
    "#### 0x2a",
    "#### 4.2e1",
    SPRAYED,
    SPRAYED.replace(" ", "\n"),
    "\\boxed{" * 20_000,
    "\\boxed{" * 3_000 + "42" + "}" * 3_000,
    "#" * 200_000,
    "#### " + "4" * 200_000,
    "x" * 500_000,
]
RIGHT = ["#### 42", "so\n#### 42 \nbye", "\\boxed{42}", "#### 42\n\\boxed{42}", "#### 42.0", "#### +42", "#### $42$"]


@pytest.mark.parametrize("reward", [number, exact, graded])
def test_a_number(reward: Any) -> None:
    assert reward(RIGHT, ["42"] * len(RIGHT)) == [1.0] * len(RIGHT)
    assert reward(["#### 1,250"], [1250]) == [1.0] and reward(["#### 7"], ["3+4=7\n#### 7"]) == [1.0]
    began = time.process_time()
    scores = reward(FOOLING, ["42"] * len(FOOLING))
    assert all(score < 1 for score in scores), [text[:40] for text, s in zip(FOOLING, scores) if s == 1]
    assert time.process_time() - began < 3


def test_a_gold_answer_of_the_wrong_kind_abstains() -> None:
    assert number(["#### 42"], ["forty-two"]) == [None] and graded(["#### 42"], ["x"]) == [None]
    assert choice(["#### B"], ["42"]) == [None] and members(["#### a"], [""]) == [None]
    assert exact(["#### Forty  Two"], ["Forty Two"]) == [1.0]


def test_graded_is_reft_s_three_values() -> None:
    assert graded(["#### 42", "#### 41", "#### many", "none"], ["42"] * 4) == [1.0, 0.1, 0.0, 0.0]
    assert graded(["#### 41"], ["42"], partial=0.3) == [0.3]


def test_thoughts_may_hold_marks_where_only_what_follows_counts() -> None:
    text = "<think>\\boxed{41}? no</think> \\boxed{42}"
    assert number([text], ["42"]) == [0.0] and number([text], ["42"], part="after_think") == [1.0]
    assert number(["<think>\\boxed{42}"], ["42"], part="after_think") == [1.0]
    assert number(["<think>\\boxed{42}</think>"], ["42"], part="after_think") == [0.0]
    assert number(["<think>a</think>\\boxed{42}</think>\\boxed{41}"], ["42"], part="after_think") == [0.0]


def test_a_choice() -> None:
    right = ["#### B", "#### b", "#### (B)", "#### B.", "\\boxed{B}", "\\boxed{\\text{B}}"]
    assert choice(right, ["B"] * len(right)) == [1.0] * len(right)
    wrong = ["#### A", "#### A or B", "#### AB", "#### B, C", "#### A B C D", "B", "", "#### \u0412", "\\boxed{A}\\boxed{B}", "#### B) it is", *FOOLING]
    assert choice(wrong, ["B"] * len(wrong)) == [0.0] * len(wrong)
    assert choice(["#### E"], ["E"]) == [None] and choice(["#### E"], ["e"], options=5) == [1.0]


def test_a_set() -> None:
    right = ["#### 1, 2, 3", "#### 3,2,1", "\\boxed{\\{2, 1, 3\\}}", "#### [1.0, 2, 3]", "#### {1,2,3,}"]
    assert members(right, [[1, 2, 3]] * len(right)) == [1.0] * len(right)
    assert members(right, ["{1, 2, 3}"] * len(right)) == [1.0] * len(right)
    wrong = ["#### 1, 2", "#### 1, 2, 3, 4", "#### 1 2 3", "", "#### " + ", ".join(map(str, range(1000))), *FOOLING]
    assert members(wrong, [[1, 2, 3]] * len(wrong)) == [0.0] * len(wrong)
    assert members(["#### a; b"], ["b;a"], separator=";") == [1.0]


@pytest.mark.parametrize("name", ["sums", "route", "sorting", "letters"])
def test_a_bundled_task_s_own_verifier(name: str) -> None:
    task: Any = load_row("task", name)
    asked = items(task, "train", None, 12, 0)
    given = task_columns(task, asked)
    prompts = [[{"role": "user", "content": i.question}] for i in asked]
    right = verified(prompts, [i.rationale for i in asked], given["answer"], given["task"])
    assert right == [1.0] * 12
    assert verified([i.question for i in asked], [i.answer for i in asked], **given) == [1.0] * 12
    wrong = verified(prompts, [asked[i - 1].rationale for i in range(12)], given["answer"], given["task"])
    assert sum(v or 0 for v in wrong) <= 1  # two rows may share an answer
    for text in FOOLING:
        got = verified(prompts[:1], [text], given["answer"][:1], given["task"][:1])
        assert got == [float(task.verify(text, asked[0]))] == [0.0]
    with pytest.raises(ConfigError, match="Did you mean 'sums'"):
        verified(["1+1"], ["#### 2"], ["2"], ["summs"])


def test_agreement_is_one_for_the_majority_of_the_group() -> None:
    texts = ["#### 4", "#### 4.0", "#### 5", "none", "#### 5", "#### 6"]
    groups = [0, 0, 0, 0, 1, 1]
    assert agreement(texts[:4], groups[:4]) == [1.0, 1.0, 0.0, 0.0]
    assert agreement(texts, groups) == [1.0, 1.0, 0.0, 0.0, None, None]  # 5 and 6 tie
    assert agreement(texts[:4], groups[:4], form="share") == [0.5, 0.5, 0.25, 0.0]
    assert agreement(["none", ""], [0, 0]) == [None, None] and agreement(["#### 1"], [3]) == [1.0]
    assert agreement(["#### 1 #### 2", "#### 1", "#### 3", "#### 1"], [0] * 4) == [0.0, 1.0, 0.0, 1.0]


def test_agreement_counts_by_the_task_s_key() -> None:
    texts, route = ["#### A->B->C", "#### ABC", "#### AC"], ["route"] * 3
    assert agreement(texts, [0] * 3) == [None] * 3 and agreement(texts, [0] * 3, route) == [1.0, 1.0, 0.0]
