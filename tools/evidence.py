"""Evidence that methods of reinforcement learning work: runs over seeds, judged on held-out items, stored beside the benches.

    python tools/evidence.py [--rows grpo rloo ...] [--seeds 0 1 2] [--jobs 2] [--set train.steps=40]
    python tools/evidence.py --short [--jobs 2]
    python tools/evidence.py --recipe policy_gradient/gemma_grpo --model models/gemma-270m --threads 2

The first form: for each seed the bundled model is fine-tuned once, by the first stage of policy_gradient/grpo; then every row
starts from that model, at the last stage of its own recipe policy_gradient/ROW where there is one, else at that of
policy_gradient/grpo with ROW as its method. Before and after are judged on the same 1,000 held-out items of a seed, greedy.
The second form does the same with the other rows, for twenty steps and one seed: what is asked is that the reward does not fall. The
third runs a recipe of one stage as it is, from the model given.

Runs live in `runs/evidence` (`--folder`), one process each, `--threads` threads. A run is named by what it does: a finished
one is kept, an interrupted one goes on, and changed settings are another run. The result goes to
benchmarks/results/DATE-evidence.json (or DATE-short_runs.json, DATE-RECIPE.json), and RESULTS.md is written again. Exits 1 where a run failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.machine import facts  # noqa: E402

from benchmarks import evidence, report  # noqa: E402
from burnish.config.load import written  # noqa: E402
from burnish.evals.statistics import compare  # noqa: E402

ROWS = ("reinforce", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "ppo")
OTHERS = ("reinforce_pp", "remax", "a2c", "ppo_kl", "grpo_process", "gspo_token", "gmpo", "sapo", "opo", "gdpo", "kl_cov", "clip_cov")
SHORT_STEPS = 20
RECIPES = ROOT / "src/burnish/recipes"
ITEMS = 1000
Recipe = dict[str, Any]


class Failed(RuntimeError):
    """A run that did not end well; its log is named."""


def recipe_of(name: str) -> Recipe:
    """A packaged recipe as it is written, on its base where it has one."""
    return cast(Recipe, written(name).data)


def start_recipe(seed: int) -> Recipe:
    """The fine-tuning that every row of a seed starts from. It is judged as the base of those rows."""
    grpo = recipe_of("policy_gradient/grpo")
    return {"burnish": 1, "name": f"start-{seed}", "about": "What rows start from.", "model": grpo["model"], "seed": seed, "stages": grpo["stages"][:1]}


def row_recipe(row: str, seed: int, start: Path, changes: Mapping[str, Any]) -> Recipe:
    """One stage of `row` from the model of `start`, judged greedily on ITEMS items before and after."""
    grpo = recipe_of("policy_gradient/grpo")
    own = RECIPES / f"policy_gradient/{row}.yaml"
    stage = recipe_of(f"policy_gradient/{row}")["stages"][-1] if own.exists() else {**grpo["stages"][-1], "method": row}
    for key, value in changes.items():
        *above, last = key.split(".")
        inner = stage
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = value
    judged = {**grpo["evals"]["sums"], "rows": ITEMS, "strategies": ["greedy"]}
    return {
        "burnish": 1, "name": f"{row}-{seed}", "about": f"{row} from the start of seed {seed}.", "model": str(start), "seed": seed,
        "evals": {"sums": judged}, "stages": [{**stage, "name": "reinforce"}],
    }  # fmt: skip


def named(recipe: Recipe, identity: str) -> Recipe:
    """The recipe under a name that says what it does, so that no finished run stands for another."""
    digest = hashlib.sha256((yaml.safe_dump({**recipe, "model": identity})).encode()).hexdigest()[:8]
    return {**recipe, "name": f"{recipe['name'].replace('_', '-')}-{digest}"}


@dataclass(frozen=True)
class Runner:
    """Runs recipes under `folder`, finished ones kept."""

    folder: Path
    threads: int

    def __call__(self, recipe: Recipe, source: str | None = None, sets: Sequence[str] = ()) -> Path:
        """The folder of the finished run of this recipe (or of the packaged one `source`). Raises Failed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        home = self.folder / "runs" / recipe["name"]
        log = self.folder / f"{recipe['name']}.log"
        state = json.loads((home / "run.json").read_text())["status"] if (home / "run.json").exists() else None
        if state == "complete":
            print(f"kept      {recipe['name']}", flush=True)
            return home
        if source is None:
            source = str(self.folder / f"{recipe['name']}.yaml")
            Path(source).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        words = [sys.executable, "-m", "burnish", "run", source, *(x for s in sets for x in ("--set", s)), *(["--resume"] if state else [])]
        threads = str(self.threads)
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        print(f"{'goes on' if state else 'begins':<10}{recipe['name']}", flush=True)
        begin = time.monotonic()
        with open(log, "a", encoding="utf-8") as out:
            done = subprocess.run(words, cwd=self.folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        if done.returncode:
            tail = log.read_text(encoding="utf-8").strip().splitlines()[-3:]
            raise Failed(f"{recipe['name']} ended with {done.returncode}: {' / '.join(tail)}")
        print(f"{time.monotonic() - begin:6.0f} s  {recipe['name']}", flush=True)
        return home


def stage_of(run: Path) -> Path:
    """The last stage's folder."""
    return sorted(p for p in run.glob("[0-9][0-9]-*") if (p / "stage.json").exists())[-1]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def judged(run: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An eval of the run's base and of its last stage."""
    return read(run / f"00-base/evals/{name}.json"), read(stage_of(run) / f"evals/{name}.json")


def pooled(evaluations: Sequence[tuple[int, Mapping[str, Any]]], strategy: str) -> dict[str, Any]:
    """The evals of several seeds as one: every item of every seed is one item."""
    rows = [next(r for r in e["strategies"] if r["strategy"] == strategy) for _, e in evaluations]
    correct = [grade for row in rows for grade in row["correct"]]
    spend = {key: sum(row["spend"][key] for row in rows) for key in rows[0]["spend"]}
    row = {"strategy": strategy, "oracle": False, "accuracy": sum(correct) / len(correct), "correct": correct, "spend": spend}
    first = evaluations[0][1]
    return {
        "eval": first["eval"], "stage": first["stage"], "strategies": [row],
        "item_ids": [f"seed {seed}: {item}" for seed, e in evaluations for item in e["item_ids"]],
    }  # fmt: skip


def rewards_of(rows: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    """Mean reward of each round, over the first and over the last third of them, and the standard error of the difference.

    The steps of one round say the same of its rewards, which count once. `samples`: completions a round.
    """
    seen: list[tuple[float, float]] = []
    for row in rows:
        found = row.get("reward_mean"), row.get("reward_std")
        if found[0] is not None and (not seen or found != seen[-1]):
            seen.append(found)  # type: ignore[arg-type]
    third = max(1, len(seen) // 3)
    parts = (seen[:third], seen[-third:])
    first, last = (sum(mean for mean, _ in part) / third for part in parts)
    error = (sum(std**2 / samples for part in parts for _, std in part) / third**2) ** 0.5
    return {"first": first, "last": last, "error": error, "rounds": len(seen), "curve": [round(mean, 4) for mean, _ in seen]}


def cost(run: Path) -> dict[str, float]:
    """What the last stage took, its evaluation apart: what its model's manifest says."""
    about = read(stage_of(run) / "model/manifest.json")["stage"]
    counted, seconds = about["training"]["counted"], about["training"]["measured"]["seconds"]

    def total(name: str) -> float:
        return sum(phase.get(name, 0) for phase in counted.values())

    return {
        "steps": about["steps"], "sampled_tokens": total("sampled_tokens"), "scored_tokens": total("scored_tokens"),
        "trained_tokens": total("stream_tokens"), "flops": total("executed_flops"), "seconds": sum(seconds.values()),
    }  # fmt: skip


def samples_of(run: Path) -> int:
    """Completions a round of its last stage."""
    stage = read(run / "run.json")["resolved"]["stages"][-1]
    return stage["train"]["batch_rows"] * (stage["rollouts"] or {}).get("group_size", 1)


def summary(row: str, runs: Mapping[int, Path], name: str, strategy: str = "greedy") -> dict[str, Any]:
    """Gain, interval and p over all seeds, and each seed's own gain and cost."""
    found = {seed: judged(run, name) for seed, run in runs.items()}
    whole = compare(*(pooled([(seed, pair[i]) for seed, pair in found.items()], strategy) for i in (0, 1)), strategy)
    seeds = []
    for seed, pair in found.items():
        one = compare(*pair, strategy)
        metrics = [json.loads(line) for line in (stage_of(runs[seed]) / "metrics.jsonl").read_text().splitlines()]
        gaps = [m["sampler_gap"] for m in metrics if m.get("sampler_gap") is not None]
        seeds.append(
            {"seed": seed, "run": runs[seed].name, "before": one.accuracy_before, "after": one.accuracy_after, "gain": one.difference, "p": one.p,
             "commit": read(runs[seed] / "environment.json").get("commit"), "sampler_gap": max(gaps, default=None), "reward": rewards_of(metrics, samples_of(runs[seed])), **cost(runs[seed])}
        )  # fmt: skip
    return {
        "row": row, "n": whole.n, "before": whole.accuracy_before, "after": whole.accuracy_after, "gain": whole.difference,
        "interval": list(whole.interval), "p": whole.p, "seeds": seeds,
    }  # fmt: skip


def over_rows(rows: Sequence[str], seeds: Sequence[int], runner: Runner, jobs: int, changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every row over every seed; one that failed says why, and the others go on."""

    def attempt(recipe: Recipe, identity: str) -> Path | Failed:
        try:
            return runner(named(recipe, identity))
        except Failed as error:
            print(f"FAILED    {error}", flush=True)
            return error

    with ThreadPoolExecutor(jobs) as pool:
        starts = dict(zip(seeds, pool.map(lambda seed: attempt(start_recipe(seed), "spark"), seeds)))
        todo = [(row, seed) for row in rows for seed in seeds]

        def one(pair: tuple[str, int]) -> Path | Failed:
            row, seed = pair
            start = starts[seed]
            if isinstance(start, Failed):
                return start
            return attempt(row_recipe(row, seed, (start / "01-sft/model").resolve(), changes), start.name)

        runs = dict(zip(todo, pool.map(one, todo)))
    found: list[dict[str, Any]] = []
    for row in rows:
        mine = {seed: runs[row, seed] for seed in seeds}
        failed = [run for run in mine.values() if isinstance(run, Failed)]
        found.append({"row": row, "not_measured": str(failed[0])} if failed else summary(row, mine, "sums"))  # type: ignore[arg-type]
    return found


def result(name: str, about: str, command: str, threads: int, rows: list[dict[str, Any]], items: int, **more: Any) -> dict[str, Any]:
    return {
        "schema": 1, "id": name, "date": time.strftime("%Y-%m-%d"), "command": command, "environment": facts(threads), "about": about,
        "items": items, **more, "rows": rows,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/evidence.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"{SHORT_STEPS} steps of the rows that are not among the first form's")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"default: {' '.join(ROWS)}; with --short: {' '.join(OTHERS)}")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: 0 1 2; with --short: 0")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of every row's stage, such as train.steps=40")
    parser.add_argument("--recipe", help="a packaged recipe of one stage instead of the rows")
    parser.add_argument("--model", type=Path, help="its model")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/evidence", help="where the runs are (default: %(default)s)")
    parser.add_argument("--no-store", action="store_true", help="print what was found and store nothing")
    asked = parser.parse_args(argv)
    rows_asked = asked.rows or list(OTHERS if asked.short else ROWS)
    seeds = asked.seeds or ([0] if asked.short else [0, 1, 2])
    runner = Runner(asked.folder.resolve(), asked.threads)
    if asked.recipe:
        if asked.model is None:
            parser.error("--recipe needs --model FOLDER")
        recipe = {**recipe_of(asked.recipe), "model": str(asked.model.resolve())}
        recipe = named(recipe, " ".join([asked.model.name, *asked.set]))
        try:
            run = runner(recipe, asked.recipe, [f"name={recipe['name']}", f"model={recipe['model']}", *asked.set])
        except Failed as error:
            print(f"FAILED    {error}")
            return 1
        primary = recipe["report"]["primary"]
        short = asked.recipe.rpartition("/")[2]
        rows = [summary(short, {recipe.get("seed", 0): run}, primary["eval"], primary["strategy"])]
        command = f"python tools/evidence.py --recipe {asked.recipe} --model {asked.model.name} --threads {asked.threads}"
        found = result(short, recipe["about"], command, asked.threads, rows, rows[0]["n"])
    else:
        changes: dict[str, Any] = {"train.steps": SHORT_STEPS} if asked.short else {}
        changes |= {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in asked.set)}
        rows = over_rows(rows_asked, seeds, runner, asked.jobs, changes)
        words = ["python tools/evidence.py" + " --short" * asked.short, "--rows", *rows_asked, "--seeds", *map(str, seeds), *(f"--set {s}" for s in asked.set)]
        about = "For each seed the bundled model is fine-tuned once (policy_gradient/grpo's first stage), and every row starts from there."
        found = result(evidence.SHORT if asked.short else evidence.ID, about, " ".join(words), asked.threads, rows, ITEMS)
    for c in evidence.criteria(found):
        print(f"{'not measured' if c.met is None else 'met' if c.met else 'MISSED':<13}{c.name}: {c.measured} (wanted {c.wanted})", flush=True)
    if asked.no_store:
        print(json.dumps(found["rows"], indent=1))
    else:
        print(f"stored {report.store(found)}; wrote {report.write()}")
    return 1 if any("not_measured" in row for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
