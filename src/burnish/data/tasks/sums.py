"""Sums: add up `level` numbers, in any order. Many ways lead to the one answer; slips scatter.

The question is `12+5+30`. A step adds any two of the numbers still to be added: `5+30=35`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from burnish.answers.compare import answers_with
from burnish.answers.extract import MARK, final_number
from burnish.data.tasks.base import Item, Task, rationale

_STEP = re.compile(r"(\d{1,9})\+(\d{1,9})=(\d{1,9})", re.ASCII)
LARGEST = 99  # five of them have a three-digit sum, so that rationales stay within 48 tokens


def work(numbers: list[int], rng: random.Random) -> tuple[list[str], int]:
    """Steps in a random order, and the total."""
    left, steps = list(numbers), []
    while len(left) > 1:
        first, second = (left.pop(rng.randrange(len(left))) for _ in range(2))
        steps.append(f"{first}+{second}={first + second}")
        left.append(first + second)
    return steps, left[0]


def make(level: int, rng: random.Random) -> Item:
    """`level` numbers from 1 to LARGEST to be added."""
    numbers = [rng.randint(1, LARGEST) for _ in range(level)]
    steps, total = work(numbers, rng)
    return Item(
        question="+".join(map(str, numbers)),
        gold=str(total),
        rationale=rationale(steps, str(total)),
        answer=f"{MARK}{total}",
        level=level,
        facts={"numbers": numbers},
    )


def verify(text: str, item: Item) -> bool:
    """The marked number is the total."""
    return answers_with(text, item.gold)


def right_step(steps: Sequence[str], item: Item) -> bool:
    """The last step adds two numbers that are still to be added, rightly. A slip before it counts as it was written."""
    left = item.question.split("+")
    right = False
    for step in steps:
        match = _STEP.fullmatch(step)
        right = match is not None
        if match is None:
            continue
        for number in match.group(1, 2):
            right &= number in left
            if number in left:
                left.remove(number)
        left.append(match[3])
        right &= int(match[1]) + int(match[2]) == int(match[3])
    return right


SUMS = Task(
    name="sums",
    make=make,
    verify=verify,
    answer_key=final_number,
    levels=(2, 3, 4, 5),
    verifier_needs_gold=True,
    right_step=right_step,
)
