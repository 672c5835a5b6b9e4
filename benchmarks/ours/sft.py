"""burnish's SFT step: `train.loop.one_step` as a run does it: prepare, forward and backward of every micro-batch, clip, AdamW.

    {"do": "prepare", "model": FOLDER, "mode": "full" | "lora", "threads": 2}
    {"do": "step", "rows": [{"input_ids": [...], "completion_mask": [...]}, ...]}       one optimiser step on these rows
    {"do": "step", "rows": [...], "limit": BYTES}        planned anew, as a run with `train.memory_bytes: BYTES` would; or {"refused": why}

Dtype and micro-batch are what `auto` in a recipe gives (measured and decided in the first step); a step's `peak_step_bytes` is the most resident during it.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

from benchmarks.protocol import BEGAN, Answer, forget_peak, memory, serve, versions

LEARNING_RATE = 2e-5  # TRL's default
held: dict[str, Any] = {}


def prepare(*, model: str, mode: str, threads: int) -> Answer:
    from burnish.core.machine import uncollected

    with uncollected():  # as a run's verbs do
        import torch

        from burnish.methods.supervised import Supervised
        from burnish.models.adapters import lora
        from burnish.models.load import load_policy
        from burnish.train.loop import State
        from burnish.train.memory import Memory
        from burnish.train.optim import Optimiser

    imported = time.perf_counter()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    policy = load_policy(model)
    if mode == "lora":
        policy.requires_grad_(False)
        policy = lora(policy, rank=16, alpha=32.0)
    method = Supervised(None, (), None, 10**6, "token_mean")  # type: ignore[arg-type]
    held.update(
        policy=policy, method=method, optimiser=Optimiser(policy, learning_rate=LEARNING_RATE), state=State(),
        settings=SimpleNamespace(learning_rate=LEARNING_RATE, max_skipped_steps=0), memory=Memory(),
    )  # fmt: skip
    return {
        "import_seconds": imported - BEGAN,
        "parameters": policy.shape.parameters,
        "trained": sum(p.numel() for p in policy.trainable().values()),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "versions": versions("torch", "transformers", "peft"),
    }


def step(*, rows: list[dict[str, list[int]]], limit: float | None = None) -> Answer:
    from burnish.core.errors import MachineError
    from burnish.core.records import Rendered
    from burnish.train.loop import one_step
    from burnish.train.memory import Memory
    from burnish.train.schedules import constant

    policy, method, state = held["policy"], held["method"], held["state"]
    before = dict(state.ledger.counted.get("train", {}))
    forget_peak()
    begin = time.perf_counter()
    rendered = [Rendered(tuple(r["input_ids"]), tuple(map(bool, r["completion_mask"])), str(i)) for i, r in enumerate(rows)]
    work = method.work(rendered)
    if limit is not None:
        held["memory"] = Memory(limit=int(limit))
    try:
        row = one_step(policy, method, held["optimiser"], held["settings"], constant, held["memory"], state, work, policy.shape)
    except MachineError as error:
        if limit is None:
            raise
        return {"refused": str(error), "seconds": time.perf_counter() - begin, "peak_step_bytes": memory("VmHWM")}
    seconds = time.perf_counter() - begin
    spent = {k: v - before.get(k, 0) for k, v in state.ledger.counted["train"].items()}
    return {
        "seconds": seconds, "loss": row["loss"], "grad_norm": row["grad_norm"], "loss_tokens": row["label_tokens"],
        "tokens": row["stream_tokens"], "peak_step_bytes": memory("VmHWM"),
        "plan": str(held["memory"].plan(state.step)), "useful_flops": spent["useful_flops"], "executed_flops": spent["executed_flops"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(serve(prepare, step))
