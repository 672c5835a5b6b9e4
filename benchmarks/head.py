"""B11: the head, forward and backward, of N rows over V tokens, 640 wide, bf16: trained weight and frozen.

Each block is one step of TRL's kernel, one of whole logits and one of burnish on the same seeded rows. Where a step is long
there is one block (the table says so). Memory is the high-water mark of a step beyond its inputs and its gradients.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from benchmarks.harness import (
    Answer,
    Case,
    Child,
    Criterion,
    NotMeasured,
    Session,
    agree,
    at_least,
    at_most,
    compare,
    efficiency,
    forgiven,
)
from benchmarks.machine import available_bytes

HIDDEN = 640
ROWS, VOCABULARIES = (64, 512, 4096), (32_000, 152_000, 262_144)
PEERS = {"trl": "TRL's kernel", "whole logits": "whole logits"}
LONG = 3e11  # N V H: more than this and one block is enough
TOLERANCE = {"loss": 0.005, "d_hidden": 0.02, "d_weight": 0.02}


def run(session: Session) -> Iterator[Case]:
    sizes = [(n, v) for v in VOCABULARIES for n in ROWS]
    hidden = HIDDEN
    if session.smoke:
        sizes, hidden = [(8, 256), (16, 512)], 32
    dtype = max(session.calibration.peak_gflops, key=lambda k: session.calibration.peak_gflops[k])
    for peer in PEERS:
        with session.pair((peer, "peers", "benchmarks.peers.head"), ("burnish", "burnish", "benchmarks.ours.head")) as both:
            for n, v in sizes:
                for trained in (True, False):
                    yield one(session, both, peer, n, v, hidden, dtype, trained)


def one(session: Session, both: Callable[[], tuple[Child, Child]], peer: str, n: int, v: int, hidden: int, dtype: str, trained: bool) -> Case:
    case: Case = {
        "case": f"N {n}, V {v}, {'full' if trained else 'frozen'}, {PEERS[peer]}", "peer": peer, "rows": n, "vocabulary": v,
        "trained": trained, "work": "rows",
    }  # fmt: skip
    with forgiven(case, session.say):
        if peer == "whole logits" and (need := 14 * n * v) > (free := 0.8 * available_bytes()):
            case["too_large"] = True
            raise NotMeasured(f"whole logits and their gradients need about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
        order = {"rows": n, "vocabulary": v, "hidden": hidden, "dtype": dtype, "trained": trained}
        theirs, ours = both()
        session.prepare(theirs, system=peer, **order)
        session.prepare(ours, system="burnish", **order)
        long = n * v * hidden > LONG
        first: dict[str, Answer] = {} if long else {"theirs": theirs.ask("step"), "ours": ours.ask("step")}
        measured = session.run({"theirs": lambda _: theirs.ask("step"), "ours": lambda _: ours.ask("step")}, wanted=1 if long else None)
        case |= compare(measured, "ours", "theirs", "rows")
        flops = (6 if trained else 4) * n * v * hidden
        seconds = case["seconds"]["ours"]
        case |= efficiency([flops] * len(seconds), [flops] * len(seconds), seconds, [session.calibration.seconds(flops, 0, dtype)] * len(seconds))
        extra = {s: statistics.median(measured.all(s, "extra_bytes")) for s in ("ours", "theirs")}
        case |= {"extra_bytes": extra, "memory_ratio": extra["ours"] / max(extra["theirs"], 1), "warmup_s": {s: a["seconds"] for s, a in first.items()}}
        mine, other = (measured.kept[0].answers[s] for s in ("ours", "theirs"))
        case["checks"] = [agree(k, mine[k], other[k], t) for k, t in TOLERANCE.items() if mine[k] is not None]
    return case


def criteria(cases: Sequence[Case]) -> list[Criterion]:
    """Targets are held against the median over sizes, floors against the worst size."""
    found: list[Criterion] = []
    for trained, target, floor in ((True, 2.5, 2.0), (False, 3.5, 3.0)):
        name = "full" if trained else "frozen"
        of = [c for c in cases if c["peer"] == "trl" and c["trained"] == trained]
        found.append(at_least("B11", f"target, {name}, TRL's kernel, the median size", target, middle(of)))
        found.append(at_least("B11", f"floor, {name}, TRL's kernel, every size", floor, of))
    whole = [c for c in cases if c["peer"] == "whole logits" and "too_large" not in c]
    found.append(at_least("B11", "floor, whole logits, every size that fits", 0.9, whole))
    large = [c for c in whole if c["rows"] == max(ROWS)]
    found.append(at_most("B11", "memory of a step, of whole logits, the most rows", 0.1, large, "memory_ratio"))
    return found


def middle(cases: Sequence[Case]) -> list[Case]:
    """The case of median ratio; a case that was not measured stands for all."""
    gaps = [c for c in cases if "ratio" not in c]
    return gaps[:1] or sorted(cases, key=lambda c: c["ratio"])[(len(cases) - 1) // 2 :][:1]
