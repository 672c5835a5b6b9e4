"""The data of the suite: seeded, the same for every system, made without any library."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, list[int]]
FIRST_ID, LAST_ID = 100, 20_000  # away from special tokens


def ids(dice: random.Random, n: int, vocabulary: int) -> list[int]:
    low = min(FIRST_ID, vocabulary // 4)
    return [dice.randrange(low, min(vocabulary, LAST_ID)) for _ in range(n)]


def log_normal(dice: random.Random, median: float, sigma: float, least: int, most: int) -> int:
    return max(least, min(most, round(dice.lognormvariate(0, sigma) * median)))


def row(dice: random.Random, n: int, vocabulary: int, prompt: float) -> Row:
    """n tokens of which the first `prompt` part is no label."""
    return {"input_ids": ids(dice, n, vocabulary), "completion_mask": [int(i >= n * prompt) for i in range(n)]}


def varied(count: int, vocabulary: int, *, seed: int = 0, median: int = 171, least: int = 40, most: int = 512) -> list[Row]:
    """Rows of log-normal length (sigma 0.5), half prompt."""
    dice = random.Random(seed)
    return [row(dice, log_normal(dice, median, 0.5, least, most), vocabulary, 0.5) for _ in range(count)]


def level(count: int, length: int, vocabulary: int, *, seed: int = 1) -> list[Row]:
    """Rows of one length, every token a label."""
    dice = random.Random(seed)
    return [row(dice, length, vocabulary, 0.0) for _ in range(count)]


def grouped(rows: Sequence[Row], batch_rows: int, batches: int) -> list[Row]:
    """What grouping by length makes of `rows`: sorted, cut into batches, and `batches` of those taken at even quantiles."""
    ordered = sorted(rows, key=lambda r: len(r["input_ids"]))
    cut = [ordered[i : i + batch_rows] for i in range(0, len(ordered) - batch_rows + 1, batch_rows)]
    taken = [cut[int((i + 0.5) / batches * len(cut))] for i in range(batches)]
    return [r for batch in taken for r in batch]


def short(rows: Sequence[Row], count: int, tokens: int) -> list[Row]:
    """The last `tokens` of the first `count` rows, half of them labels: the first, cheap step of both systems."""
    cut = [r["input_ids"][-tokens:] for r in rows[:count]]
    return [{"input_ids": x, "completion_mask": [int(i >= len(x) // 2) for i in range(len(x))]} for x in cut]


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def rollouts(prompts: int, group: int, vocabulary: int, *, seed: int = 2, median: float = 12, most: int = 40, prompt: tuple[int, int] = (16, 64)) -> dict[str, Any]:
    """Prompts, each wanted `group` times, and the length every row is to have: log-normal (sigma 0.7), 2..most."""
    dice = random.Random(seed)
    made = [ids(dice, dice.randint(*prompt), vocabulary) for _ in range(prompts)]
    lengths = [log_normal(dice, median, 0.7, 2, most) for _ in range(prompts * group)]
    return {"prompts": [p for p in made for _ in range(group)], "lengths": lengths}


def questions(prompts: int, group: int, vocabulary: int, *, prompt: int = 128, median: float = 52, most: int = 128, seed: int = 3) -> dict[str, Any]:
    """`rollouts` with prompts of one length, and limits (`limited`)."""
    return limited(rollouts(prompts, group, vocabulary, seed=seed, median=median, most=most, prompt=(prompt, prompt)), group)


def limited(work: dict[str, Any], group: int) -> dict[str, Any]:
    """Beside each row's length, the most tokens a completion of its prompt may have to be worth 1.

    That is the lower median of its group's lengths: some of a group keep within it and some do not (where all were equal one
    is made shorter), so that no group has equal rewards, whatever tokens are drawn.
    """
    lengths = list(work["lengths"])
    for first in range(0, len(lengths), group):
        if len(set(lengths[first : first + group])) == 1:
            lengths[first] -= 1
    limits: list[int] = []
    for first in range(0, len(lengths), group):
        own = sorted(lengths[first : first + group])
        shorter = [n for n in own if n < own[-1]]
        limits += [shorter[min(len(shorter), group // 2) - 1]] * group
    return work | {"lengths": lengths, "limits": limits}


def brief(work: dict[str, Any], group: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    """The same questions with prompts and completions of at most `tokens`, and completions to learn from: a cheap first step."""
    dice = random.Random(4)
    cut = work | {"prompts": [p[-tokens:] for p in work["prompts"]], "lengths": [min(n, tokens) for n in work["lengths"]]}
    cut = limited(cut, group)
    return cut | {"given": [ids(dice, n, vocabulary) for n in cut["lengths"]]}
