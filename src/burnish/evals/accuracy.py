"""How many items of a task a model answers correctly, strategy by strategy, and what that cost.

Every strategy sees the same items in the same order, and strategies over independent samples the same draws. The
sampling temperature is chosen on items of another fold, once, before the test items are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from burnish.core.errors import ConfigError, DataError
from burnish.core.records import Message, Sampling, Spend
from burnish.data.tasks.base import Item, Task
from burnish.engines.base import Engine, Prompt
from burnish.engines.pool import Pool
from burnish.maths.estimators import bootstrap_mean, wilson
from burnish.search.base import Bound, Budget, Judge, Outcome, strategy

CANDIDATES = (0.4, 0.6, 0.8, 1.0)
SHOWN = 20


class Chat(Protocol):
    """What turns a question into ids: data.chat.ChatFormat."""

    template_sha256: str | None

    def prompt(self, messages: Sequence[Message], *, where: str = "prompt") -> tuple[int, ...]: ...


def stream_of(item_id: str) -> int:
    """The number of an item's random streams: a hash of its id, so that its samples do not depend on its neighbours."""
    return int.from_bytes(hashlib.blake2b(item_id.encode(), digest_size=8).digest(), "big") >> 1


def judge_of(task: Task, items: Sequence[Item]) -> Judge:
    """What this task lends to strategies over these items."""

    def right(index: int, text: str) -> bool:
        return task.verify(text, items[index])

    return Judge(task.answer_key if task.has_answer_key else None, right, None if task.verifier_needs_gold else right)


def prompts_of(chat: Chat, items: Sequence[Item]) -> list[Prompt]:
    """Each question as one user turn, or the conversation in `facts["prompt"]` where an item brings one.

    Raises DataError where two items share an id.
    """
    ids = [item.id for item in items]
    if len(set(ids)) != len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise DataError("is the id of two items", where=twice or "items", remedy="give every item its own id")
    turns = [i.facts.get("prompt") or [Message("user", i.question)] for i in items]
    return [Prompt(stream_of(i.id), chat.prompt(said, where=i.id)) for i, said in zip(items, turns)]


def evaluate(
    engine: Engine,
    chat: Chat,
    task: Task,
    items: Sequence[Item],
    strategies: Sequence[str],
    sampling: Sampling,
    *,
    validation: Sequence[Item] = (),
    candidates: Sequence[float] = CANDIDATES,
    name: str | None = None,
    fold: str = "test",
    stage: str = "",
    shown: int = SHOWN,
) -> dict[str, Any]:
    """One eval of one model as `evals/<name>.json` holds it; a pure function of weights, items and settings.

    validation  items to choose the temperature on among `candidates` (empty: `sampling.temperature` as given)
    shown       items whose completions are kept
    Raises ConfigError for a strategy that does not exist or that the task cannot serve, DataError without items.
    """
    if not items:
        raise DataError("no items to evaluate on", where=f"eval {name or task.name}", remedy="ask for at least 1 row")
    bound = [strategy(text, f"eval {name or task.name}") for text in dict.fromkeys(strategies)]
    if not bound:
        raise ConfigError("no strategies", where=f"eval {name or task.name}", remedy="strategies: [greedy, vote:16]")
    pool = Pool.over(engine)
    for b in bound:  # asked for nothing, each says now whether this task and engine can serve it
        b.run(pool, [], judge_of(task, []), Budget(sampling))
    measured: dict[str, float] = {}
    chosen_on = "given"
    if validation and candidates and any(b.spec.name != "greedy" for b in bound):
        by = deciding(bound)
        measured = _measure(pool, chat, task, validation, by, sampling, candidates)
        best = max(measured.values())
        sampling = replace(sampling, temperature=min(float(t) for t, a in measured.items() if a == best))
        chosen_on = f"validation, n={len(validation)}, {by.name}"
    prompts, judge, budget = prompts_of(chat, items), judge_of(task, items), Budget(sampling)
    outcomes = {b: b.run(pool, prompts, judge, budget) for b in bound}
    grades = {b: _grades(task, items, found) for b, found in outcomes.items()}
    return {
        "schema": 1,
        "eval": name or task.name,
        "task": task.name,
        "fold": fold,
        "n": len(items),
        "stage": stage,
        "settings": {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "max_new_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            "candidates": measured,
            "chosen_on": chosen_on,
            "template": chat.template_sha256,
        },
        "item_ids": [item.id for item in items],
        "strategies": [_row(b, grades[b], outcomes[b], task) for b in bound],
        "samples": [
            {
                "id": item.id,
                "prompt": item.question,
                "gold": item.gold,
                "level": item.level,
                "completions": [_completion(b, outcomes[b][i], task, item) for b in bound],
            }
            for i, item in enumerate(items[:shown])
        ],
    }


def deciding(bound: Sequence[Bound]) -> Bound:
    """The temperature serves whatever answers from most samples (of equals the first); without such, a single sample."""
    choosing = [b for b in bound if "n" in b.parameters and not b.oracle]
    return max(choosing, key=lambda b: b.parameters["n"]) if choosing else strategy("sample")


def _measure(
    pool: Pool,
    chat: Chat,
    task: Task,
    items: Sequence[Item],
    by: Bound,
    sampling: Sampling,
    candidates: Sequence[float],
) -> dict[str, float]:
    """Accuracy on the validation items at each temperature; equal ones are decided for the lower."""
    prompts, judge = prompts_of(chat, items), judge_of(task, items)
    found: dict[str, float] = {}
    for temperature in sorted(set(map(float, candidates))):
        outcomes = by.run(pool, prompts, judge, Budget(replace(sampling, temperature=temperature)))
        grades = _grades(task, items, outcomes)
        found[f"{temperature:g}"] = sum(grades) / len(grades)
        pool.forget()
    return found


def _grades(task: Task, items: Sequence[Item], outcomes: Sequence[Outcome]) -> list[float]:
    """An oracle's own grade, else whether the answer is right."""
    grades: list[float] = []
    for item, outcome in zip(items, outcomes, strict=True):
        if outcome.grade is not None:
            grades.append(outcome.grade)
        else:
            grades.append(float(outcome.text is not None and task.verify(outcome.text, item)))
    return grades


def _row(bound: Bound, grades: Sequence[float], outcomes: Sequence[Outcome], task: Task) -> dict[str, Any]:
    n = len(grades)
    whole = all(g in (0.0, 1.0) for g in grades)
    interval = wilson(int(sum(grades)), n) if whole else bootstrap_mean(grades)
    completions = [t for outcome in outcomes for t in outcome.trace]
    unanswered = sum(task.answer_key(t.text) is None for t in completions) if task.has_answer_key else 0
    return {
        "strategy": bound.name,
        "oracle": bound.oracle,
        "accuracy": sum(grades) / n,
        "interval": list(interval),
        "correct": [int(g) if whole else g for g in grades],
        "spend": asdict(sum((outcome.spend for outcome in outcomes), Spend())),
        "truncated": sum(t.finish == "length" for t in completions),
        "unanswered": unanswered,
    }


def _completion(bound: Bound, outcome: Outcome, task: Task, item: Item) -> Mapping[str, Any]:
    text = outcome.text
    key = task.answer_key(text) if text is not None and task.has_answer_key else None
    return {
        "strategy": bound.name,
        "text": text,
        "answer": None if key is None else str(key),
        "correct": text is not None and task.verify(text, item),
    }
