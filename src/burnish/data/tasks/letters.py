"""Letters: write a word of `level` letters backwards. Nearly saturated in the bundled model: it shows forgetting."""

from __future__ import annotations

import random

from burnish.answers.extract import MARK, final_answer
from burnish.data.tasks.base import Item, Task

VOWELS, CONSONANTS = "AEIOU", "BCDFGHKLMNPRSTVW"


def make(level: int, rng: random.Random) -> Item:
    """A pronounceable word, consonants and vowels taking turns, to be written backwards."""
    turn = rng.randrange(2)
    word = "".join(rng.choice((CONSONANTS, VOWELS)[(i + turn) % 2]) for i in range(level))
    return Item(
        question=f"Reverse {word}",
        gold=word[::-1],
        rationale=MARK + word[::-1],
        answer=MARK + word[::-1],
        level=level,
        facts={"word": word},
    )


def answer_key(text: str) -> str | None:
    """The marked letters in capitals; blanks and hyphens between them are dropped."""
    answer = final_answer(text)
    letters = "".join((answer or "").replace("-", " ").split()).upper()
    return letters if letters.isascii() and letters.isalpha() else None


def verify(text: str, item: Item) -> bool:
    """The marked letters are the word backwards."""
    return answer_key(text) == item.gold


LETTERS = Task(
    name="letters",
    make=make,
    verify=verify,
    answer_key=answer_key,
    levels=(3, 4, 5, 6),
    verifier_needs_gold=True,
)
