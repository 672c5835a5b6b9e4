"""Completions to try rewards on: the gold answers of a task or a file, and completions stored in a file. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from burnish.answers.extract import MARK, final_answer
from burnish.core.errors import DataError, RewardError
from burnish.core.table import load_row
from burnish.data import formats
from burnish.data.sources import read_rows
from burnish.data.tasks.base import Fold, Item, Task, items
from burnish.rewards.scoring import Breakdown, Component, Rewards

SHOWN = 5  # failing rows a message lists


@dataclass(frozen=True)
class Samples:
    """Prompts, completions and columns as rewards are given them. `where` says where each came from."""

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, list[Any]]
    where: list[str]

    @property
    def groups(self) -> list[int]:
        """Samples with the same prompt are a group."""
        first: dict[str, int] = {}
        return [first.setdefault(json.dumps(prompt), i) for i, prompt in enumerate(self.prompts)]

    @property
    def shape(self) -> str:
        """What a user's function is handed."""
        return "texts" if isinstance(self.completions[0], str) else "lists of messages"

    def __add__(self, other: Samples) -> Samples:
        """Both, with the columns that both have."""
        shared = {n: [*self.columns[n], *other.columns[n]] for n in self.columns if n in other.columns}
        texts = self.shape == other.shape == "texts"
        pairs = zip((self.prompts, self.completions), (other.prompts, other.completions))
        prompts, completions = ([*mine, *theirs] if texts else [*_turns(mine), *_turns(theirs)] for mine, theirs in pairs)
        if not texts:
            completions = [[{**turn, "role": "assistant"} for turn in turns] for turns in completions]
        return Samples(prompts, completions, shared, [*self.where, *other.where])


def _turns(values: Sequence[Any]) -> list[Any]:
    return [[{"role": "user", "content": v}] if isinstance(v, str) else v for v in values]


def task_columns(task: Task, asked: Sequence[Item]) -> dict[str, list[Any]]:
    """The columns a task's rows have: answer (gold), question, task, level, facts."""
    return {
        "answer": [item.gold for item in asked],
        "question": [item.question for item in asked],
        "task": [task.name for _ in asked],
        "level": [item.level for item in asked],
        "facts": [dict(item.facts) for item in asked],
    }


def gold_of_task(
    name: str,
    levels: Sequence[int] | None,
    rows: int,
    *,
    fold: Fold = "train",
    target: Literal["rationale", "answer"] = "rationale",
    seed: int = 0,
) -> Samples:
    """Questions of a task with the completion that supervised tuning would learn."""
    task: Any = load_row("task", name)
    asked = items(task, fold, levels, rows, seed)
    gold = [item.rationale if target == "rationale" else item.answer for item in asked]
    return Samples([item.question for item in asked], gold, task_columns(task, asked), [item.id for item in asked])


def gold_of_file(file: str | Path, columns: Mapping[str, str], rows: int | None, gold: str = "answer") -> Samples:
    """A file's prompts, each with its own completion or else with its marked gold answer (column `gold`).

    Raises DataError where a row has neither.
    """
    found = formats.load(file, columns=columns, need="prompt", limit=rows)
    prompts: list[Any] = []
    completions: list[Any] = []
    for example in found.examples:
        if example.completion:
            text = example.completion[-1].content
        elif example.columns.get(gold) is not None:
            text = marked(example.columns[gold])
        else:
            known = ", ".join(example.columns) or "no other column"
            message = f"no completion and no column {gold!r} to make one from; found: {known}"
            raise DataError(message, where=example.where, remedy="say which holds the gold answer: --gold COLUMN")
        asked = [{"role": m.role, "content": m.content} for m in example.prompt]
        prompts.append(asked if found.conversational else asked[-1]["content"])
        completions.append([{"role": "assistant", "content": text}] if found.conversational else text)
    return Samples(prompts, completions, _columns([e.columns for e in found.examples]), [e.where for e in found.examples])


def marked(answer: Any) -> str:
    """A gold answer as a completion that marks it; a text with a mark of its own stays as it is."""
    text = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
    return text if final_answer(text) else f"{MARK} {text}"


def stored(file: str | Path, rows: int | None = None) -> Samples:
    """Completions in a file: rows of `prompt`, `completion` (texts or message lists) and the columns rewards read.

    Any completion is welcome, empty ones too. Raises DataError for rows without the two.
    """
    found: list[tuple[dict[str, Any], str]] = []
    for located in read_rows(file):
        row = dict(located.row)
        for name in ("prompt", "completion"):
            value = row.get(name)
            turns = isinstance(value, list) and value and all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in value)
            if not (isinstance(value, str) or turns):
                have = ", ".join(row) or "none"
                wanted = "wanted a text or a list of messages"
                raise DataError(f"column {name!r} is missing or neither, {wanted}; found: {have}", where=located.where)
        found.append((row, located.where))
        if rows is not None and len(found) >= rows:
            break
    shapes = {isinstance(row["completion"], str) for row, _ in found}
    if len(shapes) > 1:
        raise DataError("some completions are texts and some lists of messages", where=str(file))
    prompts = [row.pop("prompt") for row, _ in found]
    completions = [row.pop("completion") for row, _ in found]
    return Samples(prompts, completions, _columns([row for row, _ in found]), [where for _, where in found])


def gold_in(samples: Samples, gold: str = "answer") -> Samples:
    """The gold answers of stored completions, one for each different prompt."""
    if gold not in samples.columns:
        raise DataError(f"there is no column {gold!r} to hold rewards against", where=samples.where[0])
    first = sorted(set(samples.groups))
    texts = [marked(samples.columns[gold][i]) for i in first]
    completions = texts if samples.shape == "texts" else [[{"role": "assistant", "content": t}] for t in texts]
    columns = {name: [values[i] for i in first] for name, values in samples.columns.items()}
    return replace(
        samples, prompts=[samples.prompts[i] for i in first], completions=completions, columns=columns,
        where=[samples.where[i] for i in first],
    )  # fmt: skip


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns that every row has."""
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: [row[name] for row in rows] for name in shared}


def answers_of_others(gold: Samples) -> Samples | None:
    """Every prompt with the gold completion of another row that reads differently; None where all read the same.

    A reward that also gives these full marks tells nothing apart.
    """
    count, swapped = len(gold.completions), list[Any]()
    for i in range(count):
        others = (gold.completions[(i + j) % count] for j in range(1, count))
        if (other := next((o for o in others if o != gold.completions[i]), None)) is None:
            return None
        swapped.append(other)
    return replace(gold, completions=swapped)


# ---- gold ----------------------------------------------------------------------------------------------------------


def held_against_gold(components: Sequence[Component]) -> list[str]:
    """The rewards that say they read a column of the data: a gold completion must have full marks from these."""
    return [c.title for c in components if c.needs]


def short_of_full(rewards: Rewards, gold: Samples, scores: Breakdown, full: float) -> list[tuple[str, int, str]]:
    """(reward, sample, what it said) where a gold completion scored less than `full`, abstained or failed."""
    found: list[tuple[str, int, str]] = []
    for title in held_against_gold(rewards.components):
        for i, one in enumerate(scores.components[title]):
            if one.detail == "not routed here":
                continue
            if one.value is None or one.value < full:
                found.append((title, i, one.detail or ("abstained" if one.value is None else f"scored {one.value:g}")))
    return found


def refuse(gold: Samples, failing: Sequence[tuple[str, int, str]], full: float) -> RewardError:
    """The error for gold completions that do not score full marks, with the rows."""
    lines: list[str] = []
    for title, i, said in failing[:SHOWN]:
        lines.append(f"{gold.where[i]}  {title} {said}; gold completion: {json.dumps(gold.completions[i])[:200]}")
    more = f"\n  and {len(failing) - SHOWN} more" if len(failing) > SHOWN else ""
    message = f"{len(failing)} gold answers score less than {full:g}: what is right would go unrewarded\n  "
    return RewardError(
        message + "\n  ".join(lines) + more,
        where="gold",
        remedy="mend the reward or the data; where full marks are another number, say --full",
    )
