"""Route: find the way through a small printed graph with dead ends.

The question is `Path from A to D: AB BX BC CD CY`: every pair is a one-way edge. `level` is the length of the way.
Every node on the way also opens into a dead end, one or two edges deep: checking a step is a look-up in the question,
choosing it needs a look ahead.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from string import ascii_uppercase

from burnish.answers.extract import MARK, final_answer
from burnish.data.tasks.base import Item, Task, rationale

_QUESTION = re.compile(r"Path from ([A-Z]) to ([A-Z]):((?: [A-Z]{2})+)")


def make(level: int, rng: random.Random) -> Item:
    """A way of `level` edges from start to goal, with a dead end at every node on it."""
    names = rng.sample(ascii_uppercase, 3 * level + 1)
    way, spare = names[: level + 1], names[level + 1 :]
    edges = list(itertools.pairwise(way))
    for node in way[:-1]:
        edges.append((node, spare.pop()))
        if rng.random() < 0.5:
            edges.append((edges[-1][1], spare.pop()))
    rng.shuffle(edges)
    path = "".join(way)
    return Item(
        question=f"Path from {way[0]} to {way[-1]}: {' '.join(a + b for a, b in edges)}",
        gold=path,
        rationale=rationale([a + b for a, b in itertools.pairwise(way)], path),
        answer=f"{MARK}{path}",
        level=level,
        facts={"start": way[0], "goal": way[-1], "edges": ["".join(edge) for edge in edges]},
    )


def read(question: str) -> tuple[str, str, frozenset[str]]:
    """(start, goal, edges) as printed. Raises ValueError for a text that is no such question."""
    match = _QUESTION.fullmatch(question)
    if match is None:
        raise ValueError(f"not a route question: {question!r}")
    return match[1], match[2], frozenset(match[3].split())


def answer_key(text: str) -> str | None:
    """The marked path as letters, or None where there is none: blanks, arrows and commas between nodes are dropped."""
    answer = final_answer(text)
    path = re.sub(r"->|[\s,>-]", "", answer or "").upper()
    return path if re.fullmatch(r"[A-Z]+", path) else None


def verify(text: str, item: Item) -> bool:
    """The marked path goes from start to goal along printed edges. Any such path is right; gold is not read."""
    start, goal, edges = read(item.question)
    path = answer_key(text)
    if path is None or len(path) < 2 or path[0] != start or path[-1] != goal:
        return False
    return all(a + b in edges for a, b in itertools.pairwise(path))


def open_ways(item: Item, steps: Sequence[str]) -> bool:
    """Whether these steps are printed edges, each from where the last one led, and the goal can still be reached."""
    here, goal, edges = read(item.question)
    for step in steps:
        if step not in edges or step[0] != here:
            return False
        here = step[1]
    reached, border = {here}, [here]
    while border:
        node = border.pop()
        new = {edge[1] for edge in edges if edge[0] == node} - reached
        reached |= new
        border += new
    return goal in reached


def right_step(steps: Sequence[str], item: Item) -> bool:
    """The steps so far are printed edges that lead on from one another, and the goal can still be reached."""
    return open_ways(item, steps)


ROUTE = Task(
    name="route",
    make=make,
    verify=verify,
    answer_key=answer_key,
    levels=(2, 3, 4, 5),
    verifier_needs_gold=False,
    right_step=right_step,
)
