"""B1 to B4: steps of supervised fine-tuning beside TRL's SFTTrainer, on the same rows.

Every comparison begins with one short step of both on the same 8 rows: it warms both up, and its loss (and, where all
weights are trained, its gradient norm) is the check that they compute the same thing. Then each block is one step of TRL
on the next batch of its own loader and one of burnish on those very rows. Batches are made outside the clock by neither.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import rows as data
from benchmarks.harness import Case, Child, Criterion, Session, agree, at_least, at_most, compare, efficiency, forgiven
from benchmarks.rows import Row

BATCH_ROWS = 8
LOSS_TOLERANCE = 0.02  # bf16 weights against fp32 weights under autocast
NORM_TOLERANCE = 0.1
DEFAULTS, BEST = "TRL at its defaults", "TRL at its best"
SETTING = {DEFAULTS: "default", BEST: "best"}
ADAM_BYTES = 28  # 7 x 4: gradient, master and two moments read, the last three written


@dataclass(frozen=True)
class Plan:
    """One comparison: what is trained, on which rows, against which setting of TRL."""

    name: str
    mode: str
    peer: str
    rows: Callable[[int, Sequence[Row]], list[Row]]
    work: str = "loss_tokens"
    packing: int = 0
    small_vocabulary: bool = False

    @property
    def case(self) -> str:
        return f"{self.name}, {'32k vocabulary' if self.small_vocabulary else 'the model'}, {self.peer}"


def vocabulary_of(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def lengths(session: Session) -> dict[str, int]:
    """Sizes of log-normal rows; a smoke run has tiny ones."""
    return {"median": 12, "least": 6, "most": 24} if session.smoke else {"median": 171, "least": 40, "most": 512}


def default_rows(session: Session, vocabulary: int) -> list[Row]:
    """The pool both of TRL's settings draw from: 400 rows, of which its grouping makes 50 batches of like length."""
    return data.varied(400, vocabulary, **lengths(session))


def adam_bytes(ready: dict[str, Any]) -> int:
    return ADAM_BYTES * ready["trained"]


def run(session: Session, plans: Sequence[Plan]) -> Iterator[Case]:
    for plan in plans:
        case: Case = {"case": plan.case, "name": plan.name, "peer": plan.peer, "small_vocabulary": plan.small_vocabulary,
                      "work": plan.work.replace("_", " ")}  # fmt: skip
        with forgiven(case, session.say), session.child("trl", "peers", "benchmarks.peers.trl_sft") as peer, session.child("burnish", "burnish", "benchmarks.ours.sft") as ours:
            case |= one(session, plan, ours, peer)
        yield case


def one(session: Session, plan: Plan, ours: Child, peer: Child) -> Case:
    model = session.small_vocabulary() if plan.small_vocabulary else session.model
    vocabulary = vocabulary_of(model)
    pool = default_rows(session, vocabulary)
    rows = plan.rows(vocabulary, pool)
    file = data.write(session.scratch / "rows.jsonl", rows)
    session.say(f"    {plan.case}: loading")
    theirs_ready = session.prepare(
        peer, model=str(model), rows=str(file), mode=plan.mode, setting=SETTING[plan.peer], batch_rows=BATCH_ROWS,
        packing=plan.packing, order="own" if plan.packing else "sequential",
    )  # fmt: skip
    ours_ready = session.prepare(ours, model=str(model), mode=plan.mode)
    warm = data.short(rows, BATCH_ROWS, 6 if session.smoke else 48)
    first = {"theirs": peer.ask("step", given=warm), "ours": ours.ask("step", rows=warm)}
    checks = [agree("first loss", first["ours"]["loss"], first["theirs"]["loss"], LOSS_TOLERANCE)]
    if plan.mode == "full":
        checks.append(agree("first gradient norm", first["ours"]["grad_norm"], first["theirs"]["grad_norm"], NORM_TOLERANCE))
    measured = session.run(
        {"theirs": lambda _: peer.ask("step"), "ours": lambda seen: ours.ask("step", rows=[rows[i] for i in seen["theirs"]["rows"]])}
    )
    case = compare(measured, "ours", "theirs", plan.work)
    for work in ("tokens", "loss_tokens"):
        checks.append(agree(work.replace("_", " "), sum(measured.all("ours", work)), sum(measured.all("theirs", work)), 0.0))
    steps = [b.answers["ours"] for b in measured.kept]
    adam = adam_bytes(ours_ready)
    least = [session.calibration.seconds(s["useful_flops"], adam, ours_ready["dtype"]) for s in steps]
    case |= efficiency([s["useful_flops"] for s in steps], [s["executed_flops"] for s in steps], case["seconds"]["ours"], least)
    peaks = {s: max(measured.all(s, "peak_step_bytes")) for s in ("ours", "theirs")}
    return case | {
        "checks": checks, "warmup_s": {s: a["seconds"] for s, a in first.items()},
        "prepare_s": {"ours": ours_ready["seconds"], "theirs": theirs_ready["seconds"]},
        "dtype": {"ours": ours_ready["dtype"], "theirs": theirs_ready["dtype"]}, "plan": steps[-1]["plan"],
        "peak_bytes": peaks, "peak_ratio": peaks["ours"] / peaks["theirs"],
        "tokens": measured.all("ours", "tokens"), "loss_tokens": measured.all("ours", "loss_tokens"),
        "positions": {"theirs": measured.all("theirs", "positions")},
        "padding": statistics.median(p / t for p, t in zip(measured.all("theirs", "positions"), measured.all("theirs", "tokens"))),
    }  # fmt: skip


# ---- which rows


def sequential(session: Session) -> Callable[[int, Sequence[Row]], list[Row]]:
    return lambda vocabulary, pool: list(pool[: BATCH_ROWS * session.blocks])


def by_length(session: Session) -> Callable[[int, Sequence[Row]], list[Row]]:
    return lambda vocabulary, pool: data.grouped(pool, BATCH_ROWS, session.blocks)


def mixed(session: Session, mode: str) -> list[Plan]:
    """Log-normal lengths, half prompt: against TRL's defaults, and against its best with rows of like length together."""
    found = [
        Plan(mode, mode, DEFAULTS, sequential(session)),
        Plan(mode, mode, BEST, by_length(session)),
    ]
    return found + [Plan(p.name, p.mode, p.peer, p.rows, small_vocabulary=True) for p in found]


def b1(session: Session) -> Iterator[Case]:
    return run(session, mixed(session, "full"))


def b2(session: Session) -> Iterator[Case]:
    return run(session, mixed(session, "lora"))


def b3(session: Session) -> Iterator[Case]:
    length = 12 if session.smoke else 128

    def level(vocabulary: int, pool: Sequence[Row]) -> list[Row]:
        return data.level(BATCH_ROWS * session.blocks, length, vocabulary)

    return run(session, [Plan("equal lengths", "full", peer, level, work="tokens") for peer in (DEFAULTS, BEST)])


def b4(session: Session) -> Iterator[Case]:
    width = 32 if session.smoke else 512

    def enough(vocabulary: int, pool: Sequence[Row]) -> list[Row]:
        """Rows for as many packed batches as there are blocks, and a little more."""
        wanted, count, total = int(1.1 * BATCH_ROWS * width * session.blocks), 0, 0
        while total < wanted and count < len(pool):
            total += len(pool[count]["input_ids"])
            count += 1
        return list(pool[:count])

    return run(session, [Plan("packed", "full", peer, enough, work="tokens", packing=width) for peer in (DEFAULTS, BEST)])


# ---- what is wanted


def pick(cases: Sequence[Case], peer: str, small: bool = False) -> list[Case]:
    return [c for c in cases if c["peer"] == peer and c["small_vocabulary"] == small]


def b1_criteria(cases: Sequence[Case]) -> list[Criterion]:
    return [
        at_least("B1", "target, full, defaults", 5, pick(cases, DEFAULTS)),
        at_least("B1", "floor, full, best", 3, pick(cases, BEST)),
        at_least("B1", "stretch, full, defaults", 8, pick(cases, DEFAULTS)),
        at_least("B1", "target, 32k vocabulary, defaults", 2.5, pick(cases, DEFAULTS, True)),
        at_least("B1", "floor, 32k vocabulary, best", 1.6, pick(cases, BEST, True)),
    ]


def b2_criteria(cases: Sequence[Case]) -> list[Criterion]:
    return [
        at_least("B2", "target, LoRA, defaults", 5, pick(cases, DEFAULTS)),
        at_least("B2", "floor, LoRA, best", 3, pick(cases, BEST)),
        at_most("B2", "peak memory of a step, LoRA, of TRL's defaults", 0.6, pick(cases, DEFAULTS), "peak_ratio"),
    ]


def b3_criteria(cases: Sequence[Case]) -> list[Criterion]:
    return [
        at_least("B3", "target, equal lengths, checkpointing on", 1.6, pick(cases, DEFAULTS)),
        at_least("B3", "floor, equal lengths, checkpointing off", 1.2, pick(cases, BEST)),
    ]


def b4_criteria(cases: Sequence[Case]) -> list[Criterion]:
    return [
        at_least("B4", "target, packed, defaults", 3, pick(cases, DEFAULTS)),
        at_least("B4", "floor, packed, best", 2, pick(cases, BEST)),
    ]
