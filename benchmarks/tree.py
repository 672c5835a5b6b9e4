"""B12: a body's forward and backward over trees of depth 1 to 3: forest attention beside a dense mask and padded rows.

The token ratio is the positions a peer computes over the tree's distinct tokens: padded rows repeat every shared segment
and fill up to the longest row, a dense mask repeats nothing (ratio 1) but scores every pair. `of the ratio` is the speed-up
over the token ratio: 1 where each distinct token costs what a padded position costs.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence

from benchmarks.harness import Case, Child, Criterion, Session, agree, at_least, compare, efficiency, forgiven

PEERS = ("padded rows", "dense mask")
SIZES = (  # depth, tokens of the root, children of each inner segment
    (1, 32, 8), (1, 128, 16), (1, 512, 4), (1, 512, 16), (1, 2048, 8), (2, 128, 4), (2, 512, 4), (3, 256, 2), (3, 512, 3),
)  # fmt: skip
TOLERANCE = 0.05  # of a gradient norm in bf16; the two are exact in fp64 (tests/forest)


def grow(depth: int, root: int, children: int, least: int, most: int) -> tuple[list[int], list[int]]:
    """Segment lengths and parents in depth-first pre-order: a root, then `children` below every segment above the leaves."""
    dice = random.Random(depth * 1000 + root + children)
    length, parent = [root], [-1]

    def below(top: int, left: int) -> None:
        for _ in range(children if left else 0):
            length.append(dice.randint(least, most))
            parent.append(top)
            below(len(length) - 1, left - 1)

    below(0, depth)
    return length, parent


def run(session: Session) -> Iterator[Case]:
    sizes, span = (((1, 8, 2), (2, 6, 2)), (3, 6)) if session.smoke else (SIZES, (32, 128))
    peaks = session.calibration.peak_gflops
    dtype = max(peaks, key=lambda k: peaks[k])
    for peer in PEERS:
        with session.pair(("torch", "burnish", "benchmarks.peers.tree"), ("burnish", "burnish", "benchmarks.ours.tree")) as both:
            for size in sizes:
                yield one(session, both, peer, size, *grow(*size, *span), dtype)


def one(session: Session, both: Callable[[], tuple[Child, Child]], peer: str, size: tuple[int, int, int], length: list[int], parent: list[int], dtype: str) -> Case:
    case: Case = {
        "case": f"depth {size[0]}, root {size[1]}, {size[2]} children, {peer}", "peer": peer, "tokens": sum(length),
        "segments": len(length), "work": "trees", "dtype": dtype,
    }  # fmt: skip
    order = {"length": length, "parent": parent, "dtype": dtype, "tiny": session.smoke}
    with forgiven(case, session.say):
        theirs, ours = both()
        session.prepare(theirs, system=peer, **order)
        session.prepare(ours, system="forest", **order)
        first = {"theirs": theirs.ask("step"), "ours": ours.ask("step")}
        measured = session.run({"theirs": lambda _: theirs.ask("step"), "ours": lambda _: ours.ask("step")})
        case |= compare(measured, "ours", "theirs", "trees")
        mine = first["ours"]
        n = len(measured.kept)
        least = session.calibration.seconds(mine["useful_flops"], 0, dtype)
        case |= efficiency([mine["useful_flops"]] * n, [mine["executed_flops"]] * n, case["seconds"]["ours"], [least] * n)
        case["token_ratio"] = first["theirs"]["positions"] / mine["positions"]
        case["of_token_ratio"] = case["ratio"] / case["token_ratio"]
        case["extra_bytes"] = {s: statistics.median(measured.all(s, "extra_bytes")) for s in ("ours", "theirs")}
        case["memory_ratio"] = case["extra_bytes"]["ours"] / max(1, case["extra_bytes"]["theirs"])
        case["warmup_s"] = {s: a["seconds"] for s, a in first.items()}
        case["checks"] = [agree("gradient norm", mine["grad_norm"], first["theirs"]["grad_norm"], TOLERANCE)]
    return case


def criteria(cases: Sequence[Case]) -> list[Criterion]:
    return [
        at_least("B12", f"target, speed-up over {peer} by token ratio, every tree", 0.8, [c for c in cases if c["peer"] == peer], "of_token_ratio")
        for peer in PEERS
    ]
