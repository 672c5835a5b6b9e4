"""The fused head against whole logits and, where it is installed, TRL's kernel.

    python benchmarks/head.py [--rows 192] [--vocabulary 262144] [--hidden 640] [--dtype bfloat16] [--rounds 9]

One summed negative log-likelihood, forward and backward, over the same hidden rows. Every round times each contender
once, in turn, between two runs of one fixed matrix product; a round in which that product is more than 15 % off the
best is thrown away. Printed: median and best seconds, GFLOP/s of the products the loss needs (6 V H a row, 4 with the
head frozen) at the median, the fraction of the best rate at which those very products run alone, and the peak memory of
one step in a process of its own beyond what the inputs take. First every contender's loss and gradients are compared
with those of whole logits.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from burnish.maths.head import head_flops, head_loss
from burnish.maths.logprobs import weighted_nll

Loss = Callable[[Tensor], Tensor]


def contenders(weight: Tensor, label: Tensor) -> dict[str, Loss]:
    ones = torch.ones(len(label))

    def burnish(hidden: Tensor) -> Tensor:
        return head_loss(hidden, weight, label, weighted_nll(ones))[0]

    def whole(hidden: Tensor) -> Tensor:
        return cross_entropy(linear(hidden, weight).float(), label, reduction="sum")

    found: dict[str, Loss] = {"burnish": burnish, "whole logits": whole}
    try:
        from trl.kernels import ChunkedLogProbFunction  # pyright: ignore[reportMissingImports]
    except ImportError:
        return found

    def trl(hidden: Tensor) -> Tensor:
        return -ChunkedLogProbFunction.apply(hidden, weight, None, label, 1.0, 32768, None, 1.0, ("log_probs",))[
            0
        ].sum()

    return {**found, "TRL": trl}


def inputs(given: argparse.Namespace, trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    dtype = getattr(torch, given.dtype)
    weight = torch.empty(given.vocabulary, given.hidden, dtype=dtype)
    for block in weight.split(4096):  # no fp32 copy of it in this process's peak
        block.copy_(torch.randn(block.shape, generator=g) * 0.02)
    hidden = torch.randn(given.rows, given.hidden, generator=g).to(dtype)
    return hidden, weight.requires_grad_(trained), torch.randint(0, given.vocabulary, (given.rows,), generator=g)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def products(hidden: Tensor, weight: Tensor, trained: bool) -> Callable[[], None]:
    """The matrix products of the loss alone, into memory that is already there."""
    z, d_hidden = weight.new_empty(len(hidden), len(weight)), torch.empty_like(hidden)
    d_weight = torch.empty_like(weight) if trained else None

    def run() -> None:
        with torch.no_grad():
            torch.mm(hidden, weight.t(), out=z)
            torch.mm(z, weight, out=d_hidden)
            if d_weight is not None:
                torch.mm(z.t(), hidden, out=d_weight)

    return run


def measure(given: argparse.Namespace, trained: bool) -> None:
    hidden, weight, label = inputs(given, trained)
    losses = contenders(weight, label)
    useful = head_flops(given.rows, given.vocabulary, given.hidden, weight_trained=trained, backward=True)

    def step(loss: Loss) -> tuple[Tensor, Tensor, Tensor | None]:
        weight.grad = None
        rows = hidden.clone().requires_grad_()
        value = loss(rows)
        value.backward()
        assert rows.grad is not None
        return value.detach().float(), rows.grad, weight.grad

    def off(found: Tensor | None, wanted: Tensor | None) -> str:
        if found is None or wanted is None:
            return "-"
        return f"{float((found.float() - wanted.float()).norm() / wanted.float().norm()):.0e}"

    wanted = step(losses["whole logits"])
    equality = {name: [off(a, b) for a, b in zip(step(loss), wanted)] for name, loss in losses.items()}
    del wanted
    limit, square = products(hidden, weight, trained), torch.randn(1024, 1024)
    rounds: list[tuple[float, dict[str, float]]] = []
    for _ in range(given.rounds):
        before = seconds(lambda: square @ square)
        times = {name: seconds(lambda loss=loss: step(loss)) for name, loss in losses.items()}
        times["products alone"] = seconds(limit)
        rounds.append((max(before, seconds(lambda: square @ square)), times))
    best = min(gemm for gemm, _ in rounds)
    kept = [times for gemm, times in rounds if gemm <= 1.15 * best]
    floor = min(times["products alone"] for times in kept)
    print(
        f"\n{given.rows} rows, vocabulary {given.vocabulary}, hidden {given.hidden}, {given.dtype}, "
        f"{'trained' if trained else 'frozen'} head; {len(rounds) - len(kept)} of {len(rounds)} rounds discarded"
    )
    columns = f"{'median s':>10}{'best s':>9}{'GFLOP/s':>9}{'of limit':>10}{'burnish is':>12}{'peak MB':>9}"
    print(f"{'':<16}{columns}   off whole logits by (loss, dH, dW)")
    ours = statistics.median(t["burnish"] for t in kept)
    for name in kept[0]:
        median, least = statistics.median(t[name] for t in kept), min(t[name] for t in kept)
        memory = "" if name not in losses else f"{peak(given, trained, name):.0f}"
        print(
            f"{name:<16}{median:>10.3f}{least:>9.3f}{useful / median / 1e9:>9.0f}{floor / median:>10.2f}"
            f"{median / ours:>11.2f}x{memory:>9}   {' '.join(equality.get(name, []))}",
            flush=True,
        )


def peak(given: argparse.Namespace, trained: bool, name: str) -> float:
    """MB of a process's high-water mark beyond its inputs, one step."""
    arguments = [f"--{key}={getattr(given, key)}" for key in ("rows", "vocabulary", "hidden", "dtype", "threads")]
    command = [sys.executable, __file__, *arguments, f"--peak-of={name}", *(["--frozen"] if not trained else [])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def high_water() -> int:
    """Bytes of resident memory this process has had at most (Linux; getrusage would count the parent's)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def report_peak(given: argparse.Namespace) -> None:
    hidden, weight, label = inputs(given, not given.frozen)
    loss = contenders(weight, label)[given.peak_of]
    small = torch.zeros(64, 8, dtype=weight.dtype).requires_grad_()
    (small @ small.t()).sum().backward()  # libraries load their threads and tables
    before = high_water()
    loss(hidden.requires_grad_()).backward()
    print((high_water() - before) / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--frozen", action="store_true", help="only with the head frozen")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak_of:
        report_peak(given)
        return
    for trained in (False,) if given.frozen else (True, False):
        measure(given, trained)


if __name__ == "__main__":
    main()
