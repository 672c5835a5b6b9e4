"""Speed and memory of burnish beside its peers, measured so that a busy machine cannot decide.

    python -m benchmarks [IDS...] [--quick] [--model FOLDER] [--json FILE]      run (all, or these ids), store, write RESULTS.md
    python -m benchmarks report                                                 RESULTS.md again from what is stored

Every id: target and floor beside what was measured. An id that fails is reported and the next one runs. Results of a full
run go to benchmarks/results/DATE-ID.json; those of --quick and --smoke only to --json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.harness import Case, Session, tolerance
from benchmarks.machine import ROOT, calibrate, facts, gauge
from benchmarks.suite import BENCHES, Bench

MODEL = ROOT / "models/gemma-270m"


def random_model(folder: Path, shape: str) -> Path:
    """The folder of benchmarks.random_model, made when it is first asked for."""
    command = [sys.executable, "-m", "benchmarks.random_model", str(folder), "--shape", shape]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def shapes(model: Path) -> list[tuple[int, int]]:
    """[in, out] of the model's widest products."""
    config = json.loads((model / "config.json").read_text())
    hidden, wide = int(config["hidden_size"]), int(config.get("intermediate_size") or 4 * config["hidden_size"])
    return [(hidden, wide), (wide, hidden), (hidden, min(16_384, int(config["vocab_size"])))]


def run(bench: Bench, session: Session, stamp: dict[str, Any]) -> dict[str, Any]:
    """All cases of one id; whatever stops it is recorded beside what was measured until then."""
    begin, cases, error = time.perf_counter(), list[Case](), None
    session.versions = {}
    try:
        for case in bench.run(session):
            cases.append(case)
            session.say(f"    {time.perf_counter() - begin:6.0f} s  {summary(case)}")
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
        session.say(traceback.format_exc())
    return {
        "schema": 1, "id": bench.id, "title": bench.title, **stamp, "versions": session.versions, "best_gflops": session.best_gflops,
        "slower": session.slower, "seconds": time.perf_counter() - begin, "error": error, "cases": cases,
    }  # fmt: skip


def summary(case: Case) -> str:
    """One line of progress."""
    said = []
    if "ratio" in case:
        said.append(f"{case['ratio']:.2f}x" + (f" (worst block {case['worst_ratio']:.2f}x)" if "worst_ratio" in case else ""))
    if "peak_ratio" in case:
        said.append(f"peak memory {case['peak_ratio']:.2f} of the peer's")
    if case.get("discarded"):
        said.append(f"{case['discarded']} blocks discarded")
    said += [f"DIFFERS in {c['what']}" for c in case.get("checks", ()) if not c["ok"]]
    return f"{case['case']}: {', '.join(said) or 'not measured'}"


def command(asked: argparse.Namespace, model: Path) -> str:
    """What to type to measure this again."""
    words = ["python -m benchmarks", *asked.ids]
    if model.resolve() != MODEL.resolve():
        words.append(f"--model {model.relative_to(ROOT) if model.is_relative_to(ROOT) else model.name}")
    if asked.threads != os.cpu_count():
        words.append(f"--threads {asked.threads}")
    return " ".join([*words, *(f"--{name}" for name in ("quick", "smoke") if getattr(asked, name))])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="IDS", help=f"of {' '.join(BENCHES)}, or report; default: all")
    parser.add_argument("--quick", action="store_true", help="one block of each case; nothing is stored")
    parser.add_argument("--model", type=Path, default=MODEL, help="a Hugging Face folder (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results of this run here too")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--smoke", action="store_true", help="tiny models and sizes: whether everything runs; measures nothing")
    asked = parser.parse_args(argv)
    if asked.ids == ["report"]:
        print(report.write())
        return 0
    if unknown := [i for i in asked.ids if i not in BENCHES]:
        parser.error(f"no bench {unknown[0]!r}; there are {' '.join(BENCHES)}, and report alone")
    import torch

    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as name:
        scratch = Path(name)
        small_vocabulary = cache(lambda: random_model(scratch / "small-vocabulary", "tiny" if asked.smoke else "32k"))
        small = cache(lambda: random_model(scratch / "small", "tiny" if asked.smoke else "small"))
        model = small_vocabulary() if asked.smoke and asked.model == MODEL else asked.model
        if not (model / "config.json").exists():
            parser.error(f"no model at {model}; give --model FOLDER (tools/gemma_folder.py makes the default one)")
        session = Session(
            model=model.resolve(), scratch=scratch, calibration=calibrate([] if asked.smoke else shapes(model), 64 if asked.smoke else 2048),
            gauge=(lambda: 1.0) if asked.smoke else gauge, blocks=1 if asked.quick or asked.smoke else 3,
            threads=asked.threads, smoke=asked.smoke, say=lambda text: print(text, flush=True), small_vocabulary=small_vocabulary,
            small=small,
        )  # fmt: skip
        idle = [session.gauge() for _ in range(1 if asked.smoke else 15)]
        session.best_gflops, session.slower = max(idle), tolerance(idle)
        stamp = {
            "date": time.strftime("%Y-%m-%d"), "command": command(asked, model), "model": model.name,
            "quick": asked.quick, "environment": facts(asked.threads), "calibration": session.calibration.to_json(),
        }  # fmt: skip
        session.say(f"fixed product {session.best_gflops:.0f} GFLOP/s, a block may be {session.slower - 1:.0%} off; best {session.calibration.to_json()}")
        results = []
        for bench in [BENCHES[i] for i in asked.ids or BENCHES]:
            session.say(f"{bench.id}. {bench.title}")
            results.append(run(bench, session, stamp))
            if not (asked.quick or asked.smoke):
                report.store(results[-1])
            judged = report.criteria(results[-1])
            for c in [] if asked.smoke else judged:
                session.say(f"  {report.verdict(c.met):<13} {c.id} {c.name}: {c.measured} (wanted {c.wanted})")
            if asked.json:
                asked.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if not (asked.quick or asked.smoke):
            session.say(f"wrote {report.write()}")
    return 1 if any(r["error"] for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
