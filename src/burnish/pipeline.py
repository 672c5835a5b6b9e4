"""A recipe's stages in order: base evaluation, then each stage trained, exported and evaluated, then the report.

Everything that is finished is on disk before the next thing begins, so `--resume` continues from the last whole piece:
a stage, an evaluation, or a checkpoint inside a stage.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from burnish import __version__
from burnish.build import Built, build_stage
from burnish.config.check import check
from burnish.config.load import load
from burnish.config.provenance import Resolved, write
from burnish.core.errors import CompleteError, ConfigError, Interrupted
from burnish.core.ledger import Ledger
from burnish.core.machine import return_freed_heap
from burnish.core.records import Spend
from burnish.core.runs import RunFolder, StageFolder, read_json, write_atomic, write_json
from burnish.core.stop import Stop
from burnish.judges import judges
from burnish.machine import environment
from burnish.models.export import export, model_card, weights_sha256
from burnish.models.load import load_policy
from burnish.models.policy import Policy
from burnish.train.log import Progressing
from burnish.train.loop import State, fit, peak_bytes

PRICE = "BURNISH_PRICE_PER_HOUR"
ON_A_GPU = ("head", "graphs", "kv_bytes")  # decisions of a policy and its engine there


@dataclass(frozen=True)
class Run:
    """A finished (or cleanly stopped) run: its folder and what report.json says."""

    folder: Path
    report: Mapping[str, Any]

    @property
    def verdict(self) -> Mapping[str, Any]:
        return self.report["verdict"]


def run(
    source: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    under: Path = Path("runs"),
    progress: Progressing | None = None,
) -> Run:
    """Run a recipe to its report.

    Raises ConfigError (the recipe, a changed recipe on resume, an unfinished run without `resume`), CompleteError
    (already finished), LockedError, DataError, StorageError, DivergedError, Interrupted; what was done is kept.
    """
    progress = progress or Progressing()
    resolved = load(source, overrides)
    checked = check(resolved)
    checked.refuse()
    for finding in checked.findings:
        progress.say(f"note: {finding.key}: {finding.message}")
    root = under / resolved.recipe.name
    fresh = not root.exists()
    with RunFolder.named(resolved.recipe.name, under) as folder, Stop() as stop:
        try:
            begun = folder.run.exists()
            if begun:
                _may_continue(folder, resolved, resume=resume, allow_change=allow_change)
            decisions: dict[str, Any] = read_json(folder.decisions) if folder.decisions.exists() else {}
            work = _Work(os.fspath(source), resolved, folder, stop, progress, decisions)
            work.prepare()
        except BaseException:
            if fresh and not folder.run.exists():
                _unmake(folder.root)
            raise
        return work.run()


def _unmake(root: Path) -> None:
    """Take back the empty folder made for a run that could not begin. Removes nothing else."""
    (root / ".lock").unlink(missing_ok=True)
    try:
        root.rmdir()
    except OSError:
        return


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for name, child in value.items() for k, v in _flat(child, f"{key}.{name}" if key else str(name)).items()}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return {k: v for i, child in enumerate(value) for k, v in _flat(child, f"{key}.{child.get('name', i)}").items()}
    return {key: value}


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (before, after) of everything that differs between two resolved recipes."""
    a, b = _flat(before), _flat(after)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def _may_continue(folder: RunFolder, resolved: Resolved, *, resume: bool, allow_change: Sequence[str]) -> None:
    """Raises unless this run folder may be continued with this recipe."""
    known = read_json(folder.run)
    if known["status"] == "complete":
        if not folder.report_json.exists() or not folder.report_html.exists():  # killed between its last line and its report
            from burnish.report.write import write_report

            write_report(folder.root)
        raise CompleteError(
            f"this run is already complete; its report is {folder.report_html}",
            where=str(folder.root),
            remedy="start another with --set name=..., or look at it with: burnish report " + str(folder.root),
        )
    if not resume:
        raise ConfigError(
            f"holds an unfinished run ({known['status']})",
            where=str(folder.root),
            remedy="continue it with --resume, or start another with --set name=...",
        )
    changed = changed_keys(known["resolved"], resolved.recipe.model_dump(mode="json"))
    refused = {k: v for k, v in changed.items() if not any(k == a or k.startswith(a + ".") for a in allow_change)}
    if refused:
        lines = "; ".join(f"{k} was {a!r}, now {b!r}" for k, (a, b) in refused.items())
        raise ConfigError(
            f"the recipe changed since the run began: {lines}",
            where=str(folder.root),
            remedy="put it back, or say that you mean it: " + " ".join(f"--allow-change {k}" for k in refused),
        )


class _Work:
    """One process's work on a run."""

    def __init__(self, source: str, resolved: Resolved, folder: RunFolder, stop: Stop, progress: Progressing, decisions: dict[str, Any]) -> None:
        self.source, self.resolved, self.recipe, self.folder = source, resolved, resolved.recipe, folder
        self.stop, self.progress, self.decisions = stop, progress, decisions
        self.begun = time.monotonic()
        self.judges: list[Any] = []

    # ---- before anything is written: everything that can be refused ---------------------------------------------

    def prepare(self) -> None:
        """Load the base model, read all data, build every judge: bad input is refused before the run begins."""
        begin = time.perf_counter()
        self.base = self._load(self.recipe.model)
        self.loading_s = time.perf_counter() - begin
        self.built: list[Built] = [build_stage(self.recipe, stage, self.base) for stage in self.recipe.stages]
        self.judges = judges(self.recipe, self.base, self.built)
        if self.recipe.budget.money is not None and PRICE not in os.environ:
            raise ConfigError(
                "budget.money needs to know what this machine costs", where="budget.money", remedy=f"set {PRICE}=0.40 (money per hour)"
            )

    def _load(self, source: str | Path) -> Policy:
        known = self.decisions.get("dtype", {}).get("value")
        placed = self.recipe.device  # one that was named is meant; `auto` stays where the run began
        if placed == "auto":
            placed = self.decisions.get("device", {}).get("value", placed)
        policy = load_policy(source, dtype=known or self.recipe.dtype, device=placed)
        if self.recipe.device != "auto" or "device" not in self.decisions:
            self.decisions["device"] = policy.decisions["device"]
        if "dtype" not in self.decisions:
            chosen = {"value": self.recipe.dtype, "why": "the recipe says so", "measured": {}}
            self.decisions["dtype"] = policy.decisions.get("dtype", chosen)
        self.decisions.setdefault("attention", policy.decisions["attention"])
        self._note(policy)
        return policy

    def _note(self, policy: Policy) -> bool:
        """Take down what was found out about a policy's GPU; -> whether anything is new. Nothing is replayed from it."""
        found = {k: policy.decisions[k] for k in ON_A_GPU if k in policy.decisions}
        new = any(self.decisions.get(k) != v for k, v in found.items())
        self.decisions.update(found)
        return new

    # ---- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Run:
        self._write_heads()
        try:
            status = self._stages()
        except Interrupted:
            self._status("interrupted")
            self._report()
            raise
        except BaseException:
            self._status("failed")
            raise
        self._status(status)
        report = self._report()
        return Run(self.folder.root, report)

    def _write_heads(self) -> None:
        if not self.folder.run.exists():
            write_atomic(self.folder.recipe, self.resolved.text)
            write_atomic(self.folder.resolved, write(self.resolved))
            write_json(self.folder.environment, environment())
        for name, decision in self.decisions.items():
            self.progress.say(f"{name}: {decision['value']} ({decision['why']})")
        self._decide()
        self._status("running")

    def _decide(self) -> None:
        write_json(self.folder.decisions, self.decisions)

    def _status(self, status: str) -> None:
        known: dict[str, Any] = read_json(self.folder.run) if self.folder.run.exists() else {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        primary = self.recipe.report.primary
        known |= {
            "schema": 1, "burnish": __version__, "name": self.recipe.name, "recipe": self.source,
            "about": self.recipe.about, "model": self.recipe.model, "seed": self.recipe.seed, "status": status,
            "resolved": self.recipe.model_dump(mode="json"),
            "primary": None if primary is None else {"eval": primary.eval, "strategy": primary.strategy},
            "finished": None if status == "running" else time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }  # fmt: skip
        if status == "running":
            known["starts"] = known.get("starts", 0) + 1
        write_json(self.folder.run, known)

    def _stages(self) -> str:
        base = self.folder.stage(0, "base").make()
        self._judge(base, self.base, None, {"name": "base", "method": "none", "steps": 0})
        current: str | Path = self.recipe.model
        for index, built in enumerate(self.built, start=1):
            folder = self.folder.stage(index, built.stage.name).make()
            done = folder.stage.exists() and read_json(folder.stage)["status"] in ("complete", "stopped by budget")
            if not done:
                policy = self.base if index == 1 and self.base.version == 0 else self._load(current)
                status = self._train(folder, built, policy, current)
                if status != "complete":
                    return status
            current = folder.model
        return "complete"

    def _train(self, folder: StageFolder, built: Built, policy: Policy, current: str | Path) -> str:
        stage = built.stage
        about: dict[str, Any] = {"schema": 1, "name": stage.name, "method": stage.method.name, "data": built.summary, "mask_view": built.mask_view}
        if isinstance(current, Path):
            about["input"] = weights_sha256(current)
        if not (folder.model / "manifest.json").exists():
            about["status"] = "running"
            write_json(folder.stage, about)
            policy = built.adapt(policy)
            memory = built.memory(self.decisions, self._decide)
            self.progress.say(built.header(policy))
            self.progress.begin(stage.name, built.method.total_steps)
            try:
                state = fit(
                    policy, built.method, stage.train, folder,
                    schedule=built.schedule, memory=memory, stop=self.stop, resume=True,
                    evaluate=partial(built.validate, policy, memory) if built.validation is not None else None,
                    guards=[partial(self._over_budget, built), *built.guards], on_step=self.progress.step, say=self.progress.say,
                )  # fmt: skip
            except Interrupted:
                write_json(folder.stage, about | {"status": "interrupted"})
                raise
            finally:
                self.progress.end()
            about |= {"steps": state.step, "skipped_steps": state.skipped_steps, "stopped_by": state.stopped_by}
            policy.train(False)
            policy = built.settle(policy)
            begin = time.perf_counter()
            card = model_card(
                name=f"{self.recipe.name}/{stage.name}", base=str(self.recipe.model), method=stage.method.name,
                adapter=policy.adapted, facts=built.facts(state),
            )  # fmt: skip
            about["training"] = state.ledger.to_json()
            kept = {k: about[k] for k in ("steps", "skipped_steps", "stopped_by", "training")}
            export(policy, folder.model, card=card, about={"stage": kept}, beside=built.method.exports())
            self.progress.say(f"exported to {folder.model} in {time.perf_counter() - begin:.1f} s")
        # what is judged is what was written, adapter merged: also when nothing was interrupted, so that a resume cannot differ
        about |= read_json(folder.model / "manifest.json")["stage"]
        judged = any(stage.evaluate is None or judge.name in stage.evaluate for judge in self.judges)
        return_freed_heap()
        about["output"] = weights_sha256(folder.model)
        self._judge(folder, self._load(folder.model) if judged else policy, stage.evaluate, about)
        return "complete" if not (about["stopped_by"] or "").startswith("budget: run") else "stopped by budget"

    def _over_budget(self, built: Built, state: State, row: Mapping[str, Any]) -> str | None:
        """The first budget that is used up, in words; the loop then saves and stops."""
        used = {"tokens": state.ledger.tokens, "flops": state.ledger.flops}
        hours = (time.monotonic() - self.begun) / 3600
        for name, budget, seconds in (
            ("stage", built.stage.budget, sum(state.ledger.seconds.values())),
            ("run", self.recipe.budget, time.monotonic() - self.begun),
        ):
            spent = used | {"seconds": seconds, "money": hours * float(os.environ.get(PRICE, "0"))}
            for key, value in spent.items():
                limit = getattr(budget, key)
                if limit is not None and value >= limit:
                    return f"budget: {name} {key} {value:.4g} of {limit:.4g}"
        return None

    def _judge(self, folder: StageFolder, policy: Policy, names: Sequence[str] | None, about: dict[str, Any]) -> None:
        """Every evaluation this stage lacks, each written whole; then stage.json says complete."""
        training = about.pop("training", None)
        ledger = Ledger.from_json(training) if training else Ledger()
        if about["name"] == "base":
            ledger.measure("load", self.loading_s)
        for judge in self.judges:
            path = folder.evaluation(judge.name)
            if names is not None and judge.name not in names:
                continue
            if not path.exists():
                self.stop.check()
                begin = time.perf_counter()
                self.progress.begin(f"{about['name']}/{judge.name}", judge.size)
                try:
                    result = judge(policy, about["name"], self.progress.advance, self.stop.check)
                finally:
                    self.progress.end()
                result["seconds"] = round(time.perf_counter() - begin, 3)
                write_json(path, result)
                self.progress.say(judge.line(result))
                if self._note(policy):
                    self._decide()
            # the stage's ledger is derived from what each evaluation wrote, so that no resume counts one twice
            result = read_json(path)
            ledger.spend(Spend(**result["spend"]))
            ledger.measure("evaluate", result["seconds"])
        ledger.saw_memory(peak_bytes(policy.device))
        if PRICE in os.environ:
            ledger.money = sum(ledger.seconds.values()) / 3600 * float(os.environ[PRICE])
        write_json(folder.ledger, ledger.to_json())
        status = "stopped by budget" if about.get("stopped_by") else "complete"
        write_json(folder.stage, {"schema": 1} | about | {"status": status})

    def _report(self) -> Mapping[str, Any]:
        from burnish.report.write import write_report

        return write_report(self.folder.root)
