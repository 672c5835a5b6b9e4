"""A run folder as a real run leaves it, made from a seed in milliseconds: base and sft, two tasks, 1,000 questions each."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

STEPS = 60
WORDS = ("base", "sft", "grpo", "distil")
TARGETS = {  # accuracy at base, sft, later
    "sums": {"greedy": (0.312, 0.583, 0.664), "vote:4": (0.335, 0.621, 0.69), "vote:16": (0.371, 0.668, 0.716), "pass@16": (0.842, 0.917, 0.93)},
    "route": {"greedy": (0.208, 0.392, 0.38), "best_of:4@rule": (0.334, 0.561, 0.56), "best_of:16@rule": (0.452, 0.688, 0.70),
              "vote:16": (0.231, 0.427, 0.42), "pass@16": (0.471, 0.712, 0.72)},
}  # fmt: skip
RECIPE = """\
burnish: 1
name: {name}
about: Fine-tune the bundled model on sums; measure it before and after, alone and with votes.
model: spark
seed: 0

evals:
  sums: {{task: sums, levels: [2, 3, 4], rows: 1000, strategies: [greedy, "vote:4", "vote:16", "pass@16"], temperature: [0.4, 0.6, 0.8]}}
  route: {{task: route, rows: 1000, strategies: [greedy, "best_of:4@rule", "best_of:16@rule", "vote:16", "pass@16"]}}

stages:
  - name: sft
    method: sft
    data: {{task: sums, levels: [2, 3, 4], rows: 4096, target: rationale}}
    train: {{steps: 60, batch_rows: 64, learning_rate: 1e-3, schedule: {{name: cosine, warmup: 0.1}}, validate_every: 10}}
"""


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def build(root: Path, *, name: str = "quickstart", stages: int = 2, n: int = 1000, steps: int = STEPS, status: str = "complete", seed: int = 0) -> Path:
    """Write the folder and return it. `stages` counts the base model."""
    chosen = WORDS[:stages]
    write(root / "run.json", {
        "schema": 1, "burnish": "0.1.0", "name": name, "recipe": "first_steps/quickstart", "model": "spark", "seed": 0, "status": status,
        "about": "Fine-tune the bundled model on sums; measure it before and after, alone and with votes.",
        "primary": {"eval": "sums", "strategy": "greedy"}, "started": "2026-11-24T02:40:11+0000", "finished": None if status == "running" else "2026-11-24T02:52:57+0000",
        "starts": 1, "resolved": {"name": name, "stages": [{"name": s} for s in chosen[1:]]},
    })  # fmt: skip
    (root / "recipe.yaml").write_text(RECIPE.format(name=name), encoding="utf-8")
    resolved = "# Every value of this run. A comment says where a value came from; without one it is the default.\n" + "".join(
        f"{line}  # quickstart.yaml:{i}\n" if line.strip() else "\n" for i, line in enumerate(RECIPE.format(name=name).splitlines(), 1)
    )
    (root / "resolved.yaml").write_text(resolved, encoding="utf-8")
    write(root / "environment.json", {
        "schema": 1, "burnish": "0.1.0", "commit": "b87df96db5c78209aca2e2b6fbc4f65aab3249f7", "python": "3.11.9",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.18.1", "tokenizers": "0.23.0", "numpy": "2.4.1"},
        "platform": "Linux-6.8-x86_64", "cpu": "AMD EPYC 7B13", "cores": 2, "threads": 2, "memory_bytes": 8_200_000_000,
        "device": "cpu", "calibration_gflops": {"float32": 121.4, "bfloat16": 38.2}, "argv": ["burnish", "quickstart"],
    })  # fmt: skip
    write(root / "decisions.json", {
        "dtype": {"value": "float32", "why": "bfloat16 is slower than float32 on this machine", "measured": {"float32_gflops": 121.4, "bfloat16_gflops": 38.2}},
        "attention": {"value": "forest", "why": "a tiny forest agrees with its separate rows to 2e-6", "measured": {"largest_difference": 2.1e-06}},
        "memory.sft": {"value": "at most 4096 tokens a forward, checkpointing off", "why": "4.10 GB free for activations, measured at 63.3 kB a token", "measured": {},
                       "plans": [{"step": 0, "micro_tokens": 4096, "head_rows": None, "checkpointing": "off"}]},
    })  # fmt: skip
    for i, stage in enumerate(chosen):
        folder = root / f"{i:02d}-{stage}"
        rng = random.Random(f"{seed} {stage}")
        for task in TARGETS:
            write(folder / "evals" / f"{task}.json", evaluation(task, stage, min(i, 2), n, seed))
        write(folder / "evals" / "held_out.json", held_out(stage, min(i, 2), seed))
        counted: dict[str, Any] = {
            "prefill": {"prefill_tokens": 39_214 * 2}, "decode": {"sampled_tokens": 1_482_000 + 91_000 * i}, "score": {"scored_tokens": 0},
            "sampling": {"useful_flops": 2_910_000_000_000, "executed_flops": 3_304_000_000_000},
        }  # fmt: skip
        seconds = {"evaluate": 148.2 + 9 * i} | ({"load": 1.31} if i == 0 else {})
        about: dict[str, Any] = {"schema": 1, "name": stage, "method": "none", "steps": 0, "status": "complete"}
        if i:
            counted["train"] = {"stream_tokens": 184_320, "label_tokens": 121_116, "useful_flops": 1_184_000_000_000, "executed_flops": 1_292_000_000_000}
            counted["validation"] = {"stream_tokens": 36_864, "label_tokens": 24_223, "executed_flops": 81_000_000_000}
            seconds |= {"train": 41.7, "validation": 3.1, "save": 0.8}
            about |= {"method": "sft", "steps": steps, "skipped_steps": 0, "stopped_by": None, "input": f"{i - 1:02d}" * 32, "output": f"{i:02d}" * 32}
            about |= {"data": {
                "rows": 3968, "validation_rows": 128, "dropped": {"longer than 128 tokens": 3}, "notices": {}, "tokens": 190_464, "label_tokens": 125_153,
                "longest": 94, "format": "task sums", "sources": [{"task": "sums", "format": "task sums", "rows": 4099}],
            }, "mask_view": [mask_row(rng, k) for k in range(6)]}  # fmt: skip
            lines(folder / "metrics.jsonl", metrics(rng, steps))
            lines(folder / "timing.jsonl", [
                {"step": s, "seconds": 0.69, "train_tokens_per_s": 4400 + rng.random() * 40, "rss_bytes": 612_000_000} for s in range(1, steps + 1)
            ])  # fmt: skip
        write(folder / "ledger.json", {
            "schema": 1, "counted": counted,
            "measured": {"seconds": seconds, "peak_memory_bytes": 612_000_000 + 90_000_000 * i, "joules": None, "money": None},
        })  # fmt: skip
        write(folder / "stage.json", about)
    return root


def metrics(rng: random.Random, steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for s in range(1, steps + 1):
        loss = 0.31 + 1.9 * math.exp(-s / 9) + rng.gauss(0, 0.02)
        rate = 1e-3 * (s / 6 if s <= 6 else 0.5 * (1 + math.cos(math.pi * (s - 6) / max(1, steps - 6))))
        rows.append({
            "step": s, "kind": "train", "loss": loss, "grad_norm": 0.4 + 2.2 * math.exp(-s / 7) + abs(rng.gauss(0, 0.08)), "lr": rate,
            "label_tokens": 2018, "stream_tokens": 3072, "rows": 64, "epoch": round(s * 64 / 3968, 6), "skipped_steps": 0,
        })  # fmt: skip
        if s % 10 == 0:
            rows.append({"step": s, "kind": "validation", "loss": 0.335 + 1.9 * math.exp(-s / 9), "label_tokens": 3970})
    return rows


def question(task: str, rng: random.Random) -> tuple[str, str, str]:
    """(prompt, gold, careful work)."""
    if task == "sums":
        a, b, c = rng.randint(2, 19), rng.randint(2, 9), rng.randint(2, 9)
        gold = a + b * c
        return f"{a}+{b}*{c}=?", str(gold), f"{b}*{c}={b * c}\n{a}+{b * c}={gold}\n"
    names = rng.sample("ABCDEFGH", 6)
    path = names[:4]
    edges = [f"{x}-{y}" for x, y in pairwise(path)] + [f"{path[1]}-{names[4]}", f"{path[0]}-{names[5]}"]
    rng.shuffle(edges)
    return f"{' '.join(edges)}\nfrom {path[0]} to {path[3]}", "-".join(path), "".join(f"{x} leads to {y}\n" for x, y in pairwise(path))


def completion(strategy: str, right: bool, gold: str, work: str, rng: random.Random) -> dict[str, Any]:
    if right:
        return {"strategy": strategy, "text": f"{work}answer {gold}", "answer": gold, "correct": True}
    if rng.random() < 0.15:
        return {"strategy": strategy, "text": work[: len(work) // 2] * 3, "answer": None, "correct": False}
    wrong = str(int(gold) + rng.choice([-10, -2, -1, 1, 3, 9])) if gold.isdigit() else gold[::-1]
    return {"strategy": strategy, "text": f"{work.replace(gold, wrong)}answer {wrong}", "answer": wrong, "correct": False}


def evaluation(task: str, stage: str, at: int, n: int, seed: int) -> dict[str, Any]:
    """Grades with exactly the accuracy of TARGETS (to rounding); hard questions are hard for every strategy and stage."""
    hard = [random.Random(f"{seed} {task} {i}").random() for i in range(n)]
    rows = []
    for strategy, targets in TARGETS[task].items():
        rng = random.Random(f"{seed} {task} {stage} {strategy}")
        order = sorted(range(n), key=lambda i: hard[i] + rng.gauss(0, 0.25))
        right = set(order[: round(targets[at] * n)])
        draws = int(strategy.split("@")[0].partition(":")[2] or 1) if "pass" not in strategy else 16
        length = (31 if task == "sums" else 38) + 2 * at
        sampled = n * draws * length
        rows.append({
            "strategy": strategy, "oracle": strategy.startswith("pass@"), "accuracy": len(right) / n, "interval": [0, 1],
            "correct": [int(i in right) for i in range(n)], "truncated": round(0.004 * n * draws * (3 - at)), "unanswered": round(0.008 * n * draws),
            "spend": {"prefill_tokens": 19 * n, "sampled_tokens": sampled, "scored_tokens": 0,
                      "useful_flops": 1_730_000 * sampled, "executed_flops": 1_920_000 * sampled},
        })  # fmt: skip
    samples = []
    for i in range(min(20, n)):
        rng = random.Random(f"{task} question {i}")
        prompt, gold, work = question(task, rng)
        samples.append({
            "id": f"{task}/test/{2 + i % 3}/{i:04d}", "prompt": prompt, "gold": gold, "level": 2 + i % 3,
            "completions": [completion(r["strategy"], bool(r["correct"][i]), gold, work, rng) for r in rows if not r["oracle"]],
        })  # fmt: skip
    return {
        "schema": 1, "eval": task, "task": task, "fold": "test", "n": n, "stage": stage, "seconds": 74.1,
        "settings": {"temperature": 0.6, "max_new_tokens": 64, "candidates": {"0.4": 0.59, "0.6": 0.61, "0.8": 0.6},
                     "chosen_on": "validation, n=200, vote:4", "template": "9f" * 32, "stop": []},
        "item_ids": [f"{task}/test/{2 + i % 3}/{i:04d}" for i in range(n)], "strategies": rows, "samples": samples,
        "spend": {"prefill_tokens": 19 * n, "sampled_tokens": sum(r["spend"]["sampled_tokens"] for r in rows), "scored_tokens": 0,
                  "useful_flops": 1, "executed_flops": 1},
    }  # fmt: skip


def held_out(stage: str, at: int, seed: int) -> dict[str, Any]:
    """The likelihood of 128 rows that training never saw: grades between 0 and 1, nothing sampled."""
    rng = random.Random(f"{seed} held out {stage}")
    nats = [max(0.02, rng.gauss((1.62, 0.336, 0.35)[at], 0.08)) for _ in range(128)]
    grades = [math.exp(-v) for v in nats]
    spend = {"prefill_tokens": 0, "sampled_tokens": 0, "scored_tokens": 3970, "useful_flops": 13_500_000_000, "executed_flops": 13_500_000_000}
    row = {"strategy": "likelihood", "oracle": False, "accuracy": sum(grades) / 128, "interval": [0, 1], "correct": grades, "truncated": 0,
           "unanswered": 0, "spend": spend}  # fmt: skip
    return {
        "schema": 1, "eval": "held_out", "task": "rows held out of stage sft", "fold": "held out", "n": 128, "stage": stage, "seconds": 0.7,
        "settings": {"template": "9f" * 32, "label_tokens": 3970, "nats_per_label": sum(nats) / 128},
        "item_ids": [f"sums/train/{i}" for i in range(128)], "strategies": [row], "spend": spend,
        "samples": [{"id": f"sums/train/{i}", "prompt": "1+1=?", "gold": "2", "level": None, "completions": []} for i in range(20)],
    }  # fmt: skip


def mask_row(rng: random.Random, k: int) -> dict[str, Any]:
    prompt, gold, work = question("sums", rng)
    head = ["<|user|>", *prompt, "<|assistant|>"]
    tail = [*work, "<|answer|>", *gold, "<|end|>"]
    return {"where": f"sums/train/{2 + k % 3}/{k:04d}", "tokens": [[t, False] for t in head] + [[t, True] for t in tail]}


def grade(root: Path, stage: str, task: str, grades: dict[str, Sequence[float]], *, tokens: int = 10, flops: int = 1000) -> Path:
    """Replace one evaluation by these grades; each completion costs `tokens` sampled tokens and `flops` executed FLOPs."""
    path = root / stage / "evals" / f"{task}.json"
    n = len(next(iter(grades.values())))
    write(path, {
        "schema": 1, "eval": task, "task": task, "fold": "test", "n": n, "stage": stage.split("-", 1)[1], "seconds": 1.5,
        "settings": {"temperature": 0.6, "max_new_tokens": 48, "chosen_on": "validation, n=200, vote:4"},
        "item_ids": [f"{task}/{i}" for i in range(n)],
        "strategies": [
            {"strategy": name, "oracle": name.startswith("pass@"), "accuracy": sum(g) / n, "interval": [0, 1], "correct": list(g),
             "truncated": 0, "unanswered": 0,
             "spend": {"prefill_tokens": 5 * n, "sampled_tokens": tokens * draws(name) * n, "scored_tokens": 0,
                       "useful_flops": flops * draws(name) * n // 2, "executed_flops": flops * draws(name) * n}}
            for name, g in grades.items()
        ],
        "samples": [],
    })  # fmt: skip
    return path


def draws(strategy: str) -> int:
    return int("".join(c for c in strategy.partition(":")[2] or strategy.partition("pass@")[2] if c.isdigit()) or 1)


def change(path: Path, **values: Any) -> None:
    """Set top-level keys of a JSON file."""
    write(path, json.loads(path.read_text(encoding="utf-8")) | values)


def draw(root: Path, stage: str = "02-grpo", *, rounds: int = 24, prompts: int = 6, size: int = 4, rewards: Sequence[str] = ("task", "brief"),
         facts: dict[str, Any] | None = None) -> Path:  # fmt: skip
    """Make a stage one that draws: what it logs, what its rounds held, what its parts took. `facts`: functions of the round, or numbers."""
    folder, rows = root / stage, []
    for r in range(rounds):
        row = {
            "reward_mean": 0.5, "reward_std": 0.4, "reward_min": 0.0, "reward_max": 1.0, "reward_abstained": 0.0, "reward_timeouts": 0,
            "reward_crashes": 0, "reward_invalid": 0, "reward_infra": 0, "completion_tokens": 30.0, "truncated_share": 0.0, "surprisal": 0.2,
            "dead_groups": 0.1, "live_samples": 0.9, "sampler_gap": 1e-6, "sampler_gap_max": 2e-5,
        } | {name: value(r) if callable(value) else value for name, value in (facts or {}).items()}  # fmt: skip
        if len(rewards) > 1:
            row["components"] = {name: {"reward_mean": row["reward_mean"] / (i + 1), "reward_std": 0.1, "reward_max": 1} for i, name in enumerate(rewards)}
        rows.append({"step": 2 * r + 1, "kind": "train", "loss": 0.01, "grad_norm": 1.0, "lr": 1e-4, "skipped_steps": 0, **row})
        # the second step of a round logs what is its own, and its policy has moved
        rows.append({"step": 2 * r + 2, "kind": "train", "loss": 0.02, "grad_norm": 1.0, "lr": 1e-4, "live_samples": 0.8, "sampler_gap": 0.1, "sampler_gap_max": 3.0})
        kept = [{"schema": 1, "round": r, "weights_version": "v", "questions": list(range(prompts)), "greedy": [], "spend": {}, "facts": {}}]
        kept += [
            {"group": g, "tokens": [1] * (5 + i), "logprobs": [-0.5] * (5 + i), "finish": "length" if i == 0 else "stop", "text": f"r{r} g{g} s{i}",
             "rewards": {name: float(i % 2) for name in rewards}, "total": None if i == 3 else float(i % 2)}
            for g in range(prompts) for i in range(size)
        ]  # fmt: skip
        packed(folder / "trajectories" / f"round-{r:06d}.jsonl.gz", kept)
        for part in (0, 1):
            credit = [{"schema": 1}] + [
                {"group": g, "where": f"sums/train/{g}", "prompt": [{"role": "user", "content": f"{r}+{g}=?"}], "answer": r + g,
                 "advantages": [-0.5 + i for i in range(size)], "live": [i != 0 for i in range(size)]}
                for g in range(part, prompts, 2)
            ]  # fmt: skip
            packed(folder / "trajectories" / f"round-{r:06d}-credit-{part}.jsonl.gz", credit)
    lines(folder / "metrics.jsonl", rows)
    ledger = json.loads((folder / "ledger.json").read_text())
    ledger["counted"]["prepare"] = {"prefill_tokens": 100, "sampled_tokens": 2_000, "scored_tokens": 30, "useful_flops": 4_000, "executed_flops": 5_000}
    ledger["measured"]["seconds"] |= {"prepare": 20.0, "reward": 3.0}
    write(folder / "ledger.json", ledger)
    return root


def packed(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode(), mtime=0))
