"""SFT steps of burnish and of TRL, interleaved on the same rows: full fine-tuning and LoRA.

    make peers
    .venv/bin/python benchmarks/sft.py --model FOLDER [--blocks 3] [--mode full lora] [--setting best] [--tokens 171]

Each system is a child process in its own environment; the idle one is stopped (SIGSTOP). A fixed product is timed before and
after every block; a block during which it ran more than 15 % slower than the run's best is discarded and repeated. The first
step of each is a warm-up. Printed: seconds, loss tokens per second, their ratio, losses, peak memory; and as JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Child:
    """A system under test that trains when told to."""

    def __init__(self, python: Path, script: Path) -> None:
        self.process = subprocess.Popen(
            [str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line or "error" in (answer := json.loads(line)):
            raise SystemExit(f"{self.process.args} failed: {line or 'it ended'}")
        if order["do"] != "stop":
            self.process.send_signal(signal.SIGSTOP)
        return answer


def calibrate() -> float:
    """GFLOP/s of a fixed fp32 product, best of a quarter of a second."""
    import torch

    torch.set_num_threads(2)
    a = torch.randn(1024, 1024)
    best, end = 1e9, time.perf_counter() + 0.25
    while time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best / 1e9


def rows_file(path: Path, rows: int, tokens: int, vocabulary: int) -> None:
    """Rows of log-normal length around `tokens`, half prompt."""
    dice = random.Random(0)
    with open(path, "w", encoding="utf-8") as out:
        for _ in range(rows):
            n = max(40, min(512, round(dice.lognormvariate(0, 0.5) * tokens)))
            ids = [dice.randrange(100, min(vocabulary, 20_000)) for _ in range(n)]
            out.write(json.dumps({"input_ids": ids, "completion_mask": [int(i >= n // 2) for i in range(n)]}) + "\n")


def compare(mode: str, setting: str, model: Path, rows: Path, blocks: int, batch_rows: int) -> dict[str, Any]:
    ours, peer = Child(ROOT / ".venv/bin/python", ROOT / "benchmarks/ours/sft.py"), Child(ROOT / ".venv-peers/bin/python", ROOT / "benchmarks/peers/trl_sft.py")
    common = {"do": "prepare", "model": str(model), "rows": str(rows), "mode": mode, "batch_rows": batch_rows}
    ready = {"trl": peer.ask(**common, setting=setting, order="sequential", max_steps=1000), "burnish": ours.ask(**common)}
    first = peer.ask(do="step", n=1)
    mine = ours.ask(do="step", rows=first["rows"])
    losses = {"trl": first["loss"], "burnish": mine["loss"]}  # of the first step, before any update: the same model and rows
    if abs(losses["burnish"] / losses["trl"] - 1) > 0.02:
        raise SystemExit(f"the two systems do not compute the same loss on the same rows: {losses}")
    kept: list[dict[str, Any]] = []
    discarded, best = 0, calibrate()
    while len(kept) < blocks:
        before = calibrate()
        theirs = peer.ask(do="step", n=1)
        middle = calibrate()
        mine = ours.ask(do="step", rows=theirs["rows"])
        after = calibrate()
        best = max(best, before, middle, after)
        if min(before, middle, after) < 0.85 * best and discarded < 3 * blocks:
            discarded += 1
            continue
        kept.append({"trl": theirs, "burnish": mine, "gflops": [before, middle, after]})
    ends = {"trl": peer.ask(do="stop"), "burnish": ours.ask(do="stop")}
    ratio = [b["trl"]["seconds"] / b["burnish"]["seconds"] for b in kept]
    speed = {s: statistics.median(b[s]["loss_tokens"] / b[s]["seconds"] for b in kept) for s in ("trl", "burnish")}
    work = [b["burnish"]["useful_flops"] / b["burnish"]["executed_flops"] for b in kept]
    return {
        "mode": mode, "setting": setting, "blocks": len(kept), "discarded": discarded, "gflops_fp32": best,
        "seconds": {s: [round(b[s]["seconds"], 2) for b in kept] for s in ("trl", "burnish")},
        "loss_tokens_per_s": {s: round(v, 1) for s, v in speed.items()}, "ratio": round(statistics.median(ratio), 2),
        "worst_ratio": round(min(ratio), 2), "first_loss": losses,
        "peak_gb": {s: round(v["peak_bytes"] / 1e9, 2) for s, v in ends.items()}, "work_eff": round(statistics.median(work), 3),
        "achieved_gflops": round(statistics.median(b["burnish"]["executed_flops"] / b["burnish"]["seconds"] / 1e9 for b in kept), 1),
        "load_s": {s: round(v["seconds"], 1) for s, v in ready.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--mode", nargs="+", default=["full", "lora"])
    parser.add_argument("--setting", nargs="+", default=["best"])
    parser.add_argument("--tokens", type=int, default=171)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    vocabulary = json.loads((asked.model / "config.json").read_text())["vocab_size"]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows_file(rows, 256, asked.tokens, vocabulary)
        for mode in asked.mode:
            for setting in asked.setting:
                result = compare(mode, setting, asked.model, rows, asked.blocks, asked.batch_rows)
                found.append(result)
                print(
                    f"{mode} ({setting}): {result['ratio']:.2f}x TRL (worst block {result['worst_ratio']:.2f}x), "
                    f"{result['loss_tokens_per_s']['burnish']} against {result['loss_tokens_per_s']['trl']} loss tokens/s, "
                    f"peak {result['peak_gb']['burnish']} against {result['peak_gb']['trl']} GB, "
                    f"first losses {result['first_loss']['burnish']:.4f} and {result['first_loss']['trl']:.4f}, {result['discarded']} blocks discarded",
                    flush=True,
                )
    if asked.json:
        stamp = {"date": time.strftime("%Y-%m-%d"), "argv": sys.argv[1:], "cores": os.cpu_count()}
        asked.json.write_text(json.dumps(stamp | {"results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
