"""B7: a GRPO step, end to end: 8 prompts x 8 completions drawn, scored and learned from, beside TRL's GRPOTrainer.

The model: prompts of 128 tokens and completions of at most 128, log-normal lengths (median 52, sigma 0.7). A random model
of 4.7 M parameters: 64, and at most 64 (median 26). Each row has its length beforehand, the same for both systems, each
told by its own means (benchmarks/rollout.py), so that what is drawn differs in its tokens and in nothing else. The reward
(benchmarks/reward.py) is 1 where a completion keeps within a number of tokens between the shortest and the longest of its
group: it can be checked, both systems get the same rewards, and no group is dead, so that nothing is won here by leaving
dead groups out. Both use TRL's default loss (advantages in standard deviations of the group, clip, mean over tokens, no KL).

The checks: loss and, where all weights are trained, gradient norm of a first step on the same given completions; then
mean reward, completion tokens and loss of every block, which do not depend on the tokens drawn (with one step a round the
ratio is 1). The model's cases have one block: a step of the peer takes minutes. *of limit* adds up a round at the best product or reading speed, as B9 does, the products of training, and
AdamW's bytes where all weights are trained.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import rows as data
from benchmarks.harness import Case, Child, Criterion, Measured, Session, agree, at_least, compare, efficiency, forgiven
from benchmarks.rollout import least_seconds
from benchmarks.sft import BEST, DEFAULTS, LOSS_TOLERANCE, NORM_TOLERANCE, adam_bytes, vocabulary_of

PROMPTS, GROUP = 8, 8
CONTINUOUS = "TRL, continuous batching"
SETTING = {DEFAULTS: "default", BEST: "best", CONTINUOUS: "continuous"}
PARTS = ("rollout_s", "scoring_s", "training_s")
BRIEF = 16  # tokens of a prompt and of a completion in the first step
SIZES = {False: {"prompt": 128, "median": 52, "most": 128}, True: {"prompt": 64, "median": 26, "most": 64}}


@dataclass(frozen=True)
class Plan:
    """One comparison: which model, what is trained, against which setting of TRL."""

    mode: str
    peer: str
    small: bool = False

    @property
    def case(self) -> str:
        return f"{self.mode}, {'4.7 M parameters' if self.small else 'the model'}, {self.peer}"


# Continuous batching is measured where it is affordable: it is TRL's slowest path on a CPU.
PLANS = (
    *(Plan(mode, peer) for mode in ("full", "lora") for peer in (DEFAULTS, BEST)),
    *(Plan("full", peer, small=True) for peer in (DEFAULTS, BEST, CONTINUOUS)),
    *(Plan("lora", peer, small=True) for peer in (DEFAULTS, BEST)),
)  # fmt: skip


def run(session: Session) -> Iterator[Case]:
    for plan in PLANS:
        case: Case = {"case": plan.case, "name": plan.mode, "peer": plan.peer, "small": plan.small, "work": "samples"}
        with forgiven(case, session.say), session.child("trl", "peers", "benchmarks.peers.trl_grpo") as peer, session.child("burnish", "burnish", "benchmarks.ours.grpo") as ours:
            case |= one(session, plan, ours, peer)
        yield case


def one(session: Session, plan: Plan, ours: Child, peer: Child) -> Case:
    model = session.small() if plan.small else session.model
    vocabulary = vocabulary_of(model)
    prompts = 2 if session.smoke else PROMPTS
    sizes = {"prompt": 8, "median": 4, "most": 8} if session.smoke else SIZES[plan.small]
    work = data.questions(prompts, GROUP, vocabulary, **sizes)
    session.say(f"    {plan.case}: loading")
    order = {"model": str(model), "mode": plan.mode, "prompts": prompts, "group": GROUP, "most": sizes["most"]}
    ready = {"theirs": session.prepare(peer, setting=SETTING[plan.peer], **order), "ours": session.prepare(ours, **order)}
    first = {s: c.ask("step", **data.brief(work, GROUP, BRIEF, vocabulary)) for s, c in (("theirs", peer), ("ours", ours))}
    turns = {"theirs": lambda _: peer.ask("step", **work), "ours": lambda _: ours.ask("step", **work)}
    measured = session.run(turns, wanted=None if plan.small else 1)
    case = compare(measured, "ours", "theirs", "samples")
    steps = [b.answers["ours"] for b in measured.kept]
    mine, machine = ready["ours"], session.calibration
    adam = adam_bytes(mine)
    least = [
        least_seconds(machine, work["lengths"], s["prefill_tokens"], mine) + machine.seconds(s["train_useful_flops"], adam, mine["dtype"])
        for s in steps
    ]
    case |= efficiency([s["useful_flops"] for s in steps], [s["executed_flops"] for s in steps], case["seconds"]["ours"], least)
    return case | split(measured) | {
        "checks": checks(plan, first, measured), "warmup_s": {s: a["seconds"] for s, a in first.items()},
        "prepare_s": {s: a["seconds"] for s, a in ready.items()}, "dtype": {s: a["dtype"] for s, a in ready.items()},
        "plan": steps[-1]["plan"], "tokens": steps[-1]["tokens"], "positions": {"theirs": measured.kept[-1].answers["theirs"]["positions"]},
        "completion_tokens": sum(work["lengths"]), "sampler_gap": max(measured.all("ours", "sampler_gap")),
        "peak_bytes": {s: max(measured.all(s, "peak_step_bytes")) for s in ("ours", "theirs")},
    }  # fmt: skip


def split(measured: Measured) -> Case:
    """Median seconds of each part of a step, and the ratio of each."""
    parts = {part: {s: statistics.median(measured.all(s, part)) for s in ("ours", "theirs")} for part in PARTS}
    return parts | {"part_ratio": {part: both["theirs"] / max(both["ours"], 1e-9) for part, both in parts.items()}}


def checks(plan: Plan, first: dict[str, dict[str, Any]], measured: Measured) -> list[Case]:
    """That both learned from the same, and would from the same tokens take the same step."""
    ours, theirs = first["ours"], first["theirs"]
    found = [agree("first loss", ours["loss"], theirs["loss"], LOSS_TOLERANCE)]
    if plan.mode == "full":
        found.append(agree("first gradient norm", ours["grad_norm"], theirs["grad_norm"], NORM_TOLERANCE))
    for what, tolerance in (("loss", LOSS_TOLERANCE), ("reward", 0.0), ("completion_tokens", 0.0)):
        pairs = zip(measured.all("ours", what), measured.all("theirs", what))
        found.append(max((agree(what.replace("_", " "), *pair, tolerance) for pair in pairs), key=lambda c: c["off"]))
    dead = max(measured.all("ours", "dead_groups") + measured.all("theirs", "dead_groups"))
    return [*found, agree("groups with equal rewards", dead, 0.0, 0.0)]


def criteria(cases: Sequence[Case]) -> list[Criterion]:
    def of(peer: str, mode: str, small: bool = False) -> list[Case]:
        return [c for c in cases if (c["peer"], c["name"], c["small"]) == (peer, mode, small)]

    return [
        *(at_least("B7", f"target, {mode}, defaults", 8, of(DEFAULTS, mode)) for mode in ("full", "lora")),
        *(at_least("B7", f"floor, {mode}, best", 4, of(BEST, mode)) for mode in ("full", "lora")),
        at_least("B7", "stretch, full, defaults", 12, of(DEFAULTS, "full")),
        *(at_least("B7", f"target, 4.7 M parameters, {mode}, defaults", 5, of(DEFAULTS, mode, True)) for mode in ("full", "lora")),
    ]
