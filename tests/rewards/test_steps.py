"""Steps that the bundled tasks verify: right ones are paid, slips are not, and made-up ones get nothing."""

from __future__ import annotations

import random

import pytest

from burnish.core.errors import ConfigError
from burnish.data.tasks.base import items
from burnish.data.tasks.route import ROUTE
from burnish.data.tasks.sums import SUMS
from burnish.rewards.build import build
from burnish.rewards.steps import task_steps


def scored(question: str, steps: list[str], gold: str, task: str = "sums") -> list[float | None]:
    return task_steps([question], ["".join(steps)], [steps], [gold], [task])[0]


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (["12+5=17\n", "17+30=47\n", "#### 47"], [1, 1, 1]),
        (["30+5=35\n", "35+12=47\n", "#### 47"], [1, 1, 1]),  # any order
        (["12+5=18\n", "18+30=48\n", "#### 48"], [0, 1, 0]),  # a slip; going on from it is right, the answer is not
        (["12+5=17\n", "12+30=42\n", "#### 47"], [1, 0, 1]),  # 12 was used up
        (["1+1=2\n", "1+1=2\n", "12+5=17\n", "17+30=47\n", "#### 47"], [0, 0, 1, 1, 1]),  # made-up steps are not paid
        (["so 12+5=17\n", "#### 47"], [0, 1]),
        (["12+5=17\n", "17+30=47\n"], [1, 0]),  # no answer
        (["#### 47"], [1]),
        ([""], [0]),
    ],
)
def test_sums_by_hand(steps: list[str], wanted: list[float]) -> None:
    assert scored("12+5+30", steps, "47") == wanted


def test_route_by_hand() -> None:
    question = "Path from A to D: AB BX BC CD CY"
    assert scored(question, ["AB\n", "BC\n", "CD\n", "#### ABCD"], "ABCD", "route") == [1, 1, 1, 1]
    assert scored(question, ["AB\n", "BX\n", "#### ABX"], "ABCD", "route") == [1, 0, 0]  # into the dead end
    assert scored(question, ["AB\n", "CD\n", "#### ABCD"], "ABCD", "route") == [1, 0, 1]


@pytest.mark.parametrize("task", [SUMS, ROUTE])
def test_every_gold_rationale_is_right_and_a_spoilt_one_is_not(task) -> None:
    with build(["task_steps"], task) as rewards:
        made = items(task, "train", None, 40, seed=1)
        columns = {"answer": [i.gold for i in made], "question": [i.question for i in made]}
        found = rewards.score([i.question for i in made], [i.rationale for i in made], columns)
        assert all(one.value == 1 and len(one.spans) == i.rationale.count("\n") + 1 for one, i in zip(found.components["task_steps"], made))
        rng = random.Random(0)
        spoilt = []
        for i in made:
            digits = [k for k, c in enumerate(i.rationale.partition("\n")[0]) if c.isalnum()]
            k = rng.choice(digits)
            other = next(c for c in ("7", "3", "Q") if c != i.rationale[k])
            spoilt.append(i.rationale[:k] + other + i.rationale[k + 1 :])
        found = rewards.score([i.question for i in made], spoilt, columns)
        assert all(one.spans[0][1] == 0 for one in found.components["task_steps"])


def test_a_task_without_checked_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing checks the steps of the task 'letters'"):
        scored("spell", ["a\n", "b"], "b", "letters")
