"""One body step over a tree in a child, the same for every system: seeded weights and ids, forward, backward, peak memory.

    {"do": "prepare", "system": NAME, "length": [...], "parent": [...], "dtype": "bfloat16", "tiny": false, "threads": 2}
    {"do": "step"} -> {"seconds": S, "positions": rows of the body, "loss": L, "grad_norm": G, "extra_bytes": B}

The body has four decoder layers of Gemma-3-270M's shape, two of them with its window of 512, and random weights. The loss
is the sum over the tree's distinct rows of a fixed random projection of the hidden row.
"""

from __future__ import annotations

import random
import time
from typing import Any

from benchmarks.protocol import Answer, forget_peak, memory, versions


def random_body(dtype: str, tiny: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    wide = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16} if tiny else {
        "hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "head_dim": 256}  # fmt: skip
    config = Gemma3TextConfig(
        vocab_size=512, **wide, num_hidden_layers=4, num_key_value_heads=1, sliding_window=512,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(getattr(torch, dtype)).eval()
    model.get_input_embeddings().requires_grad_(False)
    return model


class Body:
    """The child's two verbs; a system says how it loads a tree and runs the body."""

    system: str

    def ids(self, n: int) -> list[int]:
        dice = random.Random(4)
        return [dice.randrange(3, 512) for _ in range(n)]

    def load(self, length: list[int], parent: list[int], dtype: str, tiny: bool) -> None:
        raise NotImplementedError

    def forward(self) -> Any:
        """Hidden rows of whatever was computed, [positions, H]."""
        raise NotImplementedError

    def rows(self, hidden: Any) -> Any:
        """Of those, the tree's distinct rows in stream order, [T, H]."""
        raise NotImplementedError

    def said(self) -> dict[str, Any]:
        raise NotImplementedError

    def prepare(self, *, system: str, length: list[int], parent: list[int], dtype: str, tiny: bool, threads: int) -> Answer:
        import torch

        torch.set_num_threads(threads)
        self.system = system
        self.load(length, parent, dtype, tiny)
        g = torch.Generator().manual_seed(5)
        self.project = torch.randn(sum(length), self.model.config.hidden_size, generator=g).to(getattr(torch, dtype))
        return {"versions": versions("torch", "transformers")}

    def step(self) -> Answer:
        self.model.zero_grad(set_to_none=True)
        resident = forget_peak(trim=True)
        begin = time.perf_counter()
        loss = (self.rows(self.forward()) * self.project).float().sum()
        loss.backward()
        seconds = time.perf_counter() - begin
        peak = memory("VmHWM")
        norm = sum(float(p.grad.float().norm()) ** 2 for p in self.model.parameters() if p.grad is not None) ** 0.5
        return {"seconds": seconds, "trees": 1, "loss": float(loss.detach()), "grad_norm": norm, "extra_bytes": peak - resident, **self.said()}
