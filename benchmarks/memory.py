"""B13: peak memory of a step in a fresh process, and the longest sequence that one step takes within a limit.

Peak memory is the kernel's high-water mark of everything since the process began: imports, loading, one step. The longest
sequence is searched in a process whose weights and optimiser are already there: each probe is one step on one sequence,
half prompt, and its own high-water mark. burnish is told the limit (`train.memory_bytes`) and plans for it; TRL has no such setting and runs at its
defaults, which recompute layers in the backward. TRL's longest is found by bisection; burnish is asked for multiples of it (3, then
on while probes are short, or 2 where 3 is refused), so that its figure is a step that was run, and a lower bound.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from benchmarks import rows as data
from benchmarks.harness import Answer, Case, Child, Criterion, Session, agree, at_least, at_most, forgiven
from benchmarks.sft import BATCH_ROWS, LOSS_TOLERANCE, default_rows, vocabulary_of

LIMIT_GB = {"full": 16.0, "lora": 4.0}
MOST_S = 60.0  # no probe is made that is expected to take longer
CLOSE = 0.06  # bisection ends when the bracket is this narrow


def longest(
    probe: Callable[[int], tuple[float, float]], limit_bytes: float, first: int, most: int, *, most_s: float = MOST_S
) -> Case:
    """The most tokens whose `probe(tokens) -> (peak bytes, seconds)` stays within the limit, by bisection.

    Lengths double until one does not fit, then the bracket is halved until it is narrow. A probe that is expected to take
    longer than `most_s` (as the last one per token, squared growth not counted), or longer than `most` tokens, is not
    made: then the answer is the line through the two longest probes, and `how` says so ("extrapolated"). Memory that grows
    faster than a line makes that an upper bound.
    """
    seen: dict[int, float] = {}
    low, high, tokens = 0, 0, first
    while True:
        peak, seconds = probe(tokens)
        seen[tokens] = peak
        if peak <= limit_bytes:
            low = tokens
        else:
            high = tokens
        if high and high - low <= max(1, CLOSE * high):
            return {"tokens": low, "how": "measured", "probes": seen}
        following = (low + high) // 2 if high else 2 * tokens
        if following < 1:
            return {"tokens": low, "how": "measured", "probes": seen}
        if not high and (following > most or seconds * following / tokens > most_s):
            break
        tokens = following
    if len(seen) < 2:
        return {"tokens": low, "how": "at least", "probes": seen}
    a, b = sorted(seen)[-2:]
    slope = (seen[b] - seen[a]) / (b - a)
    if slope <= 0:
        return {"tokens": low, "how": "at least", "probes": seen}
    return {"tokens": int(b + (limit_bytes - seen[b]) / slope), "how": "extrapolated", "probes": seen}


def multiples(probe: Callable[[int], tuple[float, float]], limit_bytes: float, theirs: int, *, most_s: float = MOST_S) -> Case:
    """The largest of 3, 6, 12, ... times `theirs` that stays within the limit, or 2 or 1 times where 3 does not; 0 where none does.

    Upwards only while a probe twice as long is expected to take less than `most_s`."""
    seen: dict[int, float] = {}
    best, factors = 0, [3, 2, 1]
    while factors:
        factor = factors.pop(0)
        peak, seconds = probe(factor * theirs)
        seen[factor * theirs] = peak
        if peak <= limit_bytes:
            best = factor
            factors = [2 * factor] if factor >= 3 and 2 * seconds <= most_s else []
        elif factor > 3:
            break
    return {"tokens": best * theirs, "how": f"{best} times, which ran", "probes": seen}


def run(session: Session) -> Iterator[Case]:
    vocabulary = vocabulary_of(session.model)
    rows = default_rows(session, vocabulary)[:BATCH_ROWS]
    file = data.write(session.scratch / "rows13.jsonl", rows)
    for mode in ("full", "lora"):
        case: Case = {"case": f"{mode}, one step of the first {BATCH_ROWS} rows", "kind": "peak", "mode": mode}
        with forgiven(case, session.say):
            peaks, losses = {}, {}
            for system, answers in (("theirs", fresh_trl(session, mode, file)), ("ours", fresh_ours(session, mode, rows))):
                ready, step = answers
                peaks[system], losses[system] = max(ready["peak_bytes"], step["peak_step_bytes"]), step["loss"]
            case |= {
                "peak_bytes": peaks, "peak_ratio": peaks["ours"] / peaks["theirs"],
                "checks": [agree("first loss", losses["ours"], losses["theirs"], LOSS_TOLERANCE)],
            }  # fmt: skip
        yield case
    for mode in ("lora", "full"):
        yield longest_case(session, mode, vocabulary, file)


def fresh_trl(session: Session, mode: str, file: object) -> tuple[Answer, Answer]:
    with session.child("trl", "peers", "benchmarks.peers.trl_sft") as peer:
        return prepare_trl(session, peer, mode, file), peer.ask("step")


def prepare_trl(session: Session, peer: Child, mode: str, file: object) -> Answer:
    return session.prepare(
        peer, model=str(session.model), rows=str(file), mode=mode, setting="default", batch_rows=BATCH_ROWS, order="sequential"
    )


def fresh_ours(session: Session, mode: str, rows: Sequence[data.Row]) -> tuple[Answer, Answer]:
    with session.child("burnish", "burnish", "benchmarks.ours.sft") as ours:
        return session.prepare(ours, model=str(session.model), mode=mode), ours.ask("step", rows=list(rows))


def longest_case(session: Session, mode: str, vocabulary: int, file: object) -> Case:
    limit = LIMIT_GB[mode] * 1e9
    case: Case = {"case": f"{mode}, longest sequence of a step within {LIMIT_GB[mode]:g} GB", "kind": "longest", "mode": mode}
    first, most = (16, 64) if session.smoke else (256, 32_768)
    found: dict[str, Case] = {}
    losses: dict[str, float] = {}
    with forgiven(case, session.say):
        for system in ("theirs", "ours"):
            name, where, module = ("trl", "peers", "benchmarks.peers.trl_sft") if system == "theirs" else ("burnish", "burnish", "benchmarks.ours.sft")
            with session.child(name, where, module) as child:
                if system == "theirs":
                    prepare_trl(session, child, mode, file)
                else:
                    session.prepare(child, model=str(session.model), mode=mode)

                def step(tokens: int, child: Child = child, system: str = system) -> Answer:
                    rows = [data.row(random.Random(3), tokens, vocabulary, 0.5)]
                    done = child.ask("step", given=rows) if system == "theirs" else child.ask("step", rows=rows, limit=limit)
                    if "refused" in done:  # burnish says so beforehand: it does not fit
                        done |= {"peak_step_bytes": float("inf"), "loss": float("nan")}
                    session.say(f"    {mode}, {system}: {tokens} tokens, {done['peak_step_bytes'] / 1e9:.2f} GB, {done['seconds']:.1f} s")
                    return done

                def probe(tokens: int, step: Callable[[int], Answer] = step) -> tuple[float, float]:
                    done = step(tokens)
                    return done["peak_step_bytes"], done["seconds"]

                losses[system] = step(first)["loss"]  # the optimiser's state is made by the first step
                found[system] = longest(probe, limit, first, most) if system == "theirs" else multiples(probe, limit, max(1, found["theirs"]["tokens"]))
        case |= {"tokens": {s: f["tokens"] for s, f in found.items()}, "how": {s: f["how"] for s, f in found.items()},
                 "probes": {s: {n: b if b < float("inf") else "refused" for n, b in f["probes"].items()} for s, f in found.items()}, "limit_gb": LIMIT_GB[mode]}  # fmt: skip
        if "at least" in case["how"].values():
            case["not_measured"] = f"no line through one probe: {case['how']}"
        elif case["tokens"]["theirs"] > 0:
            case["ratio"] = case["tokens"]["ours"] / case["tokens"]["theirs"]
        else:
            case["not_measured"] = f"TRL does not fit one token into {LIMIT_GB[mode]:g} GB"
        case["checks"] = [agree("first loss", losses["ours"], losses["theirs"], LOSS_TOLERANCE)]
    return case


def criteria(cases: Sequence[Case]) -> list[Criterion]:
    def of(kind: str, mode: str) -> list[Case]:
        return [c for c in cases if c["kind"] == kind and c["mode"] == mode]

    return [
        at_most("B13", "peak of a fresh process, full, of TRL's defaults", 0.7, of("peak", "full"), "peak_ratio"),
        at_most("B13", "peak of a fresh process, LoRA, of TRL's defaults", 0.6, of("peak", "lora"), "peak_ratio"),
        *(
            at_least("B13", f"{kind}, longest sequence, {mode} in {LIMIT_GB[mode]:g} GB", wanted, of("longest", mode))
            for mode in ("lora", "full")
            for kind, wanted in (("target", 3), ("floor", 2))
        ),
    ]
