"""One head step in a child, the same for every system: seeded inputs, forward, backward, peak memory.

    {"do": "prepare", "system": NAME, "rows": N, "vocabulary": V, "hidden": H, "dtype": "bfloat16", "trained": true, "threads": 2}
    {"do": "step"} -> {"seconds": S, "loss": L, "d_hidden": norm, "d_weight": norm or null, "extra_bytes": B}

`extra_bytes` is the high-water mark of the step beyond what was resident before it and beyond the gradients themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.protocol import Answer, forget_peak, memory, versions

Loss = Callable[[Any, Any, Any], Any]


class Head:
    """The child's two verbs over one of `losses`: (hidden [N, H], weight [V, H], label [N]) -> summed NLL with a graph."""

    def __init__(self, losses: dict[str, Loss]) -> None:
        self.losses = losses

    def prepare(self, *, system: str, rows: int, vocabulary: int, hidden: int, dtype: str, trained: bool, threads: int) -> Answer:
        import torch

        torch.set_num_threads(threads)
        self.loss = self.losses[system]
        g = torch.Generator().manual_seed(0)
        kind = getattr(torch, dtype)
        self.weight = torch.empty(vocabulary, hidden, dtype=kind)
        for block in self.weight.split(4096):  # no fp32 copy of it
            block.copy_(torch.randn(block.shape, generator=g) * 0.02)
        self.weight.requires_grad_(trained)
        self.hidden = torch.randn(rows, hidden, generator=g).to(kind).requires_grad_()
        self.label = torch.randint(0, vocabulary, (rows,), generator=g)
        return {"versions": versions("torch", "trl")}

    def step(self) -> Answer:
        self.weight.grad = self.hidden.grad = None
        resident = forget_peak(trim=True)
        begin = time.perf_counter()
        loss = self.loss(self.hidden, self.weight, self.label)
        loss.backward()
        seconds = time.perf_counter() - begin
        peak = memory("VmHWM")
        grads = [x.grad for x in (self.hidden, self.weight) if x.grad is not None]
        made = sum(g.numel() * g.element_size() for g in grads)
        norms = [float(g.float().norm()) if g.numel() < 2**24 else float(sum(b.float().norm() ** 2 for b in g.split(4096)) ** 0.5) for g in grads]
        return {
            "seconds": seconds, "rows": len(self.label), "loss": float(loss.detach()), "d_hidden": norms[0],
            "d_weight": norms[1] if len(norms) > 1 else None, "extra_bytes": max(0, peak - resident - made),
        }  # fmt: skip
