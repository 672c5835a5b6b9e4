"""burnish's SFT step as a child process, in the protocol of benchmarks/peers/trl_sft.py.

`step` takes "rows": [[i, ...], ...], the row numbers of each step, so that both systems train on the same rows. The step is
train.loop's own `step`: prepare, forward and backward of every micro-batch, clip, fused AdamW.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def peak_bytes() -> int:
    """The most resident memory this process has had (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**values: Any) -> None:
        out.write(json.dumps(values) + "\n")
        out.flush()

    begin = time.perf_counter()
    import torch

    from burnish.core.records import Rendered
    from burnish.data.chat import Prepared
    from burnish.data.sampler import Sampler
    from burnish.methods.supervised import Supervised
    from burnish.models.adapters import lora
    from burnish.models.load import load_policy
    from burnish.train.loop import State, one_step
    from burnish.train.optim import Optimiser
    from burnish.train.schedules import constant

    imported = time.perf_counter() - begin
    torch.set_num_threads(2)
    state = State()
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "stop":
            say(stopped=True, steps=state.step, peak_bytes=peak_bytes())
            return
        if order["do"] == "prepare":
            begin = time.perf_counter()
            policy = load_policy(order["model"], dtype=order.get("dtype", "bfloat16"))
            if order["mode"] == "lora":
                policy.requires_grad_(False)
                policy = lora(policy, rank=16, alpha=32.0)
            with open(order["rows"], encoding="utf-8") as rows:
                data = [json.loads(row) for row in rows]
            rendered = tuple(Rendered(tuple(r["input_ids"]), tuple(map(bool, r["completion_mask"])), str(i)) for i, r in enumerate(data))
            method = Supervised(Prepared(rendered, None, {}, 0, 0, 0), (), Sampler(len(rendered), order["batch_rows"]), 10**6, "token_mean")  # type: ignore[arg-type]
            rate = 2e-5  # TRL's default for both
            optimiser = Optimiser(policy, learning_rate=rate)
            settings: Any = SimpleNamespace(learning_rate=rate, max_skipped_steps=0)
            say(
                ready=True, seconds=time.perf_counter() - begin, import_seconds=imported, peak_bytes=peak_bytes(),
                parameters=policy.shape.parameters, trained=sum(p.numel() for p in policy.trainable().values()),
            )  # fmt: skip
            continue
        begin = time.perf_counter()
        losses, labels, tokens = [], 0, 0
        before = state.ledger.counted.get("train", {}).copy()
        for chosen in order["rows"]:
            work = method.work([rendered[i] for i in chosen])
            row = one_step(policy, method, optimiser, settings, constant, order.get("micro_tokens", 2048), state, work, policy.shape)
            losses.append(row["loss"])
            labels, tokens = labels + row["label_tokens"], tokens + row["stream_tokens"]
        after = state.ledger.counted["train"]
        spent = {k: after[k] - before.get(k, 0) for k in ("useful_flops", "executed_flops")}
        say(
            seconds=time.perf_counter() - begin, loss=losses[-1], losses=losses, grad_norm=row["grad_norm"], loss_tokens=labels,
            tokens=tokens, steps=state.step, peak_bytes=peak_bytes(), **spent,
        )  # fmt: skip


if __name__ == "__main__":
    main()
