"""report.json: everything a run folder says about a run, in one plain dictionary (its shape is `report/schema.py`)."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from burnish import __version__
from burnish.core.errors import ConfigError, StorageError
from burnish.core.grammar import parse
from burnish.core.runs import RunFolder, StageFolder
from burnish.report import units
from burnish.report.doubts import warnings
from burnish.report.drawn import rounds, series
from burnish.report.files import (
    Completion,
    DataSummary,
    DecisionRow,
    EvalFile,
    LedgerFile,
    MetricsRow,
    Reading,
    RunFile,
    StageFile,
    TimingRow,
)
from burnish.report.frontier import frontiers
from burnish.report.pairs import mean_and_interval, metric_of
from burnish.report.verdict import comparisons, primary_metric, verdict

SAMPLES = 20  # per eval
POINTS = 600  # of a curve
TEXT = 2_000  # characters kept of a prompt or a completion
MASK_ROWS, MASK_TOKENS = 6, 1_200
PAGE = 100_000  # characters kept of a recipe
Row = dict[str, Any]

STATES = {
    "complete": ("finished", "The run finished."),
    "stopped by budget": ("stopped by budget", "The run stopped cleanly because a budget was used up."),
    "interrupted": ("interrupted", "The run was interrupted before it finished; continue it with --resume."),
    "failed": ("failed", "The run ended with an error before it finished; continue it with --resume once the cause is gone."),
}


def collect(run_folder: str | Path) -> Row:
    """Read a run folder, whatever state it is in. Raises ConfigError where there is none, StorageError where it cannot be read."""
    root = Path(run_folder)
    folder = RunFolder(root)
    try:
        if not root.is_dir():
            raise ConfigError("there is no such run folder" if not root.exists() else "is a file, not a run folder", where=str(root))
        stage_folders = folder.stages()
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror or error}", where=str(root)) from error
    if not stage_folders and not folder.run.exists():
        raise ConfigError(
            "holds no run: neither run.json nor a stage folder such as 00-base",
            where=str(root),
            remedy="name a folder that burnish run made, such as runs/quickstart",
        )
    reading = Reading(root)
    run = reading.file(folder.run, RunFile) or RunFile()
    state, words = _state(run.status, root)
    planned = _planned(run)
    asked = (run.primary.eval, run.primary.strategy) if run.primary else None
    read = [_Stage(each, reading, state, asked) for each in stage_folders]
    stages = [each.row for each in read]
    judged = [(each.row["name"], each.evals) for each in read]
    if not stages or stages[0]["name"] != "base":
        stages.insert(0, _absent_base())
        judged.insert(0, ("base", {}))
    compared = comparisons(judged)
    report: Row = {
        "schema": 1, "burnish": __version__,
        "run": {
            "name": run.name or root.resolve().name, "folder": str(root), "about": run.about or None, "recipe": run.recipe,
            "model": run.model, "seed": run.seed, "state": state, "state_words": words, "started": run.started,
            "finished": run.finished, "starts": run.starts,
        },
        "verdict": verdict(asked, state, stages, compared, planned), "warnings": [], "stages": stages, "comparisons": compared,
        "frontiers": frontiers(stages, judged), "ledger": total([s["ledger"] for s in stages if s["ledger"]]),
        "samples": _samples(judged), "provenance": _provenance(folder, run, stages, reading),
    }  # fmt: skip
    chosen = asked is None and primary_metric(None, stages) is not None
    report["warnings"] = warnings(report, missing=reading.missing, damaged=reading.damaged, planned=planned, chosen=chosen)
    return report


def _state(status: str | None, root: Path) -> tuple[str, str]:
    """What became of the run: what it last said, and whether a process still holds its lock."""
    if status == "running":
        if _held(root):
            return "running", "The run is still going; this is what there is so far."
        return "crashed", "The run crashed: its process ended without saying so. Continue it with --resume."
    return STATES.get(status or "", ("unknown", "What became of the run is not known: run.json does not say."))


def _held(root: Path) -> bool:
    """Whether a living process holds the run's lock; the kernel frees it when its holder dies, however it dies."""
    try:
        with open(root / ".lock", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return False


def _planned(run: RunFile) -> list[str]:
    stages = (run.resolved or {}).get("stages")
    rows = stages if isinstance(stages, list) else []
    return [str(s["name"]) for s in rows if isinstance(s, dict) and "name" in s]


def _absent_base() -> Row:
    empty = dict.fromkeys(("folder", "method", "steps", "skipped_steps", "stopped_by", "input", "output", "data", "curves", "ledger"))
    return {"name": "base", **empty, "status": "missing", "mask_view": [], "series": [], "rounds": [], "evals": []}


def _rank(file: EvalFile, asked: tuple[str, str] | None) -> tuple[bool, bool, str]:
    """The primary eval first, likelihoods of held-out rows last."""
    return asked is None or file.eval != asked[0], metric_of([s.strategy for s in file.strategies]) == "likelihood", file.eval


class _Stage:
    """One stage folder: its row of the report, and its evaluations whole, for comparisons and samples."""

    def __init__(self, folder: StageFolder, reading: Reading, state: str, asked: tuple[str, str] | None) -> None:
        self.reading = reading
        about = reading.file(folder.stage, StageFile, expected=state == "finished") or StageFile()
        status = about.status or ("running" if state == "running" else "not finished")
        if status == "running" and state != "running":
            status = "not finished"
        done = status in ("complete", "stopped by budget")
        found = self._evaluations(folder)
        self.evals = dict(sorted(found.items(), key=lambda each: _rank(each[1], asked)))
        is_base = folder.root.name.startswith("00-")
        ledger = reading.file(folder.ledger, LedgerFile, expected=done)
        metrics = [] if is_base else reading.lines(folder.metrics, MetricsRow, expected=done)
        self.row: Row = {
            "name": "base" if is_base else folder.name, "folder": folder.root.name, "method": about.method,
            "status": status, "steps": about.steps, "skipped_steps": about.skipped_steps, "stopped_by": about.stopped_by,
            "input": about.input, "output": about.output, "data": _data(about.data) if about.data else None,
            "mask_view": [_masked(row.where, row.tokens) for row in about.mask_view[:MASK_ROWS]],
            "curves": None if is_base else _curves(folder, metrics, reading, expected=done), "series": series(metrics),
            "rounds": rounds(folder, reading),
            "evals": [_evaluation(e) for e in self.evals.values()], "ledger": _ledger(ledger) if ledger else None,
        }  # fmt: skip

    def _evaluations(self, folder: StageFolder) -> dict[str, EvalFile]:
        found: dict[str, EvalFile] = {}
        for path in sorted(folder.evaluation("any").parent.glob("*.json")):
            if path.name.startswith("."):
                continue
            where = str(path.relative_to(self.reading.root))
            file = self.reading.file(path, EvalFile)
            if file is None:
                continue
            if file.n == 0 or (file.item_ids and len(file.item_ids) != file.n):
                self.reading.damaged.append(f"{where} says n = {file.n} and lists {len(file.item_ids)} items")
            elif file.eval in found:
                self.reading.damaged.append(f"{where} is a second evaluation named {file.eval}")
            else:
                file.strategies = self._whole(file, where)
                found[file.eval] = file
        return found

    def _whole(self, file: EvalFile, where: str) -> list[Any]:
        """The strategies with one grade an item; the grades are what counts, not the accuracy written beside them."""
        kept: dict[str, Any] = {}
        for row in file.strategies:
            if len(row.correct) != file.n:
                self.reading.damaged.append(f"{where}: {row.strategy} has {len(row.correct)} grades for {file.n} items")
            elif row.strategy in kept:
                self.reading.damaged.append(f"{where} lists {row.strategy} twice; the first is used")
            else:
                kept[row.strategy] = row
                mean = sum(row.correct) / file.n
                if row.accuracy is not None and abs(row.accuracy - mean) > 5e-4:
                    self.reading.damaged.append(f"{where}: {row.strategy} says {row.accuracy:.4f}, its grades say {mean:.4f}, which is used")
        return list(kept.values())


def _evaluation(file: EvalFile) -> Row:
    items = hashlib.sha256("\n".join(file.item_ids).encode()).hexdigest() if file.item_ids else "unknown"
    strategies = []
    for row in file.strategies:
        accuracy, interval = mean_and_interval(row.correct)
        completions = row.completions or file.n * _draws(row.strategy)
        spend = {k: None if v is None else v / file.n for k, v in row.spend.model_dump().items()}
        strategies.append({
            "strategy": row.strategy, "oracle": row.oracle, "n": file.n, "accuracy": accuracy, "interval": interval,
            "completions": completions, "truncated": row.truncated, "truncated_share": _share(row.truncated, completions),
            "unanswered": row.unanswered, "unanswered_share": _share(row.unanswered, completions), "per_question": spend,
        })  # fmt: skip
    return {
        "eval": file.eval, "task": file.task, "fold": file.fold, "metric": metric_of([s.strategy for s in file.strategies]), "n": file.n, "items": items, "seconds": file.seconds,
        "settings": file.settings, "strategies": strategies,
    }  # fmt: skip


def _share(part: int | None, whole: int) -> float | None:
    return None if part is None else min(1.0, part / whole)


def _draws(strategy: str) -> int:
    """Completions a strategy draws for one question, as its name says."""
    try:
        return parse(strategy).n or 1
    except ConfigError:
        return 1


def _data(data: DataSummary) -> Row:
    sources = []
    for source in data.sources:
        what = source.get("file") or source.get("task") or "rows"
        rows = source.get("rows")
        sha = source.get("sha256")
        sources.append(f"{what}" + (f", {units.whole(rows)} rows" if isinstance(rows, int) else "") + (f", sha256 {sha}" if sha else ""))
    return {
        "rows": data.rows, "validation_rows": data.validation_rows, "dropped": data.dropped, "tokens": data.tokens,
        "label_tokens": data.label_tokens, "longest": data.longest, "format": data.format, "sources": sources,
        "notices": [f"{name}: {value}" for name, value in data.notices.items()],
    }  # fmt: skip


def _masked(where: str, tokens: Sequence[tuple[str, bool]]) -> Row:
    shown = [(text[:TEXT], learned) for text, learned in tokens[:MASK_TOKENS]]
    trained = sum(learned for _, learned in tokens)
    return {"where": where, "tokens": shown, "total": len(tokens), "trained": trained, "cut": len(tokens) - len(shown)}


def _curves(folder: StageFolder, rows: Sequence[MetricsRow], reading: Reading, *, expected: bool) -> Row | None:
    timing = reading.lines(folder.timing, TimingRow, expected=expected)
    if not rows:
        return None
    train = [r for r in rows if r.kind == "train"]
    validation = [r for r in rows if r.kind == "validation"]
    every, kept = -(-len(train) // POINTS) or 1, -(-len(validation) // POINTS) or 1
    buckets = [train[i : i + every] for i in range(0, len(train), every)]
    speeds = [t.train_tokens_per_s for t in timing if t.train_tokens_per_s is not None]
    return {
        "steps_per_point": every, "step": [b[-1].step for b in buckets],
        "loss": [_mean([r.loss for r in b]) for b in buckets],
        "grad_norm": [max((r.grad_norm for r in b if r.grad_norm is not None), default=None) for b in buckets],
        "lr": [b[-1].lr for b in buckets],
        "validation_step": [r.step for r in validation[::-kept][::-1]], "validation_loss": [r.loss for r in validation[::-kept][::-1]],
        "resumed_after": sorted({t.step for t in timing if t.kind == "resume"})[:100],
        "median_tokens_per_s": median(speeds) if speeds else None,
    }  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


# ---- the ledger -----------------------------------------------------------------------------------------------------


def _ledger(file: LedgerFile) -> Row:
    phases: dict[str, Row] = {}
    for phase, counted in file.counted.items():
        tokens = {name.removesuffix("_tokens"): n for name, n in counted.items() if name.endswith("_tokens")}
        phases[phase] = {
            "tokens": tokens, "useful_flops": counted.get("useful_flops"), "executed_flops": counted.get("executed_flops"), "seconds": None,
        }  # fmt: skip
    for phase, seconds in file.measured.seconds.items():
        blank = {"tokens": {}, "useful_flops": None, "executed_flops": None}
        phases.setdefault(phase, blank)["seconds"] = seconds
    measured = {"peak_memory_bytes": file.measured.peak_memory_bytes, "joules": file.measured.joules, "money": file.measured.money}
    return _summed(phases) | measured


def _summed(phases: Mapping[str, Row]) -> Row:
    tokens: dict[str, int] = {}
    for phase in phases.values():
        for role, n in phase["tokens"].items():
            tokens[role] = tokens.get(role, 0) + n
    both = [p for p in phases.values() if p["useful_flops"] is not None and p["executed_flops"]]
    executed = sum(p["executed_flops"] for p in both)
    return {
        "tokens": tokens, "useful_flops": _added(p["useful_flops"] for p in phases.values()),
        "executed_flops": _added(p["executed_flops"] for p in phases.values()),
        "work_efficiency": sum(p["useful_flops"] for p in both) / executed if executed else None,
        "seconds": _added(p["seconds"] for p in phases.values()), "phases": dict(phases),
    }  # fmt: skip


def _added(values: Any) -> Any:
    """The sum of what was measured; None where nothing was."""
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def total(ledgers: Sequence[Row]) -> Row:
    """The ledger of the run: sums over its stages, and the highest peak of memory."""
    phases: dict[str, Row] = {}
    for ledger in ledgers:
        for name, phase in ledger["phases"].items():
            so_far = phases.setdefault(name, {"tokens": {}, "useful_flops": None, "executed_flops": None, "seconds": None})
            for role, n in phase["tokens"].items():
                so_far["tokens"][role] = so_far["tokens"].get(role, 0) + n
            for key in ("useful_flops", "executed_flops", "seconds"):
                so_far[key] = _added([so_far[key], phase[key]])
    peaks = [ledger["peak_memory_bytes"] for ledger in ledgers if ledger["peak_memory_bytes"] is not None]
    sums = {key: _added(ledger[key] for ledger in ledgers) for key in ("joules", "money")}
    return _summed(phases) | {"peak_memory_bytes": max(peaks, default=None), **sums}


# ---- samples and provenance -----------------------------------------------------------------------------------------


def _samples(judged: Sequence[tuple[str, Mapping[str, EvalFile]]]) -> list[Row]:
    """The same questions at every stage, in the order of the first stage that has them."""
    made: list[Row] = []
    for name in dict.fromkeys(name for _, evals in judged for name in evals):
        rows: dict[str, Row] = {}
        for stage, evals in judged:
            for sample in (s for s in evals[name].samples if s.completions) if name in evals else ():
                if sample.id not in rows and len(rows) >= SAMPLES:
                    continue
                row = rows.setdefault(sample.id, {
                    "eval": name, "id": sample.id, "prompt": sample.prompt[:TEXT], "prompt_cut": max(0, len(sample.prompt) - TEXT),
                    "gold": sample.gold, "level": sample.level, "stages": [],
                })  # fmt: skip
                if all(seen["stage"] != stage for seen in row["stages"]):
                    row["stages"].append({"stage": stage, "completions": [_completion(c) for c in sample.completions]})
        made += rows.values()
    return made


def _completion(c: Completion) -> Row:
    answer = None if c.answer is None else c.answer[:TEXT]
    text = c.text or ""
    return {"strategy": c.strategy, "text": text[:TEXT], "answer": answer, "correct": c.correct, "cut": max(0, len(text) - TEXT)}


def _provenance(folder: RunFolder, run: RunFile, stages: Sequence[Row], reading: Reading) -> Row:
    recipe, resolved = reading.text(folder.recipe), reading.text(folder.resolved)
    decisions = reading.json(folder.decisions)
    environment = reading.json(folder.environment)
    made = []
    for name, value in (decisions.items() if isinstance(decisions, dict) else ()):
        row = reading.typed(value, DecisionRow, f"decisions.json: {name}")
        if row is not None:
            made.append({"name": name, "value": str(row.value), "why": row.why, "measured": row.measured or {}})
    hashes = [] if recipe is None else [("recipe.yaml", hashlib.sha256(recipe.encode()).hexdigest())]
    hashes += [(f"{s['name']}, weights {way}", s[key]) for s in stages for key, way in (("input", "in"), ("output", "out")) if s[key]]
    hashes += [(f"{e['eval']}, questions in order", e["items"]) for s in stages[:1] for e in s["evals"] if e["items"] != "unknown"]
    again = f"{run.name or 'run'}-again"[:64]
    command = None if resolved is None else f"burnish run {shlex.quote(str(folder.resolved))} --set name={shlex.quote(again)}"
    return {
        "recipe": None if recipe is None else recipe[:PAGE], "resolved": None if resolved is None else resolved[:PAGE],
        "decisions": made, "environment": environment if isinstance(environment, dict) else {}, "seed": run.seed,
        "hashes": hashes, "command": command,
    }  # fmt: skip
