"""Forest attention alone, forward and backward, against the same sequences as padded rows.

    python benchmarks/ours/forest_blocks.py [--dtype float32] [--heads 4,1,256] [--depth 1] [--prompt 256] [--group 8]
                                            [--rounds 5] [--before FOLDER] [--body]

Each round times every contender once, in turn, between two runs of one fixed matrix product; a round in which that
product is more than 15 % off the best is thrown away. One thread, processor time, medians. `padded` is the stock
causal kernel over rows padded to the longest (no mask: nothing causal sees the padding on its right), `masked` what
transformers asks for when lengths differ: a boolean mask and expanded keys. `--before FOLDER` adds the forest of
another checkout's `src` as a contender of the same rounds. `tokens` is the ratio of padded positions to stream tokens,
`pairs` that of (query, key) pairs; `share` is speed-up over `padded` divided by `tokens`. With `--body`, two decoder
layers with random weights: hidden size query heads times width, at most 1024, and four times that in the middle.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from burnish.forest.attention import Forest, register
from burnish.forest.padded import padded_hidden
from burnish.forest.stream import Layout, Stream

HEADS = ["4,1,256", "8,8,64", "16,4,128"]


def tree(prompt: int, group: int, depth: int, low: int, high: int, seed: int = 0) -> Layout:
    """`group` leaves of low to high tokens below `depth - 1` levels of two inner segments of 64 below the prompt."""
    draw = random.Random(seed)
    length, parent, level = [prompt], [-1], 1

    def below(node: int, leaves: int, level: int) -> None:
        if level == depth:
            for _ in range(leaves):
                length.append(draw.randint(low, high))
                parent.append(node)
            return
        for part in (leaves - leaves // 2, leaves // 2):
            length.append(64)
            parent.append(node)
            below(len(length) - 1, part, level + 1)

    below(0, group, level)
    return Layout(tuple(length), tuple(parent))


def other(folder: Path) -> ModuleType:
    """The attention module of another checkout's `src`, beside this one's."""
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "burnish"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        found = importlib.import_module("burnish.forest.attention")
        assert str(folder) in str(found.__file__), found.__file__
        return found
    finally:
        sys.path.remove(str(folder))
        for name in [n for n in sys.modules if n.split(".")[0] == "burnish"]:
            del sys.modules[name]
        sys.modules.update(ours)


def attention(
    layout: Layout, dtype: torch.dtype, heads: tuple[int, int, int], before: ModuleType | None
) -> dict[str, Callable[[], object]]:
    h, hk, d = heads
    paths = [layout.rows(leaf) for leaf in layout.leaves]
    ends = torch.tensor([len(p) for p in paths])
    width = int(ends.max())

    def inputs(batch: int, rows: int) -> tuple[Tensor, ...]:
        made = [torch.randn(batch, rows, n, d, dtype=dtype).transpose(1, 2) for n in (h, hk, hk)]
        return *(x.requires_grad_() for x in made), torch.randn(batch, rows, h, d, dtype=dtype).transpose(1, 2)

    q, k, v, dout = inputs(1, layout.size)
    pq, pk, pv, pdout = inputs(len(paths), width)
    at = torch.arange(width)
    mask = (at[:, None] >= at)[None, None] & (at < ends[:, None])[:, None, None]

    def forest(plan: Any) -> Callable[[], object]:
        return lambda: plan(0, q, k, v, d**-0.5, None, None, None).backward(dout)

    def padded() -> None:
        scaled_dot_product_attention(pq, pk, pv, is_causal=True, scale=d**-0.5, enable_gqa=h != hk).backward(pdout)

    def masked() -> None:
        x, y = (t.repeat_interleave(h // hk, 1) for t in (pk, pv))
        scaled_dot_product_attention(pq, x, y, mask, scale=d**-0.5).backward(pdout)

    found: dict[str, Callable[[], object]] = {"forest": forest(Forest(layout)), "padded": padded, "masked": masked}
    if before is not None:
        found["before"] = forest(before.Forest(layout))
    return found


def body(
    layout: Layout, dtype: torch.dtype, heads: tuple[int, int, int], before: ModuleType | None
) -> dict[str, Callable[[], object]]:
    from transformers import AutoModelForCausalLM, LlamaConfig

    h, hk, d = heads
    hidden = min(1024, h * d)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=512, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=2,
            num_attention_heads=h, num_key_value_heads=hk, head_dim=d, max_position_embeddings=4096,
        ),
        attn_implementation="sdpa",
    ).to(dtype).eval()  # fmt: skip
    inner = model.get_decoder()
    tokens = torch.randint(3, 512, (layout.size,))
    given = {"input_ids": tokens[None], "position_ids": layout.position[None], "use_cache": False}

    def forest(plan: Any) -> Callable[[], object]:
        def work() -> None:
            model.set_attn_implementation(register())
            inner(**given, plan=plan).last_hidden_state.sum().backward()

        return work

    def padded() -> None:
        model.set_attn_implementation("sdpa")
        padded_hidden(inner, Stream(tokens, layout), token_budget=10**6).sum().backward()

    found: dict[str, Callable[[], object]] = {"forest": forest(Forest(layout)), "padded": padded}
    if before is not None:
        found["before"] = forest(before.Forest(layout))
    return found


def measure(contenders: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, float], int]:
    a = torch.randn(768, 768)

    def seconds(work: Callable[[], object]) -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    repeat = {name: max(1, int(0.02 / max(min(seconds(w), seconds(w)), 1e-5))) for name, w in contenders.items()}

    def mean(name: str) -> float:
        begin = time.process_time()
        for _ in range(repeat[name]):
            contenders[name]()
        return (time.process_time() - begin) / repeat[name]

    taken: list[tuple[float, dict[str, float]]] = []
    for _ in range(rounds):
        first = seconds(lambda: a @ a)
        times = {name: mean(name) for name in contenders}
        taken.append((max(first, seconds(lambda: a @ a)), times))
    best = min(gemm for gemm, _ in taken)
    kept = [times for gemm, times in taken if gemm <= 1.15 * best] or [times for _, times in taken]
    return {name: statistics.median(t[name] for t in kept) for name in contenders}, rounds - len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--heads", action="append", help="query heads, key-value heads, width")
    parser.add_argument("--depth", action="append", type=int)
    parser.add_argument("--prompt", action="append", type=int)
    parser.add_argument("--group", action="append", type=int)
    parser.add_argument("--low", type=int, default=32)
    parser.add_argument("--high", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--body", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    before = other(given.before) if given.before else None
    grid = itertools.product(
        given.dtype or ["float32", "bfloat16"], given.heads or HEADS, given.depth or [1, 2, 3],
        given.prompt or [32, 256, 2048], given.group or [4, 16],
    )  # fmt: skip
    print(f"{'body' if given.body else 'attention'}, one thread, milliseconds forward and backward")
    print("dtype    heads      d    P   G   forest   before   padded   masked  tokens  pairs  speed-up  share  dropped")
    for dtype, heads, depth, prompt, group in grid:
        layout = tree(prompt, group, depth, given.low, given.high)
        h, hk, d = map(int, heads.split(","))
        make = body if given.body else attention
        ms, dropped = measure(make(layout, getattr(torch, dtype), (h, hk, d), before), given.rounds)
        ends = [len(layout.rows(leaf)) for leaf in layout.leaves]
        tokens = max(ends) * len(ends) / layout.size
        reach = torch.tensor(layout.length) * torch.tensor(layout.first_position)
        own = sum(n * (n + 1) // 2 for n in layout.length) + int(reach.sum())
        pairs = len(ends) * max(ends) * (max(ends) + 1) / 2 / own
        cells = "".join(f"{ms[n] * 1e3:9.2f}" if n in ms else f"{'':>9}" for n in ("forest", "before", "padded", "masked"))
        gain = ms["padded"] / ms["forest"]
        print(
            f"{dtype:<9}{heads:<9}{depth:>3}{prompt:>5}{group:>4}{cells}{tokens:8.2f}{pairs:7.2f}{gain:10.2f}"
            f"{gain / tokens:7.2f}{dropped:9}",
            flush=True,
        )


if __name__ == "__main__":
    main()
