"""Sorting: put `level` digits in order. Nearly saturated in the bundled model: it is there to show forgetting."""

from __future__ import annotations

import random

from burnish.answers.extract import MARK, final_answer
from burnish.data.tasks.base import Item, Task


def make(level: int, rng: random.Random) -> Item:
    """`level` digits, repeats allowed, to be sorted upwards."""
    digits = [rng.choice("0123456789") for _ in range(level)]
    ordered = "".join(sorted(digits))
    return Item(
        question=f"Sort {''.join(digits)}",
        gold=ordered,
        rationale=MARK + ordered,
        answer=MARK + ordered,
        level=level,
        facts={"digits": "".join(digits)},
    )


def answer_key(text: str) -> str | None:
    """The marked digits as written, leading zeros kept; blanks and commas between them are dropped."""
    answer = final_answer(text)
    digits = "".join((answer or "").replace(",", " ").split())
    return digits if digits.isascii() and digits.isdigit() else None


def verify(text: str, item: Item) -> bool:
    """The marked digits are the gold digits, in order."""
    return answer_key(text) == item.gold


SORTING = Task(
    name="sorting",
    make=make,
    verify=verify,
    answer_key=answer_key,
    levels=(3, 4, 5, 6),
    verifier_needs_gold=True,
)
