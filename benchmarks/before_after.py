"""What each decision about a process is worth: the same SFT steps with it undone and with it, in fresh processes taken in turn.

    .venv/bin/python -m benchmarks.before_after [--model FOLDER] [--only shapes pages masters collection adapters windows draw halves chunks] [--rounds 3] [--steps 8]

    shapes      oneDNN and torch's wrapper keep 1,024 shapes of products each, or 32
    pages       memory in pages of 2 MB where the system has them, or of 4 kB
    masters     fp32 masters beside bf16 weights and torch's AdamW, or masters in two parts and our kernel
    collection  modules and vocabulary loaded with garbage collection, or without
    adapters    LoRA as peft computes it, or in the layer's own products (all others train every weight)
    windows     the backward of sliding windows by the stock kernel, or by half-precision products where those are faster (rows of 600 to 1,000 tokens)
    draw        tokens drawn by torch's operations, or by two kernels (a step is 64 tokens of one row, sampled)
    halves      a bf16 model's weights that are computed with in float32, read by few rows as float32, or as bf16 (a step as for draw)
    chunks      logits of a frozen head 256 MB at a time, or no more than 512 rows and 32 MB need (LoRA, rows of 600 to 1,000 tokens)

Rows have new lengths in every step. Prints medians over rounds of the load, of a step (the first left out), and of the process's peak; the losses of
all steps must be equal to 1e-2 relative (bf16 weights that rounded apart), else it exits with 1. The default model is random: 32,000 words, hidden 384, six layers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

UNDONE: dict[str, dict[str, str]] = {
    "shapes": {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"},
    "pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    "masters": {},
    "collection": {},
    "adapters": {},
    "windows": {},
    "draw": {},
    "halves": {},
    "chunks": {},
}


@contextmanager
def as_ever() -> Iterator[None]:
    yield


def child(model: str, name: str, undone: bool, steps: int) -> dict[str, Any]:
    from benchmarks import rows as data
    from benchmarks.ours import sft
    from benchmarks.protocol import memory
    from benchmarks.sft import vocabulary_of

    if undone and name == "masters":
        import burnish.train.masters as masters

        masters.kernels_for = lambda *given: None  # type: ignore[assignment]
    if undone and name == "collection":
        import burnish.core.machine as machine

        machine.uncollected = as_ever  # type: ignore[assignment]
    if undone and name == "adapters":
        import burnish.models.adapters as adapters

        adapters.fuse_adapters = lambda model: 0  # type: ignore[assignment]
    if undone and name == "windows":
        import burnish.forest.blocks as blocks

        made = blocks._half_kernel

        def stock(width: int) -> Any:
            kernel = made(width)
            return replace(kernel, backward=lambda *a: (blocks._stock_backward if isinstance(a[6], blocks.Band) else kernel.backward)(*a))

        blocks._half_kernel = stock  # type: ignore[assignment]
    if undone and name == "chunks":
        import burnish.maths.head as head

        head.ENOUGH_BYTES = head.LOGITS_BYTES
    if name in ("draw", "halves"):
        return drawn(model, name, undone, steps)
    begin = time.perf_counter()
    sft.prepare(model=model, mode="lora" if name in ("adapters", "chunks") else "full", threads=2)
    load = time.perf_counter() - begin
    dice, vocabulary = random.Random(0), vocabulary_of(Path(model))
    shortest, longest = (600, 1000) if name in ("windows", "chunks") else (300, 500)
    done = [sft.step(rows=[data.row(dice, dice.randint(shortest, longest), vocabulary, 0.5) for _ in range(4)]) for _ in range(steps)]
    return {
        "load_s": load, "step_s": statistics.median(d["seconds"] for d in done[1:]), "peak_gb": memory("VmHWM") / 1e9,
        "losses": [d["loss"] for d in done],
    }  # fmt: skip


def drawn(model: str, name: str, undone: bool, steps: int) -> dict[str, Any]:
    """Sampling in place of training; what must be equal is the log-probability of the first four tokens of each row."""
    from benchmarks.protocol import memory
    from burnish.core.records import Sampling
    from burnish.engines.local import lean, sampling
    from burnish.engines.local.engine import LocalEngine
    from burnish.models.load import load_policy

    if undone and name == "draw":
        sampling.kernels_for = lambda *given: None  # type: ignore[assignment]
    if undone and name == "halves":
        lean.halves_weights = lambda *given: False  # type: ignore[assignment]
    begin = time.perf_counter()
    policy = load_policy(model, dtype="float32" if name == "halves" else "auto")
    if name == "halves":
        for p in policy.model.parameters():
            p.data.copy_(p.bfloat16())  # as a bf16 file's; the random model's are not
    engine = LocalEngine(policy)
    engine.end_ids = ()  # so that every row is as long
    node = engine.prefill(range(100, 164))
    load, seconds, logprobs = time.perf_counter() - begin, [], []
    for i in range(steps):
        begin = time.perf_counter()
        (row,) = engine.sample([node], Sampling(max_new_tokens=64, seed=1), [(i, 0)])
        seconds.append(time.perf_counter() - begin)
        logprobs.append(sum(row.logprobs[:4]))
    return {"load_s": load, "step_s": statistics.median(seconds[1:]), "peak_gb": memory("VmHWM") / 1e9, "losses": logprobs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(UNDONE), default=list(UNDONE))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(asked.child[0], asked.child[1], asked.child[2] == "undone", asked.steps)))
        return
    from tests.folders import model_folder

    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model or model_folder(
            Path(folder) / "wide", "qwen3", vocab_size=32000, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
            num_attention_heads=6, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        )  # fmt: skip
        print(f"{'':<12}{'load s':>18}{'step s':>18}{'peak GB':>18}   undone / as it is, medians of {asked.rounds}")
        for name in asked.only:
            found: dict[str, list[dict[str, Any]]] = {"undone": [], "as it is": []}
            for _ in range(asked.rounds):
                for which, seen in found.items():
                    words = [sys.executable, "-m", "benchmarks.before_after", "--child", str(model), name, which, "--steps", str(asked.steps)]
                    environment = os.environ | (UNDONE[name] if which == "undone" else {})
                    seen.append(json.loads(subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
            middle = {u: {k: statistics.median(r[k] for r in rs) for k in ("load_s", "step_s", "peak_gb")} for u, rs in found.items()}
            was, now = middle["undone"], middle["as it is"]
            print(f"{name:<12}" + "".join(f"{f'{was[k]:.2f} / {now[k]:.2f}':>18}" for k in now), flush=True)
            apart = max(abs(a / b - 1) for a, b in zip(*(rs[0]["losses"] for rs in found.values())))
            if apart > 1e-2:
                wrong = True
                print(f"    the losses differ by {apart:.1e}")
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
