"""`burnish estimate` against the runs it speaks of: ten configurations, each estimated and run in a fresh process.

    .venv/bin/python benchmarks/estimate.py --model GEMMA-270M-FOLDER [--only spark-full ...] [--threads 2] [--json FILE]

Memory: the process's peak above what importing its libraries takes; within 15 %. Time: the run's own ledger, all phases, after
both are put to the same speed of a matrix product, which is timed before and after each; within 30 %. Exits 1 where one is
outside. `--cpu-time` measures the processor's time instead of the clock's, for a machine that others use meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEMORY, TIME = 0.15, 0.30

HEAD = "burnish: 1\nname: {name}\nmodel: {model}\nseed: 1\n"
STAGE = """stages:
  - name: sft
    method: sft
    data: {data}
    train: {{steps: {steps}, batch_rows: {rows}, learning_rate: 1.0e-4{train}}}
{adapter}"""
SUMS = "{task: sums, levels: [2, 3, 4, 5], rows: 2048}"
LORA = "    adapter: {name: lora, rank: 16}\n"
EVAL = "evals:\n  sums: {task: sums, levels: [4, 5], rows: 400, strategies: [greedy, vote:4], temperature: 0.4, max_new_tokens: 64}\n"


def stage(data: str, steps: int, rows: int, train: str = "", adapter: str = "") -> str:
    return STAGE.format(data=data, steps=steps, rows=rows, train=train, adapter=adapter)


def configurations(short: str, long: str) -> dict[str, tuple[str, str]]:
    """Name -> (which model, the rest of its recipe)."""
    return {
        "spark-full": ("spark", stage(SUMS, 40, 64)),
        "spark-lora": ("spark", stage(SUMS, 12, 64, adapter=LORA)),
        "spark-checkpointing": ("spark", stage(SUMS, 12, 64, ", checkpointing: layers")),
        "spark-eval": ("spark", EVAL),
        "32k-full-short": ("32k", stage(short, 4, 32)),
        "32k-lora-long": ("32k", stage(long, 3, 4, adapter=LORA)),
        "32k-full-long": ("32k", stage(long, 3, 4)),
        "32k-checkpointing": ("32k", stage(long, 3, 4, ", checkpointing: layers")),
        "gemma-full": ("gemma", stage(short, 4, 8)),
        "gemma-lora": ("gemma", stage(short, 4, 8, adapter=LORA)),
    }


def rows_file(path: Path, rows: int, characters: int) -> str:
    """Prompt and completion, half each, of about so many characters."""
    with open(path, "w", encoding="utf-8") as out:
        for i in range(rows):
            n = characters // 2 + (i * 37) % max(1, characters // 8)
            text = " ".join(f"{(i * 7919 + j * 104729) % 9973}" for j in range(n // 4))
            out.write(json.dumps({"prompt": text[: n // 1], "completion": text[::-1][: n // 1]}) + "\n")
    return "{file: " + str(path) + "}"


def child(what: str, recipe: str, model: str, threads: int, cpu_time: bool, runs: str) -> dict[str, Any]:
    """In its own process: an estimate, or the run with what it really took."""
    import torch

    torch.set_num_threads(threads)
    if cpu_time:
        time.perf_counter = time.process_time
    from burnish.core.machine import resident_bytes
    from burnish.estimate import estimate, import_everything
    from burnish.machine import gflops

    import_everything(model)
    if what == "estimate":
        begin = time.perf_counter()
        found = estimate(recipe)
        return found | {"took_s": time.perf_counter() - begin}
    from burnish.pipeline import run
    from burnish.train.log import Progressing

    base = resident_bytes()
    speed = {str(d): gflops(d) for d in (torch.float32, torch.bfloat16)}
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    done = run(recipe, under=Path(runs), progress=Progressing(quiet=True))
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")) - base
    ledgers = [json.loads(p.read_text())["measured"]["seconds"] for p in sorted(done.folder.glob("*/ledger.json"))]
    counted = [json.loads(p.read_text())["counted"] for p in sorted(done.folder.glob("*/ledger.json"))]
    after = {str(d): gflops(d) for d in (torch.float32, torch.bfloat16)}
    return {
        "peak_bytes": peak, "seconds": sum(sum(s.values()) for s in ledgers), "phases": ledgers,
        "executed_flops": sum(row.get("executed_flops", 0) for c in counted for row in c.values()),
        "useful_flops": sum(row.get("useful_flops", 0) for c in counted for row in c.values()),
        "gflops": {k.removeprefix("torch."): (speed[k] + after[k]) / 2 for k in speed},
    }  # fmt: skip


def ask(what: str, recipe: Path, model: str, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    words = ["--child", what, str(recipe), model, "--threads", str(asked.threads), *(["--cpu-time"] if asked.cpu_time else [])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(asked.threads), "MKL_NUM_THREADS": str(asked.threads)}
    done = subprocess.run([sys.executable, __file__, *words, "--runs", str(folder)], capture_output=True, text=True, env=environment, cwd=folder, check=False)
    if done.returncode:
        raise SystemExit(f"{what} of {recipe.stem} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with Gemma-270M; without it those two are left out, and said so")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--runs", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(*asked.child, asked.threads, asked.cpu_time, asked.runs)))
        return
    sys.path.insert(0, str(ROOT))
    from tests.folders import model_folder

    outside, results = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"spark": "spark", "32k": str(folder / "wide")}
        if asked.model:
            models["gemma"] = str(asked.model.resolve())
        model_folder(
            folder / "wide", "qwen3", vocab_size=32768, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
            num_attention_heads=6, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        )  # fmt: skip
        all_of_them = configurations(rows_file(folder / "short.jsonl", 256, 240), rows_file(folder / "long.jsonl", 64, 1600))
        print(f"{'':<21}{'memory MB':>20}{'':>8}{'time s':>20}{'':>8}{'FLOPs':>8}")
        print(f"{'configuration':<21}{'estimate':>10}{'measured':>10}{'ratio':>8}{'estimate':>10}{'measured':>10}{'ratio':>8}{'ratio':>8}")
        for title, (which, rest) in all_of_them.items():
            if (asked.only and title not in asked.only) or which not in models:
                continue
            recipe = folder / f"{title}.yaml"
            recipe.write_text(HEAD.format(name=title, model=models[which]) + rest, encoding="utf-8")
            guess = ask("estimate", recipe, models[which], asked, folder)
            real = ask("run", recipe, models[which], asked, folder)
            speed = guess["machine"]["gflops"][guess["dtype"]] / real["gflops"][guess["dtype"]]
            bytes_ratio = guess["total"]["peak_bytes"] / real["peak_bytes"]
            phases = [p for i, s in enumerate(guess["stages"]) for p in s["phases"] if i == 0 or p["name"] != "load"]  # as the ledger counts
            seconds = sum(p["seconds"] for p in phases) * speed  # at the run's speed of a product
            time_ratio = seconds / real["seconds"]
            flops = guess["total"]["executed_flops"] / real["executed_flops"]
            wrong = [w for w, bad in (("memory", abs(bytes_ratio - 1) > MEMORY), ("time", abs(time_ratio - 1) > TIME)) if bad]
            outside += [f"{title}: {w}" for w in wrong]
            results[title] = {"estimate": guess, "measured": real, "memory_ratio": bytes_ratio, "time_ratio": time_ratio}
            print(
                f"{title:<21}{guess['total']['peak_bytes'] / 1e6:>10.0f}{real['peak_bytes'] / 1e6:>10.0f}{bytes_ratio:>8.2f}"
                f"{seconds:>10.2f}{real['seconds']:>10.2f}{time_ratio:>8.2f}{flops:>8.2f}   {', '.join(wrong)}",
                flush=True,
            )
    if asked.json:
        stamp = {"date": time.strftime("%Y-%m-%d"), "argv": sys.argv[1:], "cores": os.cpu_count()}
        asked.json.write_text(json.dumps(stamp | {"results": results}, indent=1) + "\n", encoding="utf-8")
    if "gemma" not in models:
        print("left out: gemma-full, gemma-lora (give --model)")
    print(f"outside: {', '.join(outside) or 'none'} (memory within {MEMORY:.0%}, time within {TIME:.0%})")
    sys.exit(1 if outside else 0)


if __name__ == "__main__":
    main()
