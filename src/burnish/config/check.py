"""What a recipe would do, worked out before anything is loaded: missing files, derived numbers."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from burnish.config.faults import Fault, Key, RecipeError
from burnish.config.provenance import Resolved, dotted
from burnish.config.schema import Eval, Stage
from burnish.core.grammar import parse
from burnish.core.table import describe_row

COUNTED_BYTES = 256 << 20  # a larger file is not read to count its rows


@dataclass(frozen=True)
class Finding:
    """Something a reader should know: an `error` stops the run, a `note` does not."""

    level: Literal["error", "note"]
    where: str
    key: str
    message: str
    remedy: str | None = None


@dataclass(frozen=True)
class StagePlan:
    """Derived numbers of a stage; `rows` are those trained on, less the held out. None: known once the data is read."""

    name: str
    method: str
    rows: int | None
    held_out: int
    rows_per_step: int
    steps: int | None
    epochs: float | None
    tokens_at_most: int | None


@dataclass(frozen=True)
class EvalPlan:
    """Derived numbers of an eval. `times` counts the base model and every stage that is judged by it."""

    name: str
    source: str
    strategies: tuple[str, ...]
    rows: int | None
    times: int
    sampled_tokens_at_most: int | None


@dataclass(frozen=True)
class Checked:
    """The outcome of `check`: findings, and what would run."""

    findings: tuple[Finding, ...]
    stages: tuple[StagePlan, ...]
    evals: tuple[EvalPlan, ...]

    @property
    def ok(self) -> bool:
        return not any(f.level == "error" for f in self.findings)

    def refuse(self) -> None:
        """Raise RecipeError with every finding that stops the run; return when there is none."""
        faults = [Fault(f.where, f"{f.key}: {f.message}", f.remedy) for f in self.findings if f.level == "error"]
        if faults:
            raise RecipeError(faults)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def _rows_of(path: str) -> int | None:
    """Lines of a .jsonl file that hold something; None for other files and large ones."""
    if not path.endswith(".jsonl") or os.path.getsize(path) > COUNTED_BYTES:
        return None
    with open(path, "rb") as lines:
        return sum(1 for line in lines if line.strip())


def check(resolved: Resolved) -> Checked:
    """Findings and derived numbers. Looks at the files a recipe names; imports no torch, loads no model."""
    recipe, findings = resolved.recipe, list[Finding]()
    beside = resolved.path.parent if resolved.path else Path()

    def found(level: Literal["error", "note"], key: Key, message: str, remedy: str | None = None) -> None:
        place = resolved.provenance.get(dotted(key), "default")
        name = dotted(("stages", recipe.stages[int(key[1])].name, *key[2:]) if key[0] == "stages" else key)
        findings.append(Finding(level, place if place != "default" else recipe.name, name, message, remedy))

    def rows_of(key: Key, path: str) -> int | None:
        if Path(path).is_dir():  # of trajectories: whoever learns from it counts them
            return None
        if Path(path).is_file():
            return _rows_of(path)
        there = beside / path if (beside / path).is_file() else None
        remedy = f"there is one beside the recipe: type {there}" if there else "type the path of yours, or use --set"
        found("error", key, f"file not found: {path}, seen from {Path.cwd()}", remedy)
        return None

    if recipe.model.startswith(("/", "./", "../", "~")) and not Path(recipe.model).expanduser().is_dir():
        found("error", ("model",), f"folder not found: {recipe.model}, seen from {Path.cwd()}")
    stages: list[StagePlan] = []
    for i, stage in enumerate(recipe.stages):
        key: Key = ("stages", i)
        counts: list[int | None] = []
        for j, source in enumerate(stage.data):
            lines = rows_of((*key, "data", j, "file"), source.file) if source.file else source.rows
            counts.append(min(lines, source.limit or lines) if lines is not None else None)
        rows = None if None in counts else sum(filter(None, counts))
        plan = _stage_plan(stage, rows)
        stages.append(plan)
        if rows and rows - (stage.train.validation_rows or 0) < stage.train.batch_rows:  # none at all: the data says why
            held = f", {stage.train.validation_rows} of them held out" if stage.train.validation_rows else ""
            message = f"a step takes {stage.train.batch_rows} rows and the data has {rows}{held}"
            found("error", (*key, "train", "batch_rows"), message)
        for name in ("checkpoint_every", "validate_every"):
            every = getattr(stage.train, name)
            if every is not None and plan.steps is not None and every > plan.steps:
                message = f"every {every} steps is never before the end of {plan.steps}: only the last step counts"
                found("note", (*key, "train", name), message)
    evals: list[EvalPlan] = []
    for name, judged in recipe.evals.items():
        lines = rows_of(("evals", name, "file"), judged.file) if judged.file else judged.rows
        rows = min(lines, judged.rows or lines) if lines is not None else None
        times = 1 + sum(stage.evaluate is None or name in stage.evaluate for stage in recipe.stages)
        evals.append(_eval_plan(name, judged, rows, times))
        if judged.strategies == ("greedy",) and (judged.temperature, judged.top_k, judged.top_p, judged.min_p) != (1.0, 0, 1.0, 0.0):
            message = "greedy takes neither temperature nor top_k nor top_p nor min_p; they do nothing here"
            found("note", ("evals", name, "strategies"), message)
    return Checked(tuple(findings), tuple(stages), tuple(evals))


def _stage_plan(stage: Stage, rows: int | None) -> StagePlan:
    train = stage.train
    steps, epochs = train.steps, train.epochs
    rows = rows - (train.validation_rows or 0) if rows is not None else None
    if steps is None and rows is not None and epochs is not None:
        steps = math.ceil(round(rows * epochs, 6) / train.batch_rows)
    if epochs is None and rows and steps is not None and "rounds" not in stage.method.params:  # what a round keeps is not known yet
        epochs = round(steps * train.batch_rows / rows, 4)
    tokens = steps * train.batch_rows * train.max_tokens if steps and train.max_tokens else None
    held = train.validation_rows or 0
    return StagePlan(stage.name, stage.method.name, rows, held, train.batch_rows, steps, epochs, tokens)


def _samples(text: str) -> int:
    """How many samples a strategy draws: as written, or its row's default."""
    spec = parse(text)
    defaults = [p.default for p in describe_row("strategy", spec.name).parameters if p.name == "n"]
    return spec.n or (defaults[0] if defaults else 1)


def _eval_plan(name: str, judged: Eval, rows: int | None, times: int) -> EvalPlan:
    samples = [_samples(text) for text in judged.strategies]
    source = judged.file or f"{judged.task}, {judged.fold} fold"
    tokens = None
    if rows is not None:
        tokens = times * rows * sum(samples) * judged.max_new_tokens
        if isinstance(judged.temperature, tuple):
            tokens += (
                (judged.validation_rows or 0) * len(judged.temperature) * max(samples) * judged.max_new_tokens * times
            )
    return EvalPlan(name, source, judged.strategies, rows, times, tokens)
