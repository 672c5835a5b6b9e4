"""B9: rollouts alone. 16 prompts x 8 samples with skewed lengths, and 1, 8, 32 and 64 rows at once.

A useful token is one up to and including its row's last. Every row has its length beforehand (log-normal, median 12, 2 to
40 tokens), the same for every system, each by its own means: burnish by the limit of each sample, transformers and TRL
by a stopping criterion that answers for each row, vLLM by each request's `max_tokens`. Temperature 1, nothing cut away. One row at once is
sixteen of them, asked one after the other: a single one was four tokens and a tenth of a second.
The check: log-probability of one prompt (what `score` gives and what the peer's logits give), and that every row of both
got its length. *of limit* takes every sample for a row of its own; samples that agree so far are fewer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import rows as data
from benchmarks.harness import Case, Child, Criterion, Session, agree, at_least, compare, efficiency, forgiven
from benchmarks.machine import Calibration
from benchmarks.sft import vocabulary_of

MAIN = "16 x 8"
SINGLY, CALLS = "B 1", 16
WORKLOADS = {MAIN: (16, 8), SINGLY: (1, 1), "B 8": (1, 8), "B 32": (4, 8), "B 64": (8, 8)}  # prompts, samples of each
PEERS = {  # name: (environment, module, setting, workloads)
    "generate, bf16": ("peers", "benchmarks.peers.rollout", "generate", tuple(WORKLOADS)),
    "TRL's path": ("peers", "benchmarks.peers.rollout", "trl", (MAIN,)),
    "vLLM-CPU": ("vllm", "benchmarks.peers.vllm_rollout", "vllm", tuple(WORKLOADS)),
}
TOLERANCE = 0.02


def least_seconds(calibration: Calibration, lengths: Sequence[int], prefill_tokens: int, ready: dict[str, Any]) -> float:
    """Prefill at the best product, then step by step the longer of reading the weights once and its rows' products."""
    peak, read = calibration.peak_gflops[ready["dtype"]] * 1e9, calibration.read_gb_per_s * 1e9
    weights = ready["token_flops"] / 2 * (2 if ready["dtype"] == "bfloat16" else 4)
    steps = (sum(n > t for n in lengths) for t in range(1, max(lengths)))  # the first token comes from the prefill
    return prefill_tokens * ready["body_flops"] / peak + sum(max(weights / read, rows * ready["token_flops"] / peak) for rows in steps)


def run(session: Session) -> Iterator[Case]:
    vocabulary = vocabulary_of(session.model)
    probe = data.ids(random.Random(6), 32, vocabulary)
    for peer, (where, module, setting, names) in PEERS.items():
        with session.pair((peer, where, module), ("burnish", "burnish", "benchmarks.ours.rollout")) as both:
            ready: dict[int, dict[str, Any]] = {}
            for name in names:
                case: Case = {"case": f"{name}, {peer}", "peer": peer, "workload": name, "work": "useful tokens"}
                with forgiven(case, session.say):
                    theirs, ours = both()
                    for child in (theirs, ours):
                        if child.process.pid not in ready:
                            ready[child.process.pid] = session.prepare(child, model=str(session.model), probe=probe, setting=setting)
                    case |= one(session, name, vocabulary, theirs, ours, ready)
                yield case


def one(session: Session, name: str, vocabulary: int, theirs: Child, ours: Child, ready: dict[int, dict[str, Any]]) -> Case:
    prompts, group = WORKLOADS[name]
    small = {"median": 3, "most": 5, "prompt": (4, 8)} if session.smoke else {}
    calls = CALLS if name == SINGLY and not session.smoke else 1
    work = [data.rollouts(2 if session.smoke and prompts > 1 else prompts, group, vocabulary, seed=2 + i, **small) for i in range(calls)]
    lengths = [work_of["lengths"] for work_of in work]
    short = work[0] | {"lengths": [min(n, 4) for n in lengths[0]]}
    first = {"theirs": theirs.ask("step", **short), "ours": ours.ask("step", **short)}
    measured = session.run({"theirs": lambda _: one_by_one(theirs, work), "ours": lambda _: one_by_one(ours, work)})
    case = compare(measured, "ours", "theirs", "useful_tokens")
    mine, other = ready[ours.process.pid], ready[theirs.process.pid]
    steps = [b.answers["ours"] for b in measured.kept]
    least = [sum(least_seconds(session.calibration, n, p, mine) for n, p in zip(lengths, s["prefilled"])) for s in steps]
    case |= efficiency([s["useful_flops"] for s in steps], [s["executed_flops"] for s in steps], case["seconds"]["ours"], least)
    asked = [n for call in lengths for n in call]
    wrong = {s: sum(a != b for a, b in zip(measured.kept[0].answers[s]["lengths"], asked, strict=True)) for s in ("ours", "theirs")}
    return case | {
        "rows": len(asked), "tokens": sum(asked), "warmup_s": {s: a["seconds"] for s, a in first.items()},
        "checks": [
            agree("log-probability of a prompt", mine["probe_logprob"], other["probe_logprob"], TOLERANCE),
            *(agree(f"rows of another length, {s}", float(n), 0.0, 0.0) for s, n in wrong.items()),
        ],
    }  # fmt: skip


def one_by_one(child: Child, work: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answers to all calls as one: sums, and what was prefilled by each."""
    answers = [child.ask("step", **call) for call in work]
    total: dict[str, Any] = {k: sum(a[k] for a in answers) for k in answers[0] if k != "lengths" and isinstance(answers[0][k], (int, float))}
    return total | {"lengths": [n for a in answers for n in a["lengths"]], "prefilled": [a.get("prefill_tokens", 0) for a in answers]}


def criteria(cases: Sequence[Case]) -> list[Criterion]:
    def of(peer: str, *names: str) -> list[Case]:
        return [c for c in cases if c["peer"] == peer and (not names or c["workload"] in names)]

    return [
        at_least("B9", "target, generate in bf16, 16 x 8", 3, of("generate, bf16", MAIN)),
        at_least("B9", "floor, generate in bf16, every B", 2, of("generate, bf16")),
        at_least("B9", "target, TRL's path, 16 x 8", 5, of("TRL's path", MAIN)),
        at_least("B9", "target, vLLM-CPU, 16 x 8", 1.3, of("vLLM-CPU", MAIN)),
        at_least("B9", "floor, vLLM-CPU, every B", 1.0, of("vLLM-CPU")),
    ]
