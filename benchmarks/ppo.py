"""B8: one step of PPO with a value head beside a plain loop over transformers: samples a second, from prompts to update.

32 completions a step: of 8 prompts, 4 each, and of 32 prompts, one each (no prompt is shared: what burnish shares is then
nothing). Prompts of 64 to 128 tokens; every completion has its length beforehand, log-normal with median 32, 2 to 96. The
reward is the share of even ids. All weights are trained. The first, short step of both is on the same completions: its
value loss and gradient norm are the check that they compute the same thing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import rows as data
from benchmarks.harness import Case, Child, Criterion, Session, agree, at_least, compare, efficiency, forgiven
from benchmarks.sft import adam_bytes, vocabulary_of

LEARNING_RATE, KL_COEF, VALUE_COEF, GAMMA, LAM, EPSILON = 1e-5, 0.05, 0.1, 1.0, 0.95, 1e-4
DEFAULT, BEST = "a plain loop", "its best"
PEERS = {DEFAULT: "default", BEST: "best"}
WORKLOADS = {"8 x 4": (8, 4), "32 x 1": (32, 1)}  # prompts, samples of each
MICRO_ROWS = 8
VALUE_TOLERANCE, NORM_TOLERANCE = 0.02, 0.1  # bf16 weights against fp32 weights under autocast


def reward_of(completion: Sequence[int]) -> float:
    """The share of even ids."""
    return sum(i % 2 == 0 for i in completion) / len(completion)


def run(session: Session) -> Iterator[Case]:
    for peer, setting in PEERS.items():
        for name, size in WORKLOADS.items():
            case: Case = {"case": f"{name}, {peer}", "peer": peer, "workload": name, "work": "samples"}
            with forgiven(case, session.say), session.child(peer, "peers", "benchmarks.peers.ppo") as theirs, session.child("burnish", "burnish", "benchmarks.ours.ppo") as ours:
                case |= one(session, setting, size, theirs, ours)
            yield case


def one(session: Session, setting: str, size: tuple[int, int], theirs: Child, ours: Child) -> Case:
    prompts, group = (2, size[1]) if session.smoke else size
    vocabulary = vocabulary_of(session.model)
    lengths: dict[str, Any] = {"median": 4, "most": 8, "prompt": (4, 8)} if session.smoke else {"median": 32, "most": 96, "prompt": (64, 128)}
    work = data.rollouts(prompts, group, vocabulary, **lengths)
    common = {"model": str(session.model), "kl_coef": KL_COEF}
    session.prepare(theirs, setting=setting, micro_rows=MICRO_ROWS, **common)
    mine = session.prepare(ours, group=group, most=lengths["most"], **common)
    dice = random.Random(9)
    short = {"prompts": work["prompts"], "lengths": [min(n, 4) for n in work["lengths"]]}
    given = [data.ids(dice, n, vocabulary) for n in short["lengths"]]
    first = {"theirs": theirs.ask("step", given=given, **short), "ours": ours.ask("step", given=given, **short)}
    checks = [
        agree(f"first {what.replace('_', ' ')}", first["ours"][what], first["theirs"][what], tolerance)
        for what, tolerance in (("value_loss", VALUE_TOLERANCE), ("grad_norm", NORM_TOLERANCE))
    ]
    measured = session.run({"theirs": lambda _: theirs.ask("step", **work), "ours": lambda _: ours.ask("step", **work)})
    case = compare(measured, "ours", "theirs", "samples")
    wrong = {s: sum(a != b for a, b in zip(measured.kept[0].answers[s]["lengths"], work["lengths"])) for s in ("ours", "theirs")}
    checks += [agree(f"rows of another length, {s}", float(n), 0.0, 0.0) for s, n in wrong.items()]
    steps = [b.answers["ours"] for b in measured.kept]
    adam = adam_bytes(mine)
    least = [session.calibration.seconds(s["useful_flops"], adam, mine["dtype"]) for s in steps]
    case |= efficiency([s["useful_flops"] for s in steps], [s["executed_flops"] for s in steps], case["seconds"]["ours"], least)
    return case | {
        "checks": checks, "warmup_s": {s: a["seconds"] for s, a in first.items()}, "samples": len(work["lengths"]),
        "tokens": sum(work["lengths"]), "plan": steps[-1]["plan"],
    }  # fmt: skip


def criteria(cases: Sequence[Case]) -> list[Criterion]:
    def of(peer: str) -> list[Case]:
        return [c for c in cases if c["peer"] == peer]

    return [
        at_least("B8", "target, PPO against a plain loop", 4, of(DEFAULT)),
        at_least("B8", "floor, PPO against its best", 2.5, of(BEST)),
    ]
