"""Forest attention against one dense mask and against padded rows, on this machine's CPU.

    python benchmarks/forest_attention.py [--rounds 7] [--threads 2] [--dtype float32] [--only attention|body] [--workload TEXT]

Each round times every contender once, in turn, between two runs of one fixed matrix product; a round in which that
product is more than 15 % off the best is thrown away. With one thread, processor time is measured and not wall time,
which a busy machine disturbs less. Printed: medians in milliseconds, forward and backward together,
and how many times slower than the forest the others are. `attention`: one layer. `body`: four decoder layers of the
shape of Gemma-3-270M with random weights, where a repeated prompt costs everything else too.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from burnish.forest.attention import Forest, register, visible
from burnish.forest.padded import padded_hidden, padded_positions
from burnish.forest.stream import Layout, Stream


def workloads() -> dict[str, Layout]:
    rng = random.Random(0)

    def lengths(n: int, low: int, high: int) -> list[int]:
        return [min(high, max(low, int(rng.lognormvariate(4.8, 0.6)))) for _ in range(n)]

    def trees(count: int, root: int, children: int, low: int, high: int) -> Layout:
        length: list[int] = []
        parent: list[int] = []
        for _ in range(count):
            top = len(length)
            length += [root, *lengths(children, low, high)]
            parent += [-1, *[top] * children]
        return Layout(tuple(length), tuple(parent))

    rows = lengths(30, 40, 512)
    deep = [300, 80, *[60] * 4, 80, *[60] * 4]
    return {
        "one row of 1,024": Layout((1024,), (-1,)),
        "30 SFT rows": Layout(tuple(rows), (-1,) * 30),
        "64 short SFT rows": Layout(tuple(rng.randint(25, 55) for _ in range(64)), (-1,) * 64),
        "12 pairs": trees(12, 128, 2, 32, 160),
        "group of 16, prompt 256": trees(1, 256, 16, 24, 128),
        "4 groups of 8, prompt 96": trees(4, 96, 8, 24, 128),
        "search tree, depth 2": Layout(tuple(deep), (-1, 0, *[1] * 4, 0, *[6] * 4)),
    }


def padded_shape(layout: Layout) -> tuple[int, int, Tensor]:
    paths = [layout.rows(leaf) for leaf in layout.leaves]
    width = max(map(len, paths))
    return len(paths), width, torch.tensor([len(p) for p in paths])


def attention_contenders(
    layout: Layout, dtype: torch.dtype, heads: tuple[int, int, int]
) -> dict[str, Callable[[], None]]:
    h, hk, d = heads
    plan = Forest(layout)

    def inputs(batch: int, rows: int) -> tuple[Tensor, ...]:
        made = [torch.randn(batch, rows, n, d, dtype=dtype).transpose(1, 2) for n in (h, hk, hk)]
        return *(x.requires_grad_() for x in made), torch.randn(batch, rows, h, d, dtype=dtype).transpose(1, 2)

    q, k, v, dout = inputs(1, layout.size)
    mask = visible(layout)
    count, width, ends = padded_shape(layout)
    pq, pk, pv, pdout = inputs(count, width)
    at = torch.arange(width)
    causal = (at[:, None] >= at)[None, None] & (at < ends[:, None])[:, None, None]

    def forest() -> None:
        plan(0, q, k, v, d**-0.5, None, None, None).backward(dout)

    def dense() -> None:
        scaled_dot_product_attention(q, k, v, mask, scale=d**-0.5, enable_gqa=True).backward(dout)

    def padded() -> None:
        scaled_dot_product_attention(pq, pk, pv, causal, scale=d**-0.5, enable_gqa=True).backward(pdout)

    return {"forest": forest, "dense mask": dense, "padded": padded}


def body_contenders(layout: Layout, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    body = model.get_decoder()
    tokens = torch.randint(3, 512, (layout.size,))
    stream, plan = Stream(tokens, layout), Forest(layout)
    seen = {kind: visible(layout, w)[None, None] for kind, w in (("full_attention", None), ("sliding_attention", 512))}

    def forest() -> None:
        model.set_attn_implementation(register())
        position = layout.position[None]
        body(
            input_ids=tokens[None], position_ids=position, plan=plan, use_cache=False
        ).last_hidden_state.sum().backward()

    def dense() -> None:
        model.set_attn_implementation("sdpa")
        given = {"input_ids": tokens[None], "position_ids": layout.position[None], "attention_mask": seen}
        body(**given, use_cache=False).last_hidden_state.sum().backward()

    def padded() -> None:
        model.set_attn_implementation("sdpa")
        padded_hidden(body, stream).sum().backward()

    return {"forest": forest, "dense mask": dense, "padded": padded}


def measure(contenders: dict[str, Callable[[], None]], rounds: int) -> tuple[dict[str, float], int]:
    a = torch.randn(1024, 1024)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(work: Callable[[], object]) -> float:
        begin = clock()
        work()
        return clock() - begin

    for work in contenders.values():
        work()
    taken: list[tuple[float, dict[str, float]]] = []
    for _ in range(rounds):
        before = seconds(lambda: a @ a)
        times = {name: seconds(work) for name, work in contenders.items()}
        taken.append((max(before, seconds(lambda: a @ a)), times))
    best = min(gemm for gemm, _ in taken)
    kept = [times for gemm, times in taken if gemm <= 1.15 * best] or [times for _, times in taken]
    return {name: statistics.median(t[name] for t in kept) for name in contenders}, rounds - len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--heads", default="4,1,256", help="query heads, key-value heads, width (attention only)")
    parser.add_argument("--only", choices=["attention", "body"])
    parser.add_argument("--workload", default="", help="only those whose name contains this")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    h, hk, d = map(int, given.heads.split(","))
    for part in ("attention", "body") if given.only is None else (given.only,):
        print(
            f"{part}, {given.dtype}, {given.threads} threads"
            + (f", heads {given.heads}" if part == "attention" else "")
        )
        print(
            f"{'workload':<26}{'tokens':>7}{'padded':>8}{'forest ms':>11}{'dense mask':>16}{'padded':>16}{'dropped':>9}"
        )
        for name, layout in ((n, x) for n, x in workloads().items() if given.workload in n):
            contenders = (
                body_contenders(layout, dtype) if part == "body" else attention_contenders(layout, dtype, (h, hk, d))
            )
            ms, dropped = measure(contenders, given.rounds)
            ours = ms.pop("forest")
            others = "".join(f"{x * 1e3:>10.1f} {x / ours:4.1f}x" for x in ms.values())
            print(
                f"{name:<26}{layout.size:>7}{padded_positions(layout):>8}{ours * 1e3:>11.1f}{others}{dropped:>9}",
                flush=True,
            )


if __name__ == "__main__":
    main()
