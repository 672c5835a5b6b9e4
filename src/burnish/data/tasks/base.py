"""What a bundled task is, and how rows of it are drawn. No torch.

Folds are disjoint by construction: the fold of a row is a hash of its question text, so that no seed, level or index
can put a question into two of them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from burnish.answers.extract import MARK
from burnish.core.errors import ConfigError, DataError
from burnish.core.seeds import derive

Fold = Literal["train", "validation", "test"]
FOLDS: tuple[Fold, ...] = get_args(Fold)
STEP_END = "\n"
PATIENCE = 20_000  # draws in a row without a new question before a level is called exhausted


@dataclass(frozen=True)
class Item:
    """One question. Completions to learn: `rationale` (steps, then the marked answer) or `answer` (marked only).

    gold    the correct answer itself, as `answer_key` would return it for a correct completion
    facts   what the verifier reads besides gold
    """

    question: str
    gold: str
    rationale: str
    answer: str
    level: int
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    id: str = ""


@dataclass(frozen=True)
class Task:
    """A source of questions with an exact verifier.

    make(level, rng) -> Item            verify(completion, item) -> bool
    answer_key(completion) -> what votes are counted by, or None where the completion has no answer
    right_step(steps so far, item) -> whether the last of these steps is right; None where nothing checks steps
    verifier_needs_gold: whether `verify` reads `item.gold`, so that it cannot be used to choose an answer
    """

    name: str
    make: Callable[[int, random.Random], Item]
    verify: Callable[[str, Item], bool]
    answer_key: Callable[[str], Hashable | None]
    levels: tuple[int, ...]
    verifier_needs_gold: bool = True
    has_answer_key: bool = True
    right_step: Callable[[Sequence[str], Item], bool] | None = None


def rationale(steps: Sequence[str], answer: str) -> str:
    """Each step ended by the step end, then the marked answer."""
    return "".join(step + STEP_END for step in steps) + MARK + answer


def fold_of(question: str) -> Fold:
    """80 % train, 10 % validation, 10 % test; a pure function of the text."""
    tenth = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big") % 10
    return "test" if tenth == 0 else "validation" if tenth == 1 else "train"


def items(task: Task, fold: Fold, levels: Sequence[int] | None, rows: int, seed: int) -> list[Item]:
    """`rows` different questions of one fold, levels taking turns; fewer rows are a prefix of more.

    Raises ConfigError for a level or fold the task has not, DataError where a level has too few questions.
    """
    chosen = tuple(dict.fromkeys(levels or task.levels))
    if stray := [level for level in chosen if level not in task.levels]:
        raise ConfigError(f"task {task.name!r} has no level {stray[0]}; it has {', '.join(map(str, task.levels))}")
    if fold not in FOLDS:
        raise ConfigError(f"{fold!r} is not a fold; there are {', '.join(FOLDS)}")
    if rows < 1:
        raise DataError(f"{rows} rows of task {task.name!r} asked for", remedy="ask for at least 1")
    streams = {level: random.Random(derive(seed, "task", task.name, fold, level)) for level in chosen}
    numbers = dict.fromkeys(chosen, 0)
    seen: set[str] = set()
    made: list[Item] = []
    for index in range(rows):
        level = chosen[index % len(chosen)]
        for _ in range(PATIENCE):
            item = task.make(level, streams[level])
            if item.question not in seen and fold_of(item.question) == fold:
                break
        else:
            raise DataError(
                f"level {level} of task {task.name!r} has {numbers[level]} different questions in the {fold} fold, "
                f"and {len(range(chosen.index(level), rows, len(chosen)))} are asked for",
                remedy="ask for fewer rows, or add harder levels",
            )
        seen.add(item.question)
        numbers[level] += 1
        made.append(replace(item, id=f"{task.name}/{fold}/{level}/{numbers[level]:04d}"))
    return made


def shown(task: Task, levels: Sequence[int] | None, shots: int, seed: int) -> list[Item]:
    """The solved questions that a few-shot prompt begins with: `shots` of the train fold, the same for every row of a seed."""
    return items(task, "train", levels, shots, derive(seed, "shots", task.name)) if shots else []


def after_examples(examples: Sequence[Item], question: str) -> str:
    """A question as plain text below solved ones, a blank line after each; alone, where there are none.

    What a base model without a chat template goes on with is an answer in the same form (arXiv:2005.14165).
    """
    lead = "".join(f"{e.question}\n{e.rationale}\n\n" for e in examples)
    return f"{lead}{question}\n" if examples else question
