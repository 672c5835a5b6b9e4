"""`make accept-NN`: one line per acceptance criterion with its measured value; exits 1 when one is missed.

    make accept-01 [MODEL=/path/to/gemma-270m]
    make accept-02 [MODEL=/path/to/gemma-270m]
    make accept-03 [MODEL=/path/to/gemma-270m]

Criteria that need a real model folder or the peers' environment say so where they are absent, and count as not measured.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = ROOT / ".venv/bin"
REFERENCE_GFLOPS = 120.0  # the machine that time limits are stated for, fp32
MISSED: list[str] = []


def line(name: str, ok: bool | None, measured: str) -> None:
    """One criterion: ok, MISSED, or not measured here."""
    print(f"{'not measured' if ok is None else 'ok' if ok else 'MISSED':<13}{name}: {measured}", flush=True)
    if ok is False:
        MISSED.append(name)


def gflops() -> float:
    """This machine now, fp32, two threads."""
    code = "import torch; torch.set_num_threads(2)\nfrom burnish.machine import gflops\nprint(gflops(torch.float32, seconds=1.0))"
    return float(subprocess.run([BIN / "python", "-c", code], capture_output=True, text=True, check=True).stdout)


def burnish(*argv: str, cwd: Path) -> tuple[int, float, str]:
    begin = time.monotonic()
    done = subprocess.run([BIN / "python", "-m", "burnish", *argv], cwd=cwd, capture_output=True, text=True)
    return done.returncode, time.monotonic() - begin, done.stdout + done.stderr


def quickstart(folder: Path) -> None:
    speed = gflops()
    code, seconds, said = burnish("quickstart", cwd=folder)
    if code:
        return line("quickstart", False, f"exit code {code}: {said[-500:]}")
    report = json.loads((folder / "runs/quickstart/report.json").read_text())
    calibrated = seconds * speed / REFERENCE_GFLOPS
    tokens: dict[str, int] = {}
    for ledger in sorted((folder / "runs/quickstart").glob("*/ledger.json")):
        for row in json.loads(ledger.read_text())["counted"].values():
            for name, value in row.items():
                if name.endswith("_tokens"):
                    tokens[name] = tokens.get(name, 0) + value
    limit = 360  # 300 until the quickstart came to reinforce as well
    line("quickstart time", calibrated < limit, f"{seconds:.0f} s here at {speed:.0f} GFLOP/s fp32 = {calibrated:.0f} s at 120 (limit {limit}); {json.dumps(tokens)}")
    for c in report["comparisons"]:
        stage = c["kind"] == "stage" and c["strategy"] == "greedy" and c["against_stage"] == "base"
        vote = c["kind"] == "strategy" and c["strategy"] == "vote:16" and c["against_strategy"] == "greedy" and c["stage"] != "base"
        if (stage or vote) and c["eval"] == report["verdict"]["primary"]["eval"]:
            need = 0.15 if stage else 0.04
            ok = c["difference"] >= need and c["n"] >= 1000 and c["p"] < 0.01
            what = f"{c['eval']}: {c['stage']} {c['strategy']} over {c['against_stage']} {c['against_strategy']}"
            line(what, ok, f"{100 * c['difference']:+.1f} points (wanted {100 * need:+.0f}), n = {c['n']}, p = {c['p']:.1e}")
    code, seconds, _ = burnish("quickstart", cwd=folder)
    line("quickstart again", code == 0, f"exit code {code} in {seconds:.1f} s")


def suite(folder: Path, limit: int = 600) -> None:
    """`make test`, timed, and what its tests measured."""
    begin = time.monotonic()
    report = folder / "junit.xml"
    done = subprocess.run(["make", "test"], cwd=ROOT, env=os.environ | {"PYTEST_ADDOPTS": f"--junitxml={report}"}, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    tail = done.stdout.strip().splitlines()[-1:] or [""]
    line("make test", done.returncode == 0 and seconds < limit, f"{seconds:.0f} s (limit {limit}): {tail[0]}")
    if not report.exists():
        return
    for case in ET.parse(report).getroot().iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        for prop in case.iter("property"):
            if prop.get("name") == "measured":
                line(f"{case.get('classname', '').removeprefix('tests.')}", not failed, str(prop.get("value")))
    groups = {"forest, attention alone to 1e-12 in fp64": "tests.forest.test_attention", "engine oracle": "tests.engines", "bad input": "tests.faults.test_bad_input"}
    for name, prefix in groups.items():
        cases = [c for c in ET.parse(report).getroot().iter("testcase") if c.get("classname", "").startswith(prefix)]
        bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
        line(name, bool(cases) and not bad, f"{len(cases) - len(bad)} of {len(cases)} tests pass")


GEMMA_CHECK = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
base, folder = sys.argv[1:3]
plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
words = AutoTokenizer.from_pretrained(folder)
ids = words("say abc", return_tensors="pt").input_ids
from burnish.forest.attention import Forest
from burnish.forest.stream import Layout
from burnish.models.load import load_policy
ours = load_policy(folder, dtype="float32")
n = ids.shape[1]
with torch.no_grad():
    a = plain(ids).logits[0]
    b = ours.model(input_ids=ids, position_ids=torch.arange(n)[None], plan=Forest(Layout((n,), (-1,))), use_cache=False).logits[0]
    text = words.decode(plain.generate(ids, max_new_tokens=8, do_sample=False)[0, n:], skip_special_tokens=True)
print(json.dumps({"error": float((a - b).norm() / a.norm()), "text": text}))
"""


def own_data(folder: Path, model: Path) -> None:
    rows = folder / "train.jsonl"
    rows.write_text("".join(json.dumps({"question": f"say {w}", "answer": w}) + "\n" for w in words(64)))
    code, seconds, said = burnish(
        "run", "first_steps/own_data", "--set", f"model={model}", "--set", f"stages.sft.data.file={rows}", "--set", "stages.sft.train.epochs=1",
        cwd=folder,
    )  # fmt: skip
    if code:
        return line("own_data on a real model", False, f"exit code {code}: {said[-600:]}")
    report = json.loads((folder / "runs/own-data/report.json").read_text())
    check = subprocess.run([BIN / "python", "-c", GEMMA_CHECK, str(model), str(folder / "runs/own-data/01-sft/model")], capture_output=True, text=True)
    found = json.loads(check.stdout.strip().splitlines()[-1]) if check.returncode == 0 else {"error": 1.0, "text": check.stderr[-300:]}
    line("own_data on a real model", found["error"] < 1e-3, f"{seconds:.0f} s; {report['verdict']['headline']}; plain peft differs by {found['error']:.1e} (merged, fp32) and says {found['text']!r}")


def words(n: int) -> list[str]:
    return ["".join("abcdefgh"[(i * 7 + j * 3 + i // 8) % 8] for j in range(3 + i % 4)) for i in range(n)]


def bench(model: Path, out: Path, *ids: str) -> list[dict[str, Any]]:
    """The benchmark suite as a user runs it, its progress shown; -> its results. An id that failed is among them."""
    subprocess.run([BIN / "python", "-m", "benchmarks", *ids, "--model", str(model), "--json", str(out)], cwd=ROOT, check=False)
    return json.loads(out.read_text()) if out.exists() else []


def speed(folder: Path, model: Path) -> None:
    """First light: twice the speed of TRL at its best, on the model."""
    results = bench(model, folder / "sft.json", "B1", "B2")
    for c in [c for r in results for c in r["cases"] if not c["small_vocabulary"] and c["peer"].endswith("its best")]:
        name = f"SFT {c['name']} against {c['peer']}"
        if "ratio" in c:
            same = all(check["ok"] for check in c["checks"])
            line(name, c["ratio"] >= 2 and same, f"{c['ratio']:.2f}x (floor 2), {c['blocks']} blocks, {c['discarded']} discarded, results {'agree' if same else 'DIFFER'}")
        else:
            line(name, None, c["not_measured"])
    if not results:
        line("SFT against TRL", False, "the suite wrote no result")


def full_speed(folder: Path, model: Path, ids: list[str]) -> None:
    """Every target and floor of these benches (of all, where none is named), one line each."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.report import criteria
    from benchmarks.suite import BENCHES

    results = {r["id"]: r for r in bench(model, folder / "suite.json", *ids)}
    for name in ids or BENCHES:
        if name not in results:
            line(name, False, "the suite wrote no result")
            continue
        if results[name]["error"]:
            line(f"{name} ran to its end", False, results[name]["error"])
        for c in criteria(results[name]):
            line(f"{c.id} {c.name}", c.met, f"{c.measured} (wanted {c.wanted})")


def estimated(folder: Path, model: Path) -> None:
    """`burnish estimate` against the runs it speaks of, a line for each of ten configurations."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.estimate import MEMORY, TIME

    out = folder / "estimate.json"
    done = subprocess.run([BIN / "python", "benchmarks/estimate.py", "--model", str(model), "--json", str(out)], cwd=ROOT, capture_output=True, text=True)
    if not out.exists():
        return line("estimate", False, f"exit code {done.returncode}: {done.stderr[-500:]}")
    for name, found in json.loads(out.read_text())["results"].items():
        memory, seconds = found["memory_ratio"], found["time_ratio"]
        ok = abs(memory - 1) <= MEMORY and abs(seconds - 1) <= TIME
        line(f"estimate of {name}", ok, f"memory {memory:.2f} of what was measured, time {seconds:.2f} (wanted within {MEMORY:.0%} and {TIME:.0%})")


def on_a_gpu() -> None:
    from benchmarks.suite import GPU

    for name, what in GPU.items():
        line(f"{name} {what}", None, "benchmarks/gpu.sh, on a machine with a GPU")


# ---- reinforce

FULL_SPEED = ("B1", "B2", "B3", "B4", "B9", "B11", "B12", "B13", "B14")
BAD_INPUT = (17, 22, 23, 24, 25, 26, 27, 38)  # faults are tests named test_NN_...


def tested(folder: Path) -> None:
    """Laws over every row, TRL's own numbers, and what goes wrong in a stage: from one run of those tests."""
    sys.path.insert(0, str(ROOT / "src"))
    from burnish.core.table import describe

    out = folder / "reinforce.xml"
    paths = ["tests/laws", "tests/equivalence/test_trl_grpo.py", "tests/faults", "tests/methods"]
    subprocess.run([BIN / "python", "-m", "pytest", "-q", "-n", "0", f"--junitxml={out}", *paths], cwd=ROOT, capture_output=True, text=True)
    if not out.exists():
        return line("tests of reinforcement learning", False, "they did not run")
    cases = list(ET.parse(out).getroot().iter("testcase"))
    failed = {c for c in cases if c.find("failure") is not None or c.find("error") is not None}
    passed = [c for c in cases if c not in failed and c.find("skipped") is None]

    def told(name: str, among: list[ET.Element], more: str = "", whole: bool = True) -> None:
        good = [c for c in among if c in passed]
        bad = [c.get("name", "") for c in among if c in failed]
        ok = bool(good) and not bad and whole
        line(name, ok, f"{len(good)} of {len(among)} tests pass{more}" + (f"; failed: {', '.join(bad[:3])}" if bad else ""))

    rows = [n for n, row in describe("method").items() if {"advantage", "surrogate"} <= {p.name for p in row.parameters}]
    laws = [c for c in cases if c.get("classname", "").startswith("tests.laws")]
    met = {re.sub(r".*\[([^]-]*).*", r"\1", c.get("name", "")) for c in laws if "test_policy_gradient" in c.get("classname", "")}
    missing = sorted(set(rows) - met)
    told("laws over every row", laws, f", {len(rows) - len(missing)} of {len(rows)} rows under them" + (f" (not {', '.join(missing)})" if missing else ""), not missing)
    told("TRL's losses, gradients and advantages (fixture)", [c for c in cases if "test_trl_grpo" in c.get("classname", "")])
    told("every row takes a step or says what it lacks", [c for c in cases if "test_every_row_takes_a_step" in c.get("name", "")])
    for number in BAD_INPUT:
        mine = [c for c in cases if re.match(rf"test_{number}_", c.get("name", ""))]
        told(f"bad input, row {number}", mine) if mine else line(f"bad input, row {number}", None, f"no test is named test_{number}_...")


def stored_evidence(name: str, what: str, remedy: list[str]) -> None:
    """Every criterion of a stored result of tools/evidence.py; where there is none, it is made first if that needs nothing else."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import evidence, report

    if name not in report.newest() and remedy:
        subprocess.run([BIN / "python", "tools/evidence.py", *remedy], cwd=ROOT, check=False)
    if name not in report.newest():
        return line(what, None, "nothing is stored: see tools/evidence.py --help")
    path, result = report.newest()[name]
    for c in evidence.criteria(result):
        line(f"{what}, {c.name}", c.met, f"{c.measured} (wanted {c.wanted}); {path.name}")


def sampler_gap(folder: Path) -> None:
    """The largest difference of a token's log-probability between sampler and trainer, of a few steps in fp32."""
    code, _, said = burnish(
        "run", "policy_gradient/grpo", "--set", "name=gap", "--set", "dtype=float32", "--set", "stages.rl.train.steps=8", "--set", "evals.sums.rows=50",
        "--set", "evals.sums.strategies=[greedy]", cwd=folder,
    )  # fmt: skip
    if code:
        return line("sampler-trainer gap", False, f"exit code {code}: {said[-500:]}")
    rows = [json.loads(row) for row in (folder / "runs/gap/02-rl/metrics.jsonl").read_text().splitlines()]
    found = [(row["sampler_gap_max"], row["sampler_gap"]) for row in rows if row.get("sampler_gap_max") is not None]
    if not found:
        return line("sampler-trainer gap", False, "no step of the run compared them")
    most, mean = max(m for m, _ in found), max(m for _, m in found)
    line("sampler-trainer gap, fp32", most < 1e-4, f"{most:.1e} nats at most, {mean:.1e} on average, {len(found)} steps (limit 1e-4)")


def reinforced_quickstart(folder: Path) -> None:
    """GRPO after SFT on the primary eval, votes on top of it, and the time of it all."""
    sys.path.insert(0, str(ROOT / "src"))
    from burnish.evals.statistics import compare

    speed = gflops()
    code, seconds, said = burnish("quickstart", cwd=folder)
    if code:
        return line("quickstart", False, f"exit code {code}: {said[-500:]}")
    calibrated = seconds * speed / REFERENCE_GFLOPS
    line("quickstart time", calibrated < 360, f"{seconds:.0f} s here at {speed:.0f} GFLOP/s fp32 = {calibrated:.0f} s at 120 (limit 360)")
    home = folder / "runs/quickstart"
    found = json.loads((home / "report.json").read_text())
    name = found["verdict"]["primary"]["eval"]
    evals = {path.parts[-3].partition("-")[2]: json.loads(path.read_text()) for path in sorted(home.glob(f"*/evals/{name}.json"))}
    if "grpo" not in evals:
        return line("quickstart: GRPO over SFT", False, f"no stage called grpo was judged on {name}; there are {', '.join(evals)}")
    c = compare(evals["sft"], evals["grpo"], "greedy")
    ok = c.difference >= 0.05 and c.p < 0.01 and c.n >= 1000
    line("quickstart: GRPO over SFT, greedy", ok, f"{100 * c.difference:+.1f} points (wanted +5), n = {c.n}, p = {c.p:.1e}")
    c = compare(evals["grpo"], evals["grpo"], "greedy", "vote:16")
    said_of = [
        x["outcome"] for x in found["comparisons"]
        if (x["eval"], x["stage"], x["strategy"], x["against_strategy"]) == (name, "grpo", "vote:16", "greedy") and x["kind"] == "strategy"
    ]  # fmt: skip
    better = c.difference > 0 and c.p < 0.05
    honest = bool(said_of) and (said_of[0] == "better") == better
    measured = f"{100 * c.difference:+.1f} points, n = {c.n}, p = {c.p:.1e}, {c.cost:.1f} times the tokens; the report says {said_of[0] if said_of else 'nothing'!r}"
    line("quickstart: vote:16 over greedy after GRPO, or the report says that it is not better", better or honest, measured)


def reinforce(folder: Path, model: Path | None, wanted: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.suite import BENCHES

    todo: dict[str, Any] = {
        "tests": lambda: tested(folder),
        "evidence": lambda: stored_evidence("evidence", "evidence", ["--jobs", str(os.cpu_count() or 1)]),
        "short": lambda: stored_evidence("short_runs", "short run", ["--short", "--jobs", str(os.cpu_count() or 1)]),
        "gemma": lambda: stored_evidence("gemma_grpo", "GRPO of Gemma 3 270M", []),
        "gap": lambda: sampler_gap(folder),
        "quickstart": lambda: reinforced_quickstart(folder),
    }
    for what in wanted or [*todo, "speed"]:
        if what in todo:
            todo[what]()
        elif what != "speed":
            raise SystemExit(f"no part {what!r}; there are {', '.join(todo)}, speed")
        elif model is None:
            line("B7, B8", None, "no model: set MODEL to a folder (tools/gemma_folder.py makes one)")
        else:
            for name in [b for b in ("B7", "B8") if b not in BENCHES]:
                line(name, None, "the suite has no such bench")
            full_speed(folder, model, [b for b in ("B7", "B8") if b in BENCHES])


def finish() -> int:
    print(f"{len(MISSED)} missed" + (f": {', '.join(MISSED)}" if MISSED else ""))
    return 1 if MISSED else 0


def first_light(folder: Path, model: Path | None, wanted: list[str]) -> None:
    todo: dict[str, Any] = {"quickstart": lambda: quickstart(folder), "suite": lambda: suite(folder)}
    for what in wanted or ["quickstart", "suite", "own_data", "speed"]:
        if what in todo:
            todo[what]()
        elif model is None:
            line(what, None, "set MODEL to a folder (tools/gemma_folder.py makes one)")
        elif what == "own_data":
            own_data(folder, model)
        elif not (ROOT / ".venv-peers").exists():
            line(what, None, "needs make peers")
        else:
            speed(folder, model)


def main() -> int:
    which, wanted = sys.argv[1:2], sys.argv[2:]
    model = Path(os.environ["MODEL"]).resolve() if os.environ.get("MODEL") else None
    with tempfile.TemporaryDirectory() as name:
        if which == ["01"]:
            first_light(Path(name), model, wanted)
        elif which == ["03"]:
            default = ROOT / "models/gemma-270m"
            reinforce(Path(name), model or (default if default.exists() else None), wanted)
        elif which == ["02"]:
            from_suite = model or ROOT / "models/gemma-270m"
            ids = [w for w in wanted if w not in ("estimate", "suite")]
            if not from_suite.exists():
                line("benches and estimate", None, f"no model at {from_suite}: set MODEL to a folder (tools/gemma_folder.py makes one)")
            else:
                if ids or not wanted:
                    full_speed(Path(name), from_suite, ids or list(FULL_SPEED))
                if "estimate" in wanted or not wanted:
                    estimated(Path(name), from_suite)
            if "suite" in wanted or not wanted:
                suite(Path(name), limit=720)
            if not wanted:
                on_a_gpu()
        else:
            raise SystemExit("usage: tools/accept.py 01 [quickstart suite own_data speed] | 02 [bench ids, estimate, suite] | 03 [tests evidence short gemma gap quickstart speed]")
    return finish()


if __name__ == "__main__":
    sys.exit(main())
