"""The table of benches: what each id measures, runs, wants and shows. Standard library only: the report needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks import cold, grpo, head, memory, ppo, rollout, sft, tree
from benchmarks.harness import Case, Criterion, Session

Column = tuple[str, Callable[[Case], str]]


@dataclass(frozen=True)
class Bench:
    """run yields one case a comparison; criteria judges stored cases; columns are what the report's table shows."""

    id: str
    title: str
    run: Callable[[Session], Iterator[Case]]
    criteria: Callable[[Sequence[Case]], list[Criterion]]
    columns: tuple[Column, ...]
    note: str


def both(key: str, form: Callable[[float], str] = lambda x: f"{x:.1f}") -> Callable[[Case], str]:
    """`theirs / ours` of a pair."""
    return lambda case: f"{form(case[key]['theirs'])} / {form(case[key]['ours'])}" if case.get(key) else ""


def gb(x: float) -> str:
    return f"{x / 1e9:.2f}"


def checks(case: Case) -> str:
    """What differs; else how far apart the results are. Counts that had to be equal and are go without saying."""
    if "checks" not in case:
        return ""
    wrong = [c for c in case["checks"] if not c["ok"]]
    shown = wrong or [c for c in case["checks"] if c["tolerance"]]
    said = "; ".join(f"{c['what']} {c['off']:.1e}" for c in shown)
    return f"**DIFFERS:** {said}" if wrong else said


SPEED: tuple[Column, ...] = (
    ("median rate, peer / ours", both("rate")),
    ("best rate", both("best_rate")),
    ("ratio (worst block)", lambda c: f"**{c['ratio']:.2f}** ({c['worst_ratio']:.2f})"),
    ("blocks (discarded)", lambda c: f"{c['blocks']} ({c['discarded']})"),
    ("warm-up s, peer / ours", both("warmup_s")),
    ("equality", checks),
)
LIMITS: tuple[Column, ...] = (
    ("GFLOP/s", lambda c: f"{c['achieved_gflops']:.0f}"),
    ("of limit", lambda c: f"{c['of_limit']:.2f}"),
    ("work_eff", lambda c: f"{c['work_eff']:.3f}"),
)
EXTRA: Column = ("extra GB, peer / ours", both("extra_bytes", gb))
STEP = (*SPEED[:3], *LIMITS, ("peak GB of a step, peer / ours", both("peak_bytes", gb)), *SPEED[3:])


def parts(case: Case) -> str:
    """`theirs / ours` of each part of a step of reinforcement learning, in seconds."""
    return "; ".join(f"{part.removesuffix('_s')} {both(part, lambda x: f'{x:.2f}')(case)}" for part in grpo.PARTS)


def probes(case: Case) -> str:
    how = case.get("how")
    if not how:
        return ""
    return "; ".join(f"{who}: {how[who]}, longest probe {max(map(int, case['probes'][who]))}" for who in ("theirs", "ours"))


SFT_NOTE = (
    "Rates are {work} a second. TRL at its defaults: fp32 weights under bf16 autocast, checkpointing, rows in random order. At its "
    "best: bf16 weights without masters, no checkpointing, rows of like length together. burnish: a run's own step, everything `auto`."
)
BENCHES = {
    b.id: b
    for b in (
        Bench("B1", "SFT, all weights, log-normal lengths 40 to 512, half prompt, 8 rows", sft.b1, sft.b1_criteria, STEP, SFT_NOTE.format(work="loss tokens")),
        Bench("B2", "SFT, LoRA of rank 16 on all linear layers, the same rows", sft.b2, sft.b2_criteria, STEP, SFT_NOTE.format(work="loss tokens")),
        Bench("B3", "SFT, equal lengths, every token a label (TRL's best case)", sft.b3, sft.b3_criteria, STEP, SFT_NOTE.format(work="tokens")),
        Bench("B4", "SFT, 8 packed rows of 512 a step, TRL with `packing=True`", sft.b4, sft.b4_criteria, STEP, SFT_NOTE.format(work="tokens")),
        Bench("B7", "A GRPO step: 8 prompts x 8 completions, drawn, scored and learned from", grpo.run, grpo.criteria,
              (*SPEED[:3], ("seconds, peer / ours", parts), *LIMITS, ("peak GB of a step, peer / ours", both("peak_bytes", gb)), *SPEED[3:]),
              "Rates are samples a second, end to end. Lengths, rewards and loss are the same for both, and no group has equal rewards: see "
              "benchmarks/grpo.py. TRL at its defaults and at its best as in B1, with `generate`; burnish: a stage's own step, everything `auto`."),
        Bench("B8", "PPO with a value head, one step from prompts to update", ppo.run, ppo.criteria, (*SPEED[:3], *LIMITS, *SPEED[3:]),
              "Rates are samples a second. The peer is a loop over transformers written for this bench (benchmarks/peers/ppo.py): fp32 weights "
              "under bf16 autocast; at its best bf16 weights, the head on completion rows alone, rows of like length together."),
        Bench("B9", "Rollouts, skewed lengths", rollout.run, rollout.criteria, (*SPEED[:3], *LIMITS, *SPEED[3:]),
              "Rates are useful tokens a second. Every row has its length beforehand: see benchmarks/rollout.py for how each system is told."),
        Bench("B11", "The head, forward and backward", head.run, head.criteria, (*SPEED[:3], *LIMITS, EXTRA, *SPEED[3:]),
              "Rates are rows a second; memory is a step's high-water mark beyond inputs and gradients."),
        Bench("B12", "Attention over trees, in a body of four layers", tree.run, tree.criteria,
              (("tokens", lambda c: str(c["tokens"])), ("token ratio", lambda c: f"{c['token_ratio']:.2f}"), ("speed-up (worst block)", SPEED[2][1]),
               ("of the ratio", lambda c: f"{c['of_token_ratio']:.2f}"), ("seconds, peer / ours", lambda c: f"{statistics.median(c['seconds']['theirs']):.3f} / {statistics.median(c['seconds']['ours']):.3f}"),
               *LIMITS, EXTRA, *SPEED[3:]), "Forward and backward of a body of Gemma-3-270M's shape, in whichever of fp32 and bf16 multiplies faster on its machine (above); see benchmarks/tree.py."),
        Bench("B13", "Memory: a fresh process, and the longest sequence of a step", memory.run, memory.criteria,
              (("peak GB, TRL / ours", both("peak_bytes", gb)), ("ours of TRL's", lambda c: f"{c['peak_ratio']:.2f}" if "peak_ratio" in c else ""),
               ("tokens, TRL / ours", both("tokens", str)), ("ratio", lambda c: f"**{c['ratio']:.2f}**" if "ratio" in c else ""), ("how", probes), ("equality", checks)),
              "TRL at its defaults. A length that was not reached for want of time is the line through the two longest probes: \"extrapolated\"."),
        Bench("B14", "Cold start: process, imports, loading, one step", cold.run, cold.criteria,
              (("seconds, TRL / ours", lambda c: f"{statistics.median(c['seconds']['theirs']):.1f} / {statistics.median(c['seconds']['ours']):.1f}"),
               *((f"{part[:-2]} s", both(part)) for part in ("import_s", "load_s", "step_s")), *SPEED[2:]), "TRL at its defaults; 8 rows of 40 tokens."),
    )
}  # fmt: skip
GPU = {
    "GPU0": "equality of every CUDA path with the CPU's, the padded model's or whole logits",
    "GPU1": "SFT of 0.6B and 8B, full and LoRA, 4k packed",
    "GPU2": "GRPO of 0.6B and 1.7B, groups of 16",
    "GPU3": "decoding of 0.6B and 8B, 1 to 512 rows",
    "GPU4": "the head at 16,384 x 248,320 x 2,048",
}
