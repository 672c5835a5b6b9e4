"""B14: from nothing to the end of the first step: process start, imports, loading, one step on 8 rows of 40 tokens.

Files are in the page cache by the second block (the first is not counted: it reads them). The bundled model is what a
smoke test in CI starts, almost all of it imports that both systems make, so the floor is for `--model`, a real one. Each block is a
new process of either system, begun some seconds after the one before has ended: memory that a process of a virtual machine frees goes back
to the host within two or three seconds, and whoever starts sooner finds it warm (0.1 s a GB in place of 0.8 to 2).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import rows as data
from benchmarks.harness import Answer, Case, Criterion, Session, agree, at_least, compare, forgiven
from benchmarks.machine import ROOT
from benchmarks.sft import BATCH_ROWS, LOSS_TOLERANCE, vocabulary_of

APART_S = 6.0
BUNDLED = ROOT / "src/burnish/assets/spark"


def start(session: Session, model: Path, rows: Sequence[data.Row], file: Path, system: str) -> Answer:
    """One cold start: its wall seconds, their parts, and the first loss."""
    time.sleep(0.0 if session.smoke else APART_S)
    name, where, module = ("trl", "peers", "benchmarks.peers.trl_sft") if system == "theirs" else ("burnish", "burnish", "benchmarks.ours.sft")
    begin = time.perf_counter()
    with session.child(name, where, module) as child:
        if system == "theirs":
            ready = session.prepare(child, model=str(model), rows=str(file), mode="full", setting="default", batch_rows=BATCH_ROWS, order="sequential")
            step = child.ask("step")
        else:
            ready = session.prepare(child, model=str(model), mode="full")
            step = child.ask("step", rows=list(rows))
        return {
            "seconds": time.perf_counter() - begin, "starts": 1, "import_s": ready["import_seconds"],
            "load_s": max(0.0, ready["seconds"] - ready["import_seconds"]), "step_s": step["seconds"], "loss": step["loss"],
        }  # fmt: skip


def run(session: Session) -> Iterator[Case]:
    for name, model in (("the bundled model", BUNDLED), ("the model", session.model)):
        rows = data.level(BATCH_ROWS, 40, vocabulary_of(model))
        file = data.write(session.scratch / "rows14.jsonl", rows)
        case: Case = {"case": name, "work": "starts"}
        with forgiven(case, session.say):

            def theirs(_: Mapping[str, Answer], model: Path = model, rows: Sequence[data.Row] = rows, file: Path = file) -> Answer:
                return start(session, model, rows, file, "theirs")

            def ours(_: Mapping[str, Answer], model: Path = model, rows: Sequence[data.Row] = rows, file: Path = file) -> Answer:
                return start(session, model, rows, file, "ours")

            first = {"theirs": theirs({}), "ours": ours({})}
            measured = session.run({"theirs": theirs, "ours": ours})
            case |= compare(measured, "ours", "theirs", "starts")
            for part in ("import_s", "load_s", "step_s"):
                case[part] = {s: sorted(measured.all(s, part))[len(measured.kept) // 2] for s in ("ours", "theirs")}
            case["warmup_s"] = {s: a["seconds"] for s, a in first.items()}
            case["checks"] = [agree("first loss", first["ours"]["loss"], first["theirs"]["loss"], LOSS_TOLERANCE)]
        yield case


def criteria(cases: Sequence[Case]) -> list[Criterion]:
    return [at_least("B14", "floor, cold start of a real model against TRL's defaults", 1.5, [c for c in cases if c["case"] == "the model"])]
