"""Process rewards that a bundled task can verify: is this step right, and is the answer at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from burnish.core.errors import ConfigError
from burnish.core.table import About, Table, load_row
from burnish.data.tasks.base import Item
from burnish.rewards.base import Completion


def task_steps(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    steps: Sequence[Sequence[str]],
    answer: Sequence[str],
    task: Sequence[str],
    question: Sequence[str] | None = None,
    level: Sequence[int] | None = None,
    facts: Sequence[dict[str, Any]] | None = None,
) -> list[list[float | None]]:
    """1 for a step that the row's own bundled task finds right after those before it, else 0; the last step is judged
    by the answer: 1 where the task's verifier accepts the completion.

    Columns as `task`. Steps are cut as `rewards.steps` says. Process supervision of the steps and of the outcome at once
    (section 4.1.3, arXiv:2402.03300). Raises ConfigError for a task whose steps nothing checks.
    """
    found: list[list[float | None]] = []
    for i, (prompt, parts, gold, name) in enumerate(zip(prompts, steps, answer, task)):
        asked = question[i] if question else prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        known = facts[i] if facts else {}
        item = Item(asked, str(gold), rationale="", answer="", level=level[i] if level else 0, facts=known)
        of: Any = load_row("task", name)
        if of.right_step is None:
            raise ConfigError(f"nothing checks the steps of the task {name!r}", where="reward task_steps", remedy="use it with sums or route")
        said = [part.strip() for part in parts]
        right: list[float | None] = [float(of.right_step(said[: j + 1], item)) for j in range(len(said) - 1)]
        found.append([*right, float(of.verify("".join(parts), item))])
    return found


STEPS = Table(
    "reward",
    {"task_steps": task_steps},
    also={"process": "task_steps", "prm": "task_steps", "step_verifier": "task_steps"},
    about={"task_steps": About(taxonomy=("P9", "R9"), paper="arXiv:2402.03300", year=2024)},
)
